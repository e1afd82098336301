"""Batches of tokenised prompts, and what watches a batch while Transformers generates.

`BatchWatch` is handed to `generate` as a stopping criterion. It derives from none of the library's classes, because the
library only calls it, and deriving would import it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from executors.contract import RunReport
from executors.inference.generation_pace import Pace
from executors.inference.generation_run import PromptRow
from executors.inference.on_transformers.token_steering import RawScores

if TYPE_CHECKING:
    from torch import Tensor

_STOP_WINDOW_SLACK = 8  # tokens; a stop string may begin inside a token, and some tokens print nothing


@dataclass(frozen=True)
class BatchLimits:
    """How much runs together: rows, and tokens of all rows with padding and room for the output."""

    rows: int
    tokens: int


def make_batches(rows: Sequence[PromptRow], limits: BatchLimits) -> Iterator[list[PromptRow]]:
    """Yield batches of rows of similar length, the longest first: a lack of memory then shows at once, not at the end.

    A single row that exceeds the limits still gets a batch of its own.
    """
    batch: list[PromptRow] = []
    widest = room = 0
    for row in sorted(rows, key=lambda row: (-len(row.ids), row.place)):
        wider, roomier = max(widest, len(row.ids)), max(room, row.new_tokens)
        if batch and (len(batch) == limits.rows or (wider + roomier) * (len(batch) + 1) > limits.tokens):
            yield batch
            batch, wider, roomier = [], len(row.ids), row.new_tokens
        batch.append(row)
        widest, room = wider, roomier
    if batch:
        yield batch


class BatchWatch:
    """Decides after each token which rows are done, counts what each really generated, and obeys a cancel at once.

    Args:
        rows: the batch.
        end_ids: tokens that end a text.
        stop: stop strings.
        decode: token ids to text.
        report: asked for a cancel at every token.
        pace: told about tokens and finished prompts.
        outputs_left: how many outputs of each prompt, by its place, are not finished yet; over all batches.
        scores: scores the tokens, if the task wants their log probabilities.
    """

    def __init__(  # noqa: PLR0913 - each is one collaborator, all by name
        self,
        rows: Sequence[PromptRow],
        *,
        end_ids: frozenset[int],
        stop: Sequence[str],
        decode: Callable[[list[int]], str],
        report: RunReport,
        pace: Pace,
        outputs_left: MutableMapping[int, int],
        scores: RawScores | None = None,
    ) -> None:
        self._limits = [row.new_tokens for row in rows]
        self._places = [row.place for row in rows]
        self._outputs_left = outputs_left
        self._scores = scores
        self._end_ids = end_ids
        self._stop = stop
        self._window = max((len(text.encode()) for text in stop), default=0) + _STOP_WINDOW_SLACK
        self._decode = decode
        self._report = report
        self._pace = pace
        self.generated: list[list[int]] = [[] for _ in rows]
        self.done: list[bool] = [False for _ in rows]
        self.stopped: list[bool] = [False for _ in rows]

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        """Take the newest token of each row; return which rows are done, as `generate` asks for it."""
        del scores
        if self._scores is not None:
            self._scores.take(input_ids[:, -1], self.done)
        fresh = items = 0
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self.done[row]:
                continue
            self.generated[row].append(token)
            fresh += 1
            self.stopped[row] = token in self._end_ids or self._hits_stop(self.generated[row])
            self.done[row] = self.stopped[row] or len(self.generated[row]) >= self._limits[row]
            if self.done[row]:
                place = self._places[row]
                self._outputs_left[place] -= 1
                items += self._outputs_left[place] == 0
        self._pace.add(items=items, tokens=fresh)
        if self._report.cancelled:
            return input_ids.new_ones(len(self.done), dtype=bool)
        return input_ids.new_tensor(self.done, dtype=bool)

    def _hits_stop(self, tokens: list[int]) -> bool:
        if not self._stop:
            return False
        tail = self._decode(tokens[-self._window :])
        return any(text in tail for text in self._stop)

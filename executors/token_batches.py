"""Batches of tokenised prompts, and what watches and steers a batch while Transformers generates.

`BatchWatch` and `Penalties` are handed to `generate` as a stopping criterion and as a logits processor. They derive
from none of its classes, because the library only calls them, and deriving would import it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from executors.contract import RunReport

if TYPE_CHECKING:
    from torch import Tensor

_PROGRESS_EVERY_SEC = 2.0
_STOP_WINDOW_SLACK = 8  # tokens; a stop string may begin inside a token, and some tokens print nothing


@dataclass(frozen=True)
class BatchLimits:
    """How much runs together: rows, and tokens of all rows with padding and room for the output."""

    rows: int
    tokens: int


@dataclass(frozen=True)
class TokenRow:
    """One prompt ready to run: its place among all prompts, its token ids, and how many tokens it may add."""

    place: int
    ids: tuple[int, ...]
    new_tokens: int


def make_batches(rows: Sequence[TokenRow], limits: BatchLimits) -> Iterator[list[TokenRow]]:
    """Yield batches of rows of similar length, the longest first: a lack of memory then shows at once, not at the end.

    A single row that exceeds the limits still gets a batch of its own.
    """
    batch: list[TokenRow] = []
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


class Pace:
    """Counts items and tokens over all batches of a run, and reports both.

    Args:
        total: prompts in the run.
        report: gets a call after each batch, and about every two seconds in between.
    """

    def __init__(self, total: int, report: RunReport) -> None:
        self._total = total
        self._report = report
        self._started = self._told = time.monotonic()
        self._items = 0
        self._tokens = 0

    def add(self, *, items: int = 0, tokens: int = 0) -> None:
        """Count finished prompts and generated tokens."""
        self._items += items
        self._tokens += tokens
        if time.monotonic() - self._told >= _PROGRESS_EVERY_SEC:
            self.tell()

    def tell(self) -> None:
        """Report now."""
        self._told = time.monotonic()
        elapsed = max(self._told - self._started, 1e-6)
        self._report.progress(
            self._items, self._total, metrics={"tokens": self._tokens, "tokens_per_sec": self._tokens / elapsed}
        )

    @property
    def elapsed_sec(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._started


class BatchWatch:
    """Decides after each token which rows are done, counts what each really generated, and obeys a cancel at once.

    Args:
        rows: the batch.
        end_ids: tokens that end a text.
        stop: stop strings.
        decode: token ids to text.
        report: asked for a cancel at every token.
        pace: told about tokens and finished rows.
    """

    def __init__(  # noqa: PLR0913 - each is one collaborator, all by name
        self,
        rows: Sequence[TokenRow],
        *,
        end_ids: frozenset[int],
        stop: Sequence[str],
        decode: Callable[[list[int]], str],
        report: RunReport,
        pace: Pace,
    ) -> None:
        self._limits = [row.new_tokens for row in rows]
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
        fresh = items = 0
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self.done[row]:
                continue
            self.generated[row].append(token)
            fresh += 1
            self.stopped[row] = token in self._end_ids or self._hits_stop(self.generated[row])
            self.done[row] = self.stopped[row] or len(self.generated[row]) >= self._limits[row]
            items += self.done[row]
        self._pace.add(items=items, tokens=fresh)
        if self._report.cancelled:
            return input_ids.new_ones(len(self.done), dtype=bool)
        return input_ids.new_tensor(self.done, dtype=bool)

    def _hits_stop(self, tokens: list[int]) -> bool:
        if not self._stop:
            return False
        tail = self._decode(tokens[-self._window :])
        return any(text in tail for text in self._stop)


class Penalties:
    """Repetition, presence and frequency penalties that never count padding.

    The library's own repetition penalty sees the padding as repeated end tokens, so a prompt's answer would depend on
    the prompts beside it. Repetition looks at prompt and output, as in Transformers; presence and frequency look at the
    output only, as in OpenAI's API.

    Args:
        rows: the batch.
        repetition: 1 changes nothing; above 1 makes repeated tokens less likely.
        presence: taken once from each token that the output holds.
        frequency: taken from a token for each time that the output holds it.
    """

    def __init__(self, rows: Sequence[TokenRow], *, repetition: float, presence: float, frequency: float) -> None:
        self._rows = rows
        self._repetition = repetition
        self._presence = presence
        self._frequency = frequency
        self._width = max(len(row.ids) for row in rows)
        self._counts: Tensor | None = None
        self._in_prompt: Tensor | None = None

    @property
    def active(self) -> bool:
        """Whether any of the three changes anything."""
        return self._repetition != 1.0 or self._presence != 0.0 or self._frequency != 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with the penalties taken off."""
        if self._counts is None or self._in_prompt is None:
            self._counts = scores.new_zeros(scores.shape)
            self._in_prompt = scores.new_zeros(scores.shape, dtype=bool)
            for position, row in enumerate(self._rows):
                self._in_prompt[position, list(row.ids)] = True
        elif input_ids.shape[1] > self._width:
            newest = input_ids[:, -1:]
            self._counts.scatter_add_(1, newest, scores.new_ones(newest.shape))
        written = self._counts > 0
        scores = scores - self._frequency * self._counts - self._presence * written
        if self._repetition != 1.0:
            weakened = scores.where(scores > 0, scores * self._repetition)
            weakened = weakened.where(scores <= 0, scores / self._repetition)
            scores = weakened.where(written | self._in_prompt, scores)
        return scores

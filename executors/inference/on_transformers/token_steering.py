"""What steers and scores a batch, token by token, while Transformers generates.

The classes are handed to `generate` as logits processors. They derive from none of its classes, because the library
only calls them, and deriving would import it. A processor gets the tokens so far, one line for each row, and the scores
of all tokens for the next place, and returns them changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from executors.inference.generation_results import ChosenToken, TokenScore
from executors.inference.generation_run import PromptRow

if TYPE_CHECKING:
    from torch import Tensor

    Warper = Callable[[Tensor, Tensor], Tensor]

_SMALLEST_NOISE: Final = 1e-30


class RawScores:
    """Log probabilities of the generated tokens by the model's own distribution. It has to be the first processor.

    Args:
        rows: how many rows the batch has.
        top: how many of the likeliest tokens to list at each place.
        text_of: a token's text.
    """

    def __init__(self, rows: int, top: int, text_of: Callable[[int], str]) -> None:
        self._top = top
        self._text_of = text_of
        self._texts: dict[int, str] = {}
        self._newest: Tensor | None = None
        self.found: list[list[ChosenToken]] = [[] for _ in range(rows)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Note the scores of this place, and return them as they are."""
        del input_ids
        self._newest = scores.float().log_softmax(dim=-1)
        return scores

    def take(self, tokens: Tensor, done: Sequence[bool]) -> None:
        """Score the tokens that were chosen at this place.

        Args:
            tokens: one for each row.
            done: rows that had ended before; theirs is padding.
        """
        if self._newest is None:
            raise RuntimeError("a token was chosen before the model gave scores")
        chosen = self._newest.gather(1, tokens[:, None])[:, 0].tolist()
        best = self._newest.topk(min(self._top, self._newest.shape[1]), dim=-1)
        self._newest = None
        values, ids = best.values.tolist(), best.indices.tolist()
        for row, token in enumerate(tokens.tolist()):
            if done[row]:
                continue
            top = tuple(self._score(number, value) for number, value in zip(ids[row], values[row], strict=True))
            own = self._score(token, chosen[row])
            self.found[row].append(ChosenToken(id=own.id, token=own.token, logprob=own.logprob, top=top))

    def _score(self, token: int, logprob: float) -> TokenScore:
        if token not in self._texts:
            self._texts[token] = self._text_of(token)
        return TokenScore(id=token, token=self._texts[token], logprob=logprob)


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

    def __init__(self, rows: Sequence[PromptRow], *, repetition: float, presence: float, frequency: float) -> None:
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


class Draws:
    """Draws each row's next token with a generator of its own. It has to be the last processor.

    `generate` draws for all rows at once, so that what a seed gives would depend on the rows beside it, and a run that
    goes on after a kill would not give what an uninterrupted one gives. This one leaves just the drawn token possible,
    and `generate` has to take the likeliest.

    Args:
        rows: the batch. Rows without a seed share a generator with a new seed.
        temperature: above 0.
        top_k: only so many likeliest tokens stay possible; 0: all.
        top_p: only the likeliest tokens that together have this probability stay possible; 1: all.
        device: where the scores are.
    """

    def __init__(self, rows: Sequence[PromptRow], *, temperature: float, top_k: int, top_p: float, device: str) -> None:
        import torch
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self._warpers: list[Warper] = [TemperatureLogitsWarper(float(temperature))]
        if top_k:
            self._warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(float(top_p)))
        self._shared = torch.Generator(device)
        self._shared.seed()
        self._own = [torch.Generator(device).manual_seed(row.seed) for row in rows if row.seed is not None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores with which one token of each row is possible."""
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        # The likeliest of p / noise is a draw from p, if the noise is exponential.
        probabilities = scores.softmax(dim=-1)
        noise = probabilities.new_empty(probabilities.shape)
        if len(self._own) == len(noise):
            for line, generator in zip(noise, self._own, strict=True):
                line.exponential_(generator=generator)
        else:
            noise.exponential_(generator=self._shared)
        drawn = (probabilities / noise.clamp_min_(_SMALLEST_NOISE)).argmax(dim=-1, keepdim=True)
        return scores.new_full(scores.shape, float("-inf")).scatter_(1, drawn, 0.0)

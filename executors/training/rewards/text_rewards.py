"""Rewards for PPO from texts: what a reward function or another model's classifier says of prompt and answer.

TRL asks a reward model with the policy's own tokens. Here these become texts again, so that a reward model may have any
tokenizer, and a reward may be no model at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

from executors.training.trainers.ppo_batches import Prompt, SeededBatches

if TYPE_CHECKING:
    import torch

    from executors.training.rewards.reward_functions import WeightedReward


class Scorer(Protocol):
    """`executors.training.rewards.reward_scoring.TextScorer`, as far as it is needed here."""

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """Judge completions."""
        ...


@dataclass(frozen=True)
class RewardSum:
    """The reward of an answer: the weighted sum of all that judges it."""

    functions: Sequence[WeightedReward] = ()
    scorer: Scorer | None = None

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Mapping[str, Sequence[object]]
    ) -> list[float]:
        """Judge completions.

        Args:
            prompts: what the completions go on from.
            completions: one for each prompt, without special tokens.
            columns: the rows' further columns, a cell for each prompt.
        """
        totals = self.scorer.score(prompts, completions) if self.scorer else [0.0] * len(completions)
        for reward in self.functions:
            scores = reward.score(prompts, completions, columns)
            totals = [total + reward.weight * score for total, score in zip(totals, scores, strict=True)]
        return totals


@dataclass
class TextBackbone:
    """Stands where TRL has the backbone of a reward model: tokens in, one score at each place out.

    Attributes:
        batches: knows the rows whose answers are judged, and where an answer begins.
        tokenizer: the policy's.
        end_ids: tokens that end an answer; they are no part of its text.
        tokens: how many tokens of prompts and answers were judged so far.
    """

    batches: SeededBatches
    tokenizer: Any
    end_ids: frozenset[int]
    reward: RewardSum
    tokens: int = field(default=0, init=False)
    _rows: object = field(default=None, init=False)
    _done: int = field(default=0, init=False)

    def __call__(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_unused: object) -> SimpleNamespace:
        """Judge some answers to the current batch; TRL asks for all of them in order, in one part or several."""
        import torch

        rows = self.batches.current
        if rows is not self._rows or self._done >= len(rows.tokens):
            self._rows, self._done = rows, 0
        part = rows.pick(range(self._done, self._done + len(input_ids)))
        self._done += len(input_ids)
        self.tokens += int(attention_mask.sum())
        begin = self.batches.width
        texts = [
            self._text(answer[mask.bool()].tolist())
            for answer, mask in zip(input_ids[:, begin:], attention_mask[:, begin:], strict=True)
        ]
        scores = torch.tensor(
            self.reward.score(part.prompts, texts, part.columns), dtype=torch.float32, device=input_ids.device
        )
        everywhere = scores[:, None, None].expand(-1, input_ids.shape[1], 1)
        return SimpleNamespace(hidden_states=(everywhere,))

    def _text(self, tokens: list[int]) -> str:
        if tokens and tokens[-1] in self.end_ids:
            tokens = tokens[:-1]
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def reward_module(backbone: TextBackbone) -> torch.nn.Module:
    """Return what TRL takes for a reward model: it has no weights of its own."""
    import torch

    module = torch.nn.Module()
    module.base_model_prefix = "backbone"
    module.backbone = backbone
    module.score = torch.nn.Identity()
    return module

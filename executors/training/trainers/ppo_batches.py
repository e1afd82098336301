"""The prompts of a PPO run, in batches whose order the seed alone decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Prompt = str | Sequence[Mapping[str, str]]
"""A text, or the messages of a conversation."""


class StoppedError(Exception):
    """Raised where the next batch would have come, once a callback has asked the training to stop."""


@dataclass(frozen=True)
class PromptRows:
    """All prompts of a data set.

    Attributes:
        prompts: as the data set gives them.
        tokens: of each prompt.
        columns: the rows' further columns.
    """

    prompts: Sequence[Prompt]
    tokens: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[object]] = field(default_factory=dict)

    def pick(self, places: Sequence[int]) -> PromptRows:
        """Return the rows at these places, in this order."""
        return PromptRows(
            prompts=[self.prompts[place] for place in places],
            tokens=[self.tokens[place] for place in places],
            columns={name: [cells[place] for place in places] for name, cells in self.columns.items()},
        )


class SeededBatches:
    """An endless supply of batches, which stands where TRL has its data loader.

    The rows come in a new order in each epoch, and one epoch follows the other without a gap: a batch may hold the end
    of one and the beginning of the next, so that no row is left out.

    Args:
        rows: all prompts; the same on every rank.
        size: rows in one rank's batch.
        seed: decides the order of each epoch.
        pad_id: token that fills up shorter prompts, on the left.
        part: which part of the batch of all ranks this is, and how many parts there are.

    Attributes:
        first: number of the batch to begin with; a resumed run sets it to the steps that lie behind it.
        stopped: asked before each batch.
        current: the rows of the batch that was given out last.
        width: its columns: each prompt, filled up to the longest.
    """

    def __init__(self, rows: PromptRows, *, size: int, seed: int, pad_id: int, part: tuple[int, int] = (0, 1)) -> None:
        self._rows = rows
        self._size = size
        self._seed = seed
        self._pad_id = pad_id
        self._rank, self._ranks = part
        self.first = 0
        self.stopped: Callable[[], bool] = lambda: False
        self.current = rows.pick([])
        self.width = 0

    def __len__(self) -> int:
        """How many rows the data set has."""
        return len(self._rows.tokens)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Give out one batch after the other.

        Raises:
            StoppedError: `stopped` says so.
        """
        number = self.first
        while not self.stopped():
            yield self._batch(number)
            number += 1
        raise StoppedError

    def places(self, number: int) -> list[int]:
        """Return which rows are in a batch of this rank."""
        import numpy as np

        begin = (number * self._ranks + self._rank) * self._size
        orders: dict[int, list[int]] = {}
        chosen = []
        for position in range(begin, begin + self._size):
            epoch, place = divmod(position, len(self))
            if epoch not in orders:
                orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(len(self)).tolist()
            chosen.append(orders[epoch][place])
        return chosen

    def _batch(self, number: int) -> dict[str, torch.Tensor]:
        import torch

        self.current = self._rows.pick(self.places(number))
        self.width = max(len(tokens) for tokens in self.current.tokens)
        filled = [[self._pad_id] * (self.width - len(tokens)) + list(tokens) for tokens in self.current.tokens]
        return {"input_ids": torch.tensor(filled, dtype=torch.long)}

"""Which of the waiting tasks comes next: those of the loaded model first, but nobody is overtaken too often."""

from __future__ import annotations

import bisect
import itertools
import math
from collections import OrderedDict
from collections.abc import Collection
from typing import Final

from worker.task_record import TaskRecord

_NONE_WARM: Final[frozenset[str]] = frozenset()


class Backlog:
    """The waiting tasks, in order of arrival.

    A task is overtaken when one that came after it is taken before it. Nobody is overtaken more often than the oldest,
    so only that one has to be watched.

    Args:
        most_skips: how often a task may be overtaken; 0 keeps the order of arrival.
        most_together: how many tasks of one engine may run at once, where it can do that.
    """

    def __init__(self, most_skips: int, most_together: int) -> None:
        self._most_skips = most_skips
        self._most_together = most_together
        self._numbers = itertools.count()
        self._front_numbers = itertools.count(-1, -1)
        self._waiting: OrderedDict[int, TaskRecord] = OrderedDict()
        self._by_key: dict[str, OrderedDict[int, TaskRecord]] = {}
        self._overtakers: list[int] = []
        """Numbers of those that were taken before the oldest one though they came after it, ascending."""

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, record: TaskRecord) -> None:
        """A task begins to wait."""
        number = next(self._numbers)
        self._waiting[number] = record
        self._by_key.setdefault(record.engine_key, OrderedDict())[number] = record

    def put_back(self, record: TaskRecord) -> None:
        """A task that was taken waits again, before all others."""
        number = next(self._front_numbers)
        for waiting in (self._waiting, self._by_key.setdefault(record.engine_key, OrderedDict())):
            waiting[number] = record
            waiting.move_to_end(number, last=False)

    def remove(self, task_id: str) -> TaskRecord | None:
        """A task waits no longer, without its turn; None if it does not wait."""
        for number, record in self._waiting.items():
            if record.task_id == task_id:
                return self._pop(number)
        return None

    def clear(self) -> list[TaskRecord]:
        """Nobody waits any longer; returns all, the oldest first."""
        records = list(self._waiting.values())
        self._waiting.clear()
        self._by_key.clear()
        self._overtakers.clear()
        return records

    def take(self, running_key: str, running_count: int, warm_keys: Collection[str]) -> TaskRecord | None:
        """Take out the task that may run now, if there is one.

        Args:
            running_key: the engine key of all tasks that run now.
            running_count: how many these are.
            warm_keys: engine keys of the engines that live.
        """
        number = self._joining(running_key, running_count) if running_count else self._next(warm_keys)
        if number is None:
            return None
        if number != next(iter(self._waiting)):
            bisect.insort(self._overtakers, number)
        return self._pop(number)

    def peek(self, warm_keys: Collection[str] = _NONE_WARM) -> TaskRecord | None:
        """The task that `take` would give if nothing ran."""
        number = self._next(warm_keys)
        return None if number is None else self._waiting[number]

    def _joining(self, running_key: str, running_count: int) -> int | None:
        """Who may join those that run."""
        same = self._by_key.get(running_key)
        if not same or running_count >= self._most_together:
            return None
        number, record = next(iter(same.items()))
        oldest = next(iter(self._waiting))
        if not record.concurrent or (number != oldest and self._must_come_next()):
            return None
        return number

    def _next(self, warm_keys: Collection[str]) -> int | None:
        """Who comes when nothing runs."""
        if not self._waiting:
            return None
        oldest, record = next(iter(self._waiting.items()))
        if record.engine_key in warm_keys or self._must_come_next():
            return oldest
        firsts = [next(iter(same)) for key in warm_keys if (same := self._by_key.get(key))]
        return min(firsts, default=oldest)

    def _must_come_next(self) -> bool:
        """Whether the oldest one may not be overtaken again."""
        return len(self._overtakers) >= self._most_skips

    def _pop(self, number: int) -> TaskRecord:
        record = self._waiting.pop(number)
        same = self._by_key[record.engine_key]
        del same[number]
        if not same:
            del self._by_key[record.engine_key]
        oldest = next(iter(self._waiting), math.inf)
        del self._overtakers[: bisect.bisect(self._overtakers, oldest)]
        return record

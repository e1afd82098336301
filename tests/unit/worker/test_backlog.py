"""The order of waiting tasks: the loaded model's first, nobody overtaken too often, nothing lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.backlog import Backlog
from worker.task_record import TaskRecord

KEYS = "abc"
ALONE = "c"
"""The key of an engine that runs one task at a time."""


def record(name: str) -> TaskRecord:
    """A task whose name begins with its engine key."""
    return TaskRecord(name, "d1", "x", received_at=0.0, engine_key=name[0], concurrent=name[0] != ALONE)


def backlog_of(*names: str, most_skips: int = 16, most_together: int = 8) -> Backlog:
    backlog = Backlog(most_skips, most_together)
    for name in names:
        backlog.add(record(name))
    return backlog


def taken(backlog: Backlog, running_key: str = "", running_count: int = 0, warm: str = "") -> str | None:
    found = backlog.take(running_key, running_count, set(warm))
    return found.task_id if found is not None else None


def test_without_a_warm_engine_the_oldest_comes_first():
    backlog = backlog_of("a1", "b1", "a2")
    assert [taken(backlog) for _ in range(4)] == ["a1", "b1", "a2", None]


def test_tasks_of_a_warm_engine_come_first_the_oldest_of_them_before_the_others():
    backlog = backlog_of("c1", "a1", "b1", "a2")
    assert [taken(backlog, warm="ab") for _ in range(4)] == ["a1", "b1", "a2", "c1"]


def test_only_tasks_of_the_same_engine_join_and_only_up_to_the_limit():
    backlog = backlog_of("a1", "b1", "a2", "a3", most_together=3)
    assert taken(backlog) == "a1"
    assert taken(backlog, "a", 1) == "a2"
    assert taken(backlog, "a", 2) == "a3"
    backlog.add(record("a4"))
    assert taken(backlog, "a", 3) is None
    assert taken(backlog, "a", 2) == "a4"
    assert taken(backlog, "a", 1) is None
    assert taken(backlog, warm="a") == "b1"


def test_nothing_joins_an_engine_that_runs_one_task_at_a_time():
    backlog = backlog_of("c1", "c2")
    assert taken(backlog) == "c1"
    assert taken(backlog, "c", 1) is None
    assert taken(backlog, warm="c") == "c2"


def test_a_task_that_was_overtaken_often_enough_comes_next():
    backlog = backlog_of("b1", "a1", "a2", "a3", most_skips=2)
    assert [taken(backlog, warm="a") for _ in range(2)] == ["a1", "a2"]
    assert taken(backlog, "a", 1) is None
    assert taken(backlog, warm="a") == "b1"
    assert taken(backlog, warm="b") == "a3"


def test_the_count_goes_on_with_the_next_oldest():
    backlog = backlog_of("b1", "b2", "a1", "a2", most_skips=2)
    assert [taken(backlog, warm="a") for _ in range(2)] == ["a1", "a2"]
    backlog.add(record("a3"))
    assert taken(backlog, warm="a") == "b1"
    assert taken(backlog, warm="a") == "b2"
    assert taken(backlog, warm="b") == "a3"


def test_without_skips_the_order_of_arrival_stays_and_the_next_may_still_join():
    backlog = backlog_of("a1", "a2", "b1", "a3", most_skips=0)
    assert taken(backlog, warm="b") == "a1"
    assert taken(backlog, "a", 1) == "a2"
    assert taken(backlog, "a", 2) is None
    assert [taken(backlog, warm="a") for _ in range(2)] == ["b1", "a3"]


def test_a_task_is_removed_by_its_id():
    backlog = backlog_of("a1", "b1")
    removed = backlog.remove("a1")
    assert removed is not None
    assert removed.task_id == "a1"
    assert backlog.remove("a1") is None
    assert len(backlog) == 1


def test_a_task_that_is_put_back_comes_before_all_others():
    backlog = backlog_of("b1", "a1", "a2")
    assert taken(backlog, warm="a") == "a1"
    backlog.put_back(record("a1"))
    backlog.add(record("a3"))
    assert [taken(backlog, warm="ab") for _ in range(4)] == ["a1", "b1", "a2", "a3"]


def test_clearing_gives_all_back_in_order():
    backlog = backlog_of("b1", "a1", "b2")
    assert [each.task_id for each in backlog.clear()] == ["b1", "a1", "b2"]
    assert len(backlog) == 0
    assert taken(backlog, warm="ab") is None


@pytest.mark.parametrize(("warm", "expected"), [("", "b1"), ("a", "a1"), ("c", "b1")])
def test_peeking_says_who_comes_next_and_takes_nobody(warm: str, expected: str):
    backlog = backlog_of("b1", "a1")
    peeked = backlog.peek(set(warm))
    assert peeked is not None
    assert (peeked.task_id, len(backlog)) == (expected, 2)
    assert taken(backlog, warm=warm) == expected


@dataclass
class Model:
    """Who waits, in order, and how often each was overtaken."""

    waiting: list[str]
    skips: Counter[str]

    def take(self, name: str) -> None:
        for older in self.waiting[: self.waiting.index(name)]:
            self.skips[older] += 1
        self.waiting.remove(name)


STEPS = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(KEYS), st.just(0)),
    st.tuples(st.just("put_back"), st.sampled_from(KEYS), st.just(0)),
    st.tuples(st.just("take"), st.sampled_from(KEYS), st.integers(0, 4)),
    st.tuples(st.just("remove"), st.just(""), st.integers(0, 20)),
)


@given(st.lists(STEPS, max_size=80), st.integers(0, 4), st.integers(1, 3))
def test_nobody_is_overtaken_too_often_and_nothing_is_lost(
    steps: list[tuple[str, str, int]], most_skips: int, most_together: int
):
    backlog = Backlog(most_skips, most_together)
    model = Model([], Counter())
    for number, (step, key, count) in enumerate(steps):
        if step == "add":
            model.waiting.append(f"{key}{number}")
            backlog.add(record(model.waiting[-1]))
        elif step == "put_back":
            model.waiting.insert(0, f"{key}{number}")
            backlog.put_back(record(model.waiting[0]))
        elif step == "remove" and model.waiting:
            name = model.waiting[count % len(model.waiting)]
            assert backlog.remove(name) is not None
            model.waiting.remove(name)
        elif step == "take":
            name = taken(backlog, key, count, warm=key)
            if name is not None:
                assert count == 0 or (name[0] == key != ALONE and count < most_together)
                model.take(name)
            else:
                assert count or not model.waiting
        assert len(backlog) == len(model.waiting)
        assert all(times <= most_skips for times in model.skips.values())
    assert [taken(backlog) for _ in range(len(model.waiting))] == model.waiting

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recording_report import RecordingReport

from executors.inference.generation_pace import Pace
from executors.inference.generation_run import PromptRow
from executors.inference.on_transformers.token_batches import BatchLimits, BatchWatch, make_batches

LETTERS = "?abcdefghijklmnopqrstuvwxyz"
END = 0


class FakeTensor:
    """The few things of a tensor that the watch uses."""

    def __init__(self, values: list[int]) -> None:
        self.values = values

    def __getitem__(self, key: tuple[slice, int]) -> "FakeTensor":
        assert key == (slice(None), -1)
        return self

    def tolist(self) -> list[int]:
        return self.values

    def new_ones(self, size: int, dtype: type) -> list[bool]:
        return [dtype(1)] * size

    def new_tensor(self, values: list[bool], dtype: type) -> list[bool]:
        return [dtype(value) for value in values]


def row(place: int, length: int, new_tokens: int = 4) -> PromptRow:
    return PromptRow(place=place, ids=tuple(range(length)), new_tokens=new_tokens)


def watch_for(
    rows: list[PromptRow], report: RecordingReport, *stop: str, left: dict[int, int] | None = None
) -> BatchWatch:
    return BatchWatch(
        rows,
        end_ids=frozenset({END}),
        stop=stop,
        decode=lambda tokens: "".join(LETTERS[token] for token in tokens),
        report=report,
        pace=Pace(len(rows), report),
        outputs_left=left if left is not None else {row.place: 1 for row in rows},
    )


def step(watch: BatchWatch, *tokens: int) -> object:
    return watch(FakeTensor(list(tokens)), None)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 8), st.integers(1, 400))
def test_batches_hold_every_row_once_and_keep_the_limits(lengths: list[int], most: int, tokens: int):
    rows = [row(place, length) for place, length in enumerate(lengths)]
    batches = list(make_batches(rows, BatchLimits(rows=most, tokens=tokens)))
    assert sorted(r.place for batch in batches for r in batch) == list(range(len(rows)))
    for batch in batches:
        width = max(len(r.ids) for r in batch) + max(r.new_tokens for r in batch)
        assert len(batch) <= most
        assert len(batch) == 1 or width * len(batch) <= tokens
    widths = [len(r.ids) for batch in batches for r in batch]
    assert widths == sorted(widths, reverse=True)


def test_each_row_ends_for_its_own_reason():
    watch = watch_for([row(0, 1), row(1, 1), row(2, 1, new_tokens=2), row(3, 1)], RecordingReport(), "bc")
    assert step(watch, 1, 1, 1, 2) == [False, False, False, False]
    assert step(watch, END, 2, 1, 1) == [True, False, True, False]
    assert step(watch, 9, 3, 9, 1) == [True, True, True, False]
    assert step(watch, 9, 9, 9, 1) == [True, True, True, True]
    assert watch.generated == [[1, END], [1, 2, 3], [1, 1], [2, 1, 1, 1]]
    assert watch.stopped == [True, True, False, False]


def test_a_prompt_counts_once_all_its_outputs_are_finished():
    report = RecordingReport()
    left = {0: 3}
    twice, once = ([row(0, 1)] * count for count in (2, 1))
    step(watch_for(twice, report, left=left), END, 1)
    assert left == {0: 2}
    step(watch_for(twice, report, left=left), 1, END)
    assert left == {0: 1}
    last = watch_for(once, report, left=left)
    step(last, END)
    last._pace.tell()
    assert report.told[-1] == (1, 1)


def test_rows_of_one_prompt_stay_together_and_in_order():
    rows = [replace(row(place, 3), seed=copy) for place in range(3) for copy in range(4)]
    batched = [r for batch in make_batches(rows, BatchLimits(rows=5, tokens=999)) for r in batch]
    assert batched == rows


def test_a_cancel_ends_all_rows_at_once():
    report = RecordingReport()
    watch = watch_for([row(0, 1), row(1, 1)], report)
    assert step(watch, 1, 1) == [False, False]
    report.cancel()
    assert step(watch, 1, 1) == [True, True]


def test_a_stop_string_is_found_across_tokens_and_only_in_the_output():
    watch = watch_for([row(0, 1, new_tokens=90)], RecordingReport(), "xyz")
    for token in [1] * 50 + [24, 25]:
        assert step(watch, token) == [False]
    assert step(watch, 26) == [True]


def test_progress_is_told_every_two_seconds(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr("executors.inference.generation_pace.time.monotonic", lambda: now)
    report = RecordingReport()
    pace = Pace(3, report)
    pace.add(items=1, tokens=5)
    assert report.told == []
    now = 102.0
    pace.add(tokens=5)
    now = 103.0
    pace.add(items=1, tokens=5)
    assert report.told == [(1, 3)]
    pace.tell()
    assert report.told == [(1, 3), (2, 3)]
    assert pace.elapsed_sec == 3.0


def test_silence_is_not_reported(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr("executors.inference.generation_pace.time.monotonic", lambda: now)
    report = RecordingReport()
    pace = Pace(3, report)
    pace.tell()
    pace.add(tokens=5)
    now = 110.0
    pace.add()
    assert report.told == [(0, 3)]
    pace.tell()
    pace.tell()
    assert report.told == [(0, 3), (0, 3)], "the tokens, once"


def test_prompts_that_need_no_work_count_as_done():
    report = RecordingReport()
    pace = Pace(5, report)
    pace.skip(3)
    pace.tell()
    pace.add(items=1, tokens=1)
    pace.tell()
    assert report.told == [(3, 5), (4, 5)]

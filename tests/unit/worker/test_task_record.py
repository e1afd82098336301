"""A task's states, events and hash fields. The state machine is checked against a model by Hypothesis."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executors.contract import Failure, TaskOutput
from worker.task_preparation import Folder
from worker.task_record import IllegalMoveError, Success, TaskRecord

SUCCESS = Success(TaskOutput(result={"ok": True}), run_sec=1.0, load_sec=0.0, warm=True)
FAILURE = Failure(reason="engine_crash", message="it broke", hint="mend it", retryable=True, log_tail=("a", "b"))
FOLDER = Folder(Path("/r/t1"), ())


def record() -> TaskRecord:
    return TaskRecord("t1", "d1", "echo", received_at=1.0, dispatched_at="2031-04-02T09:02:11+00:00")


@given(st.lists(st.sampled_from(["begin", "put_back", "succeed", "fail"]), max_size=8))
def test_a_task_begins_only_while_it_waits_and_ends_exactly_once(moves: list[str]):
    task, running, ended = record(), False, False
    acts = {
        "begin": task.begin,
        "put_back": task.put_back,
        "succeed": lambda: task.finish(SUCCESS),
        "fail": lambda: task.finish(FAILURE),
    }
    states = {"begin": "RUNNING", "put_back": "QUEUED", "succeed": "SUCCEEDED", "fail": "FAILED"}
    for move in moves:
        legal = not ended and {"begin": not running, "put_back": running}.get(move, True)
        try:
            acts[move]()
        except IllegalMoveError:
            assert not legal
        else:
            assert legal
            running = move == "begin"
            ended = move in {"succeed", "fail"}
            assert task.state == states[move]


def test_a_task_that_was_put_back_says_why_until_it_runs_again():
    task = record()
    task.begin()
    task.put_back()

    fields = task.put_back_fields("because")

    assert (fields["status"], fields["progress_message"], fields["started_at"]) == ("QUEUED", "because", "")
    assert task.put_backs == 1
    task.begin()
    assert task.started_fields() == {"status": "RUNNING", "started_at": task.started_iso, "progress_message": ""}


def test_the_started_event_has_what_the_orchestrator_reads():
    task = record()
    task.begin()

    event = task.started_event("w1")

    assert (event.type, event.task_id, event.worker_id) == ("TASK_STARTED", "t1", "w1")
    assert event.payload == {
        "taskType": "echo",
        "started_at": task.started_iso,
        "dispatched_at": "2031-04-02T09:02:11+00:00",
    }


def test_a_success_carries_times_and_no_error():
    task = record()
    task.begin()
    task.finish(SUCCESS)

    event = task.final_event("w1", SUCCESS, FOLDER)

    assert event.type == "TASK_SUCCEEDED"
    assert event.error is None
    assert event.payload["finished_at"] == task.finished_iso
    assert event.payload["runtime_sec"] == pytest.approx(task.runtime_sec, abs=1e-6)
    assert event.payload["result_path"] == "/r/t1/responses.json"
    assert task.final_fields(SUCCESS, FOLDER)["engine"] == "warm"


def test_a_failure_names_reason_hint_and_last_lines():
    task = record()
    task.finish(FAILURE)

    event = task.final_event("w1", FAILURE, FOLDER)

    assert event.type == "TASK_FAILED"
    assert event.error == "it broke\nlast lines of the engine's log:\na\nb"
    assert (event.payload["reason"], event.payload["hint"], event.payload["retryable"]) == (
        "engine_crash",
        "mend it",
        True,
    )
    assert event.payload["started_at"] == task.finished_iso
    assert task.final_fields(FAILURE, FOLDER)["status"] == "FAILED"

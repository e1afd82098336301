"""How an engine ended, told apart in one place."""

from __future__ import annotations

import signal

import pytest

from worker.engine_end import EngineEnd, failure_of


@pytest.mark.parametrize(
    ("end", "reason", "words"),
    [
        (EngineEnd("gone", exit_status=3), "engine_crash", "exited with status 3"),
        (EngineEnd("gone", exit_status=0), "engine_crash", "exited with status 0"),
        (EngineEnd("gone", exit_status=-signal.SIGSEGV), "engine_crash", "SIGSEGV"),
        (EngineEnd("gone", exit_status=-signal.SIGKILL), "engine_crash", "SIGKILL"),
        (EngineEnd("gone", exit_status=-signal.SIGKILL, oom_kills=1), "host_oom", "memory"),
        (EngineEnd("gone", exit_status=-60), "engine_crash", "signal 60"),
        (EngineEnd("gone"), "engine_crash", "None"),
        (EngineEnd("garbage", detail="Invalid JSON"), "engine_protocol", "Invalid JSON"),
        (EngineEnd("channel_closed"), "engine_protocol", "closed its channel"),
        (EngineEnd("spoiled", detail="t-9"), "engine_crash", "because of task t-9"),
        (EngineEnd("timeout", seconds=90), "timeout", "90 s"),
        (EngineEnd("no_progress", seconds=5), "no_progress", "5 s"),
        (EngineEnd("cancelled"), "cancelled", "cancelled"),
        (EngineEnd("worker_shutdown"), "worker_shutdown", "shut down"),
    ],
)
def test_each_end_has_its_reason_and_words(end: EngineEnd, reason: str, words: str):
    failure = failure_of(end)

    assert failure.reason == reason
    assert words in failure.message
    assert failure.hint or reason == "cancelled"


def test_the_last_lines_are_kept():
    assert failure_of(EngineEnd("gone", exit_status=1, log_tail=("x",))).log_tail == ("x",)

"""What the engine process answers when a result is too long to be sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from executors import child
from executors.child import Engine
from executors.child_messages import RunTask, TaskDone, TaskFailed, from_engine
from executors.contract import EnginePolicy
from executors.echo_task import EchoTask

LIMIT = 2000


class Lines:
    """A channel that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send_line(self, line: bytes) -> None:
        self.sent.append(line)

    def send(self, message: child.Loaded) -> None:
        self.send_line(message.encode())


@pytest.mark.parametrize("size", [10, LIMIT])
def test_a_result_that_is_too_long_is_that_task_s_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int):
    monkeypatch.setattr(child, "LONGEST_MESSAGE", LIMIT)
    channel = Lines()
    engine = Engine(channel, EchoTask(), EnginePolicy())  # type: ignore[arg-type]  # only its sending is used
    order = RunTask(task_id="t1", spec={"taskType": "echo", "text": "x" * size}, out_dir=tmp_path)
    engine.expect(order)

    engine.run(order)

    assert max(map(len, channel.sent)) <= LIMIT
    answer = from_engine.validate_json(channel.sent[-1])
    if size < LIMIT:
        assert isinstance(answer, TaskDone)
    else:
        assert isinstance(answer, TaskFailed)
        assert (answer.failure.reason, answer.engine_usable, answer.foreseen) == ("bad_data", True, True)
        assert f"at most {LIMIT}" in answer.failure.message
        assert answer.failure.hint

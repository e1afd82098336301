"""The smallest executor gives back what it got, but for secrets."""

from __future__ import annotations

from pathlib import Path

from executors.contract import EnginePolicy, ExecutorTask, JsonObject
from executors.echo_task import EchoSpec, EchoTask


class NoReport:
    cancelled = False

    def progress(self, *_: object, **__: object) -> None: ...

    def log(self, *_: object) -> None: ...

    def raise_if_cancelled(self) -> None: ...


def test_secrets_are_masked_wherever_they_stand(tmp_path: Path):
    sent: JsonObject = {
        "taskType": "echo",
        "max_tokens": 5,
        "qdrant": {"url": "http://q", "api_key": "k-1"},
        "output": {"destination": {"headers": {"Authorization": "Bearer k-2", "X-Trace": "7"}}},
        "list": [{"password": "k-3"}],
    }
    task = ExecutorTask("t1", EchoSpec(), (), tmp_path, EnginePolicy(), NoReport(), sent)

    echo = EchoTask().run(task).result["echo"]

    assert echo == {
        "taskType": "echo",
        "max_tokens": 5,
        "qdrant": {"url": "http://q", "api_key": "***"},
        "output": {"destination": {"headers": {"Authorization": "***", "X-Trace": "7"}}},
        "list": [{"password": "***"}],
    }

"""The scripted orchestrator as a child process, with its commands as methods."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

Json = dict[str, Any]
_SCRIPT = Path(__file__).resolve().parents[1] / "with_daemon" / "scripted_orchestrator.py"


class OrchestratorProcess:
    """Starts it and waits until it listens; its end is the end of the `with` block."""

    def __init__(self, url: str, results: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(_SCRIPT), url, str(results)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PATH": os.environ["PATH"]},
            cwd="/",
            text=True,
        )

    def __enter__(self) -> Self:
        self.report()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()

    def await_workers(self, count: int, *, tags: tuple[str, ...] = (), cost: float = 1.0, ttl: int = 120) -> list[str]:
        found: list[str] = self._ask("await_workers", count=count, tags=tags, cost=cost, ttl=ttl)
        return found

    def dispatch(self, task_id: str, spec: Json, worker: str | None) -> int:
        listeners: int = self._ask("dispatch", task_id=task_id, spec=spec, worker=worker)
        return listeners

    def await_ends(self, *task_ids: str) -> dict[str, Json]:
        ends: dict[str, Json] = self._ask("await_ends", task_ids=task_ids)
        return ends

    def await_event(self, kind: str, worker: str, count: int = 1) -> list[Json]:
        found: list[Json] = self._ask("await_event", kind=kind, worker=worker, count=count)
        return found

    def report(self) -> Json:
        found: Json = self._ask("report")
        return found

    def _ask(self, verb: str, **fields: object) -> Any:  # noqa: ANN401 - each command has its own answer
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": verb, **fields}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the scripted orchestrator has ended; see its stderr"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer["answer"]

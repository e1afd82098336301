"""The real daemon: `python worker/main.py` as a process of its own, in an environment without our variables."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from waiting_until import wait_until

REPO = Path(__file__).resolve().parents[2]
SUBJECTS = REPO / "tests" / "subjects"
_KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH")


def clean_environment(folder: Path, **changes: str) -> dict[str, str]:
    """What a test's daemon gets: nothing of the caller's but the basics, and every file below `folder`."""
    basics = {name: os.environ[name] for name in _KEPT if name in os.environ}
    ours = {
        "PYTHONPATH": str(SUBJECTS),  # the subjects' dist-info lies there, so their entry points are found
        "RESULTS_DIR": str(folder / "results"),
        "WORKER_LOG_FILE": str(folder / "worker.log"),
        "HEARTBEAT_INTERVAL_SEC": "1",
        "LOG_LEVEL": "DEBUG",
        "HF_HUB_OFFLINE": "1",
    }
    return basics | ours | changes


def tagged_below(folder: Path) -> list[psutil.Process]:
    """Engine processes, and all that they started, of any daemon whose results lie below `folder`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get("FLOWMESH_ENGINE", "").startswith(str(folder)):
                found.append(process)
    return found


class DaemonProcess:
    """A started daemon.

    Args:
        folder: where its output and, unless `environment` says otherwise, its results and log lie.
        environment: all of its environment.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.environment = environment
        self.results = Path(environment["RESULTS_DIR"])
        self.log_file = Path(environment["WORKER_LOG_FILE"])
        self._stdout = folder / "stdout.txt"
        self._stderr = folder / "stderr.txt"
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "worker/main.py"],
                cwd=REPO,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )
        self.pid = self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    @property
    def stdout(self) -> str:
        return self._stdout.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self._stderr.read_text(errors="replace")

    @property
    def log_text(self) -> str:
        """All of `worker.log`, rotated files too."""
        files = sorted(self.log_file.parent.glob(f"{self.log_file.name}*"), reverse=True)
        return "".join(file.read_text(errors="replace") for file in files)

    @property
    def log_records(self) -> list[dict[str, Any]]:
        """The lines of the present `worker.log`; the last may be unfinished."""
        lines = self.log_file.read_text(errors="replace").splitlines(keepends=True) if self.log_file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def logged(self, action: str, **fields: object) -> list[dict[str, Any]]:
        wanted = {"action": action, **fields}.items()
        return [record for record in self.log_records if wanted <= record.items()]

    def engines(self) -> list[int]:
        """Process ids of its direct children that are engines."""
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self.pid).children()
            return sorted(child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE)
        return []

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, within_sec: float = 20.0) -> int:
        wait_until(lambda: not self.running, f"daemon {self.pid} ends", within_sec=within_sec)
        return self._process.wait()

    def stop(self, within_sec: float = 20.0) -> int:
        """SIGTERM, and wait for the end. Returns the exit code."""
        if self.running:
            self.signal(signal.SIGTERM)
        return self.wait(within_sec)

    def kill(self) -> None:
        """SIGKILL: it cannot clean up."""
        self._process.kill()
        self._process.wait()

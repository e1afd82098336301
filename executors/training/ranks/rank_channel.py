"""A rank's connection to its launcher."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import time
from typing import Final

from executors.child_messages import LONGEST_MESSAGE
from executors.contract import LogLevel
from executors.failure_report import encodable
from executors.training.ranks.rank_messages import (
    Hello,
    RankDone,
    RankFailed,
    RankLog,
    RankProgress,
    RankWarning,
)
from executors.training.training_job import TrainingJob

_LAUNCHER_SEC: Final = 10.0


class RankChannel:
    """The rank's `RankReport`. Sending is thread-safe; when the launcher is gone, this process ends.

    Args:
        address: the launcher's socket.
        rank: which rank this is.
    """

    def __init__(self, address: str, rank: int) -> None:
        self._rank = rank
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        self._lines = self._socket.makefile("rb")

    def job(self) -> TrainingJob:
        """Greet the launcher and take the job; from then on its end is watched for."""
        self.send(Hello(rank=self._rank, pid=os.getpid()))
        job = TrainingJob.model_validate_json(self._lines.readline(LONGEST_MESSAGE))
        threading.Thread(target=self._end_with_launcher, name="launcher", daemon=True).start()
        return job

    def send(self, message: Hello | RankProgress | RankLog | RankWarning | RankDone | RankFailed) -> None:
        """Send one message; blocks while the launcher is slow to read."""
        line = message.encode()
        with self._lock, contextlib.suppress(OSError):  # nobody is there; the watching thread ends this process
            self._socket.sendall(line)

    def progress(self, step: float, total: float, metrics: dict[str, float], message: str = "") -> None:
        """See `RankReport.progress`."""
        known = finite(metrics)
        text = encodable(message)
        self.send(RankProgress(step=step, total=total if total > 0 else None, metrics=known, message=text))

    def log(self, level: LogLevel, text: str) -> None:
        """See `RankReport.log`."""
        self.send(RankLog(level=level, message=encodable(text)))

    def warn(self, text: str) -> None:
        """See `RankReport.warn`."""
        self.send(RankWarning(message=encodable(text)))

    def wait_for_launcher(self) -> None:
        """Stay until the launcher ends this process, or is gone itself; not for ever."""
        time.sleep(_LAUNCHER_SEC)

    def _end_with_launcher(self) -> None:
        with contextlib.suppress(OSError):
            self._lines.read(1)
        os._exit(1)


def finite(numbers: dict[str, float]) -> dict[str, float]:
    """Without those that JSON does not know: a loss that diverges is NaN."""
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}

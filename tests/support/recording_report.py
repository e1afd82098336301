"""Takes the daemon's place: keeps what a run tells, and cancels it when the test says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from executors.contract import LogLevel
from executors.errors import TaskCancelledError


@dataclass
class RecordingReport:
    """What a run told.

    Attributes:
        stop_when: gets the metrics of each progress report; true cancels the task.
        cancel_after: cancels the task once it has asked `cancelled` so many times.
        told: done and total of each report.
        metrics: the metrics of each report.
        logged: "level: message".
        begun: set once tokens were reported.
        asked: how often the task has looked at `cancelled`.
    """

    stop_when: Callable[[Mapping[str, float]], bool] | None = None
    cancel_after: int | None = None
    told: list[tuple[float, float | None]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)
    asked: int = 0
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self._cancelled.set()

    def progress(
        self,
        done: float,
        total: float | None = None,
        *,
        unit: str = "items",
        message: str = "",
        metrics: dict[str, float] | None = None,
    ) -> None:
        del unit, message
        self.told.append((done, total))
        self.metrics.append(metrics or {})
        if self.tokens:
            self.begun.set()
        if self.stop_when is not None and self.stop_when({"done": done, **(metrics or {})}):
            self.cancel()

    @property
    def tokens(self) -> float:
        """The tokens of the last report."""
        return self.metrics[-1].get("tokens", 0) if self.metrics else 0

    def log(self, level: LogLevel, message: str) -> None:
        self.logged.append(f"{level}: {message}")

    @property
    def cancelled(self) -> bool:
        self.asked += 1
        if self.cancel_after is not None and self.asked > self.cancel_after:
            self.cancel()
        return self._cancelled.is_set()

    def raise_if_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise TaskCancelledError("cancelled by the test")

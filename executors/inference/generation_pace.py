"""How far a text generation is: counted over all prompts of a run, reported about every two seconds."""

from __future__ import annotations

import threading
import time

from executors.contract import RunReport

_PROGRESS_EVERY_SEC = 2.0


class Pace:
    """Counts items and tokens of a run, and reports both with the time that is left. Thread-safe.

    Args:
        total: prompts in the run.
        report: gets a call after each batch, and about every two seconds in between. Nothing is reported twice, because
            each report is taken for a sign of life.
    """

    def __init__(self, total: int, report: RunReport) -> None:
        self._total = total
        self._report = report
        self._started = self._told = time.monotonic()
        self._done_before = 0
        self._items = 0
        self._tokens = 0
        self._reported: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def skip(self, items: int) -> None:
        """Some prompts need no work: they cannot run, or an earlier run has finished them."""
        self._done_before += items

    def add(self, *, items: int = 0, tokens: int = 0) -> None:
        """Count finished prompts and generated tokens."""
        if not (items or tokens):
            return
        with self._lock:
            self._items += items
            self._tokens += tokens
            due = time.monotonic() - self._told >= _PROGRESS_EVERY_SEC
        if due:
            self.tell()

    def tell(self) -> None:
        """Report now, unless nothing has changed since the last report."""
        with self._lock:
            items, tokens = counted = (self._items, self._tokens)
            if counted == self._reported:
                return
            self._reported = counted
            self._told = time.monotonic()
        elapsed = max(self.elapsed_sec, 1e-6)
        metrics = {"tokens": float(tokens), "tokens_per_sec": tokens / elapsed}
        left = self._total - self._done_before - items
        if items and left:
            metrics["eta_sec"] = round(elapsed * left / items, 1)
        self._report.progress(self._done_before + items, self._total, metrics=metrics)

    @property
    def elapsed_sec(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._started

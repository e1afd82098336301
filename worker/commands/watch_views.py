"""How a waited-for task is shown: a moving bar on a terminal, a line now and then elsewhere. Both write to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from orchestrator_client.task_states import TaskProgress

_LEAST_PAUSE_SEC = 1.0


def progress_text(progress: TaskProgress) -> str:
    """For instance `3/12 items: generating`."""
    done = "" if progress.done is None else f"{progress.done:g}"
    if done and progress.total:
        done += f"/{progress.total:g}"
    counted = f"{done} {progress.unit}".strip() if done else ""
    return ": ".join(part for part in (counted, " ".join(progress.message.split())) if part)


class PlainView:
    """One line for each thing that changes, at most one a second for progress.

    Args:
        check: called some times a second; what it raises ends the waiting.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._check = check
        self._last = ""
        self._noted = ""
        self._last_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def status(self, text: str) -> None:
        """Print it."""
        self._line(text)

    def progress(self, progress: TaskProgress) -> None:
        """Print it unless it is the same again, or too soon."""
        text = progress_text(progress)
        if text and text != self._last and time.monotonic() - self._last_at >= _LEAST_PAUSE_SEC:
            self._last, self._last_at = text, time.monotonic()
            self._line(text)

    def note(self, text: str) -> None:
        """Print it once."""
        if text != self._noted:
            self._noted = text
            self._line(f"note: {text}")

    def check(self) -> None:
        """Ask whether to go on."""
        self._check()

    def _line(self, text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


class BarView(PlainView):
    """A spinner, a bar and the time that has passed."""

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        super().__init__(check)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._row = self._bar.add_task("submitting", total=None, detail="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def status(self, text: str) -> None:
        """Show it before the bar."""
        self._bar.update(self._row, description=escape(text))

    def progress(self, progress: TaskProgress) -> None:
        """Move the bar."""
        self._bar.update(
            self._row, completed=progress.done or 0, total=progress.total, detail=escape(progress_text(progress))
        )

    def _line(self, text: str) -> None:
        self._bar.console.print(escape(text), highlight=False)


def watch_view(check: Callable[[], None] = lambda: None) -> PlainView:
    """The view that suits stderr; `check` as in `PlainView`."""
    return BarView(check) if sys.stderr.isatty() else PlainView(check)

"""`training.report_to`: TensorBoard's event files and Trackio's database, both below `artifacts/`.

Nothing goes over a network, and no fault of a tracker reaches the training.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from pydantic_core import to_json

if TYPE_CHECKING:
    from executors.training.training_run import TrainingRun

_NETWORK_SETTINGS: Final = (
    "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_DATASET_ID", "TRACKIO_WEBHOOK_URL",
)  # fmt: skip
_PIPE_SIZE: Final = 1024**2
_SECONDS_TO_FINISH: Final = 20


class Tracker(Protocol):
    """Where metrics go. Its methods may raise."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class SafeTracker:
    """A tracker whose first fault disables it, with one warning for the sender of the task.

    Args:
        name: as in `training.report_to`.
        opener: makes the tracker.
        warn: takes the warning.
    """

    def __init__(self, name: str, opener: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        self._name = name
        self._warn = warn
        self._tracker: Tracker | None = None
        with self._guard():
            self._tracker = opener()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass metrics on."""
        with self._guard():
            if self._tracker:
                self._tracker.log(step, metrics)

    def close(self) -> None:
        """Close the tracker; it takes nothing any more."""
        with self._guard():
            tracker, self._tracker = self._tracker, None
            if tracker:
                tracker.close()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except ImportError as error:
            self._tracker = None
            self._warn(
                f"training.report_to: {self._name} is not installed on this worker ({error}), so it gets nothing; "
                "its operator can install the extra 'tracking'"
            )
        except Exception as error:  # noqa: BLE001 - becomes a warning: no tracker is worth a training
            self._tracker = None
            self._warn(f"training.report_to: {self._name} gets nothing more: {type(error).__name__}: {error}")


def trackers_for(run: TrainingRun, step: int) -> list[SafeTracker]:
    """Open the trackers that a run asks for.

    Args:
        run: the run.
        step: where it starts; what was logged later belongs to an earlier try.
    """
    openers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(run.artifacts_dir / "tensorboard", step),
        "trackio": lambda: Trackio(run.artifacts_dir / "trackio", run.job.kind, run.job.task_id),
    }
    return [SafeTracker(name, openers[name], run.tell.warn) for name in dict.fromkeys(run.spec.training.report_to)]


class TensorBoard:
    """TensorBoard's event files.

    Args:
        folder: where they go.
        step: scalars of later steps, of an earlier try, are hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one scalar for each metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"train/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class Trackio:
    """Trackio in a process of its own, which gets its settings from nobody but us and may hang without harm.

    Args:
        folder: of the database.
        project: Trackio's project.
        name: of the run in it.
    """

    def __init__(self, folder: Path, project: str, name: str) -> None:
        if importlib.util.find_spec("trackio") is None:
            raise ImportError("No module named 'trackio'")
        unset = [part for setting in _NETWORK_SETTINGS for part in ("-u", setting)]
        own = [f"TRACKIO_DIR={folder}", "HF_HUB_OFFLINE=1", "CUDA_VISIBLE_DEVICES="]
        command = [sys.executable, "-m", "executors.training.monitoring.trackio_process", project, name]
        read_end, self._pipe = os.pipe()
        try:
            self._process = subprocess.Popen(["/usr/bin/env", *unset, *own, *command], stdin=read_end)
        except OSError:
            os.close(self._pipe)
            raise
        finally:
            os.close(read_end)
        with contextlib.suppress(OSError):  # the default size only holds less
            fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        os.set_blocking(self._pipe, False)  # a process that hangs must not hold the training up

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass one step's metrics to the process."""
        line = to_json({"step": step, "metrics": dict(metrics)}) + b"\n"
        if os.write(self._pipe, line) != len(line):
            raise BlockingIOError("its process does not read any more")

    def close(self) -> None:
        """Let the process write what is left, and end it."""
        os.close(self._pipe)
        try:
            status = self._process.wait(_SECONDS_TO_FINISH)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        if status:
            raise ChildProcessError(f"its process ended with status {status}; the reason is in logs/rank0.log")

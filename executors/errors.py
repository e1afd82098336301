"""What an executor may raise. Anything else that escapes counts as a fault of the executor itself.

ExecutorError            base; carries reason, hint and whether another try can help
├─ BadSpecError          the task asks for something that is wrong or not allowed
├─ BadDataError          the task's data cannot be used
├─ MissingLibraryError   a library of the executor's extra is not installed
├─ ModelLoadError        the model cannot be found or loaded
├─ DivergedError         training gave a loss that is no number
├─ EngineCrashError      what the executor has loaded is broken; the engine process must be replaced
│  ├─ EngineMemoryError  because a GPU's memory ran out
│  └─ EngineHostMemoryError  because the host's memory ran out
└─ TaskCancelledError    the daemon asked the task to stop, and it did
"""

from __future__ import annotations

from typing import ClassVar, Literal

Reason = Literal[
    "bad_spec",
    "bad_data",
    "unknown_task_type",
    "executor_disabled",
    "missing_dependency",
    "model_load",
    "diverged",
    "executor_error",
    "gpu_oom",
    "host_oom",
    "gpu_fault",
    "disk_full",
    "engine_crash",
    "engine_protocol",
    "timeout",
    "no_progress",
    "cancelled",
    "worker_shutdown",
    "worker_restarted",
    "result_write",
    "input_failed",
    "delivery_refused",
    "delivery_failed",
]
"""Why a task failed: one word that programs may compare. Listed for operators in docs/ARCHITECTURE.md."""


class ExecutorError(Exception):
    """Base of all errors whose text is meant for the person who sent the task.

    Args:
        message: what is wrong: the thing, its value, what was expected.
        hint: the next step for the reader; may be empty.
    """

    reason: ClassVar[Reason] = "executor_error"
    retryable: ClassVar[bool] = False
    engine_usable: ClassVar[bool] = True

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class BadSpecError(ExecutorError):
    """The task asks for something that is wrong or not allowed."""

    reason = "bad_spec"


class BadDataError(ExecutorError):
    """The task's data is empty, unreadable or lacks a column."""

    reason = "bad_data"


class MissingLibraryError(ExecutorError):
    """A library that the executor needs is not installed; the hint says how to install it."""

    reason = "missing_dependency"


class ModelLoadError(ExecutorError):
    """The model cannot be found or loaded."""

    reason = "model_load"


class DivergedError(ExecutorError):
    """Training gave a loss or a gradient that is not a finite number; going on cannot mend it."""

    reason = "diverged"


class EngineCrashError(ExecutorError):
    """What the executor has loaded is broken, so that no further task can run with it."""

    reason: ClassVar[Reason] = "engine_crash"
    retryable = True
    engine_usable = False


class EngineMemoryError(EngineCrashError):
    """A GPU's memory ran out, and the engine with it."""

    reason = "gpu_oom"
    retryable = False


class EngineHostMemoryError(EngineCrashError):
    """The host's memory ran out, and the engine with it."""

    reason = "host_oom"


class TaskCancelledError(ExecutorError):
    """Raised by `RunReport.raise_if_cancelled` once the daemon has asked the task to stop."""

    reason = "cancelled"

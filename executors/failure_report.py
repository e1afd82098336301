"""What an exception in an executor means: reason, hint, and whether the process can be trusted afterwards."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final

from executors.contract import Failure
from executors.errors import ExecutorError, Reason

_BROKEN_GPU = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "NCCL error", "unspecified launch failure", "ECC error")
"""Texts of errors after which a CUDA context stays unusable for the rest of the process's life."""


_FULL_DISK = (
    "No space left on device",
    "Disk quota exceeded",
    "PytorchStreamWriter failed writing",
    "basic_ios::clear: iostream error",
    ". unexpected pos ",
)
"""Texts of errors that are no `OSError` and yet mean that a file could not be written, mostly for lack of room."""

_LONGEST_TEXT: Final = 20_000
"""Characters. Libraries may quote whole data in an error; its text goes into events, which all listeners get."""


@dataclass(frozen=True)
class Verdict:
    """`engine_usable` is false when only a new process gives a sane state or frees the memory."""

    failure: Failure
    engine_usable: bool


class ReportedFailureError(ExecutorError):
    """A failure that another process has already sorted: `verdict_on` passes it on as it is.

    Args:
        failure: what to tell the sender.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message, hint=failure.hint)
        self.failure = failure


def verdict_on(error: Exception) -> Verdict:  # noqa: PLR0911 - one return for each kind of ending reads best
    """Sort one exception."""
    text = _bounded(f"{type(error).__name__}: {error}")
    if isinstance(error, ReportedFailureError):
        return Verdict(error.failure, engine_usable=True)
    if isinstance(error, ExecutorError):
        message, hint = _bounded(error.message), _bounded(error.hint)
        failure = Failure(reason=error.reason, message=message, hint=hint, retryable=error.retryable)
        return Verdict(failure, engine_usable=error.engine_usable)
    # torch.OutOfMemoryError, recognised by name so that torch is not imported here.
    if type(error).__name__ == "OutOfMemoryError":
        hint = "lower the batch size, the number of new tokens or the model's size, or use a GPU with more memory"
        return _broken("gpu_oom", text, hint, retryable=False)
    if isinstance(error, RuntimeError) and any(mark in str(error) for mark in _BROKEN_GPU):
        return _broken("gpu_fault", text, "the engine process is replaced; look at dmesg for Xid lines", retryable=True)
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate" in str(error):
        return _broken("host_oom", text, "the host has too little memory for this task", retryable=True)
    if _means_disk_full(error):
        return Verdict(
            Failure(reason="disk_full", message=text, hint="free space in RESULTS_DIR", retryable=True),
            engine_usable=True,
        )
    if isinstance(error, ImportError):
        failure = Failure(reason="missing_dependency", message=text, hint="run `flowmesh-worker doctor` on the worker")
        return Verdict(failure, engine_usable=True)
    return Verdict(
        Failure(reason="executor_error", message=text, hint="the traceback is in the task's logs/engine.log"),
        engine_usable=True,
    )


def _means_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # Libraries that write files without Python's help: safetensors, then torch, which does not say why.
    return any(mark in str(error) for mark in _FULL_DISK)


def encodable(text: str) -> str:
    """The text without lone surrogates, which UTF-8 does not know and a broken tokenizer or file name can give."""
    return text.encode(errors="replace").decode()


def _bounded(text: str) -> str:
    text = encodable(text[: _LONGEST_TEXT + 1])
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"


def _broken(reason: Reason, message: str, hint: str, *, retryable: bool) -> Verdict:
    return Verdict(Failure(reason=reason, message=message, hint=hint, retryable=retryable), engine_usable=False)

"""Reads how an engine process ended, in one place: exit, signal, out of memory, hang, silence, garbage."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from executors.contract import Failure

Cause = Literal[
    "gone", "garbage", "channel_closed", "spoiled", "timeout", "no_progress", "cancelled", "worker_shutdown"
]
"""Why the daemon looks at the engine's end: it went by itself, or the daemon ended it for this reason."""

_CGROUP_EVENTS: Final = Path("/sys/fs/cgroup/memory.events")


@dataclass(frozen=True)
class EngineEnd:
    """What is known about an engine's end.

    Attributes:
        cause: see `Cause`.
        exit_status: as `subprocess` gives it: negative is a signal; None while it runs.
        oom_kills: kernel out-of-memory kills in our cgroup while it lived.
        seconds: the limit that ran out, for timeouts.
        detail: a few words more; for "spoiled" the task because of which the daemon ended the engine.
        log_tail: the last lines it printed.
    """

    cause: Cause
    exit_status: int | None = None
    oom_kills: int = 0
    seconds: float = 0.0
    detail: str = ""
    log_tail: tuple[str, ...] = ()


def failure_of(end: EngineEnd) -> Failure:
    """Turn an engine's end into the failure of the task that ran in it."""
    return _explained(end).model_copy(update={"log_tail": end.log_tail})


def _explained(end: EngineEnd) -> Failure:  # noqa: PLR0911 - one return for each cause reads best
    match end.cause:
        case "timeout":
            return Failure(
                reason="timeout",
                message=f"the task ran longer than its limit of {end.seconds:g} s",
                hint="raise spec.timeoutSec or WORKER_TASK_TIMEOUT_SEC, or give the task less to do",
            )
        case "no_progress":
            return Failure(
                reason="no_progress",
                message=f"the task said and printed nothing for {end.seconds:g} s and was stopped",
                hint="raise spec.noProgressTimeoutSec or WORKER_NO_PROGRESS_TIMEOUT_SEC if it is just quiet",
                retryable=True,
            )
        case "cancelled":
            return Failure(reason="cancelled", message="the task was cancelled")
        case "worker_shutdown":
            return Failure(
                reason="worker_shutdown",
                message="the worker was shut down before the task was finished",
                hint="send the task again, or raise SHUTDOWN_GRACE_SEC",
                retryable=True,
            )
        case "garbage":
            return Failure(
                reason="engine_protocol",
                message=f"the engine process sent something that is no message: {end.detail}",
                hint="this is a fault of the executor or of the worker; the engine was replaced",
            )
        case "channel_closed":
            return Failure(
                reason="engine_protocol",
                message="the engine process closed its channel to the worker while it ran",
                hint="an executor must not close descriptors that it did not open; the engine was replaced",
            )
        case "spoiled":
            return Failure(
                reason="engine_crash",
                message=f"the engine process was ended because of task {end.detail}, which ran in it at the same time",
                hint="send the task again: the fault is not its own",
                retryable=True,
            )
        case "gone":
            return _gone(end)


def _gone(end: EngineEnd) -> Failure:
    status = end.exit_status
    if status is not None and status < 0:
        name = _signal_name(-status)
        if end.oom_kills and -status == signal.SIGKILL:
            return Failure(
                reason="host_oom",
                message="the kernel killed the engine process because memory ran out",
                hint="lower the batch or the model's size, or give the host (or its cgroup) more memory",
                retryable=True,
            )
        hint = (
            "somebody or something killed it: look at `dmesg` for the out-of-memory killer"
            if -status == signal.SIGKILL
            else "the last log lines may show where; the full log is in the task's logs/engine.log"
        )
        return Failure(
            reason="engine_crash",
            message=f"the engine process was ended by {name}",
            hint=hint,
            retryable=True,
        )
    return Failure(
        reason="engine_crash",
        message=f"the engine process exited with status {status} in the middle of the task",
        hint="the last log lines may show why; the full log is in the task's logs/engine.log",
        retryable=True,
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def oom_kills() -> int:
    """How many processes of our cgroup the kernel has killed for want of memory; 0 where that cannot be read."""
    try:
        lines = _CGROUP_EVENTS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)

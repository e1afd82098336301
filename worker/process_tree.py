"""Ends process groups for good, and finds what escaped from them.

Every engine process starts a session of its own and carries the tag FLOWMESH_ENGINE in its environment. A grandchild
that left the group with `setsid` still carries the tag, and the daemon, as child subreaper, inherits it when its parent
ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from typing import Final

import psutil
import structlog

TAG: Final = "FLOWMESH_ENGINE"
_PR_SET_CHILD_SUBREAPER: Final = 36
_GONE_WITHIN_SEC: Final = 5.0
_POLL_SEC: Final = 0.02
_WAITERS_TURN_SEC: Final = 0.5

log = structlog.get_logger()


def adopt_orphans() -> None:
    """Make this process inherit the orphans of its children, so that they can be ended and reaped."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        log.warning("cannot become child subreaper", action="start", error=os.strerror(ctypes.get_errno()))


def tagged(prefix: str) -> list[psutil.Process]:
    """All processes that may be looked into and whose engine tag starts with `prefix`; not this one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it ended meanwhile, or belongs to somebody else
            if process.pid != os.getpid() and process.environ().get(TAG, "").startswith(prefix):
                found.append(process)
    return found


def end_everything(prefix: str, group: int | None = None, spare: frozenset[int] = frozenset()) -> list[int]:
    """Kill a process group and every tagged process, and wait until they are gone.

    Blocks up to some seconds: call it in a thread.

    Args:
        prefix: the tag, or its beginning.
        group: a process group that is killed first.
        spare: children of ours that somebody else waits for; they are not reaped here.

    Returns:
        Ids of processes that are still there; empty unless one sits in an uninterruptible system call.
    """
    if group is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    deadline = time.monotonic() + _GONE_WITHIN_SEC
    while True:
        left = tagged(prefix)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if not left or time.monotonic() > deadline:
            _reap_orphans(spare)
            return [process.pid for process in left]
        time.sleep(_POLL_SEC)


def _reap_orphans(spare: frozenset[int]) -> None:
    """Take the exit status of adopted processes that have ended; else they would stay as zombies."""
    if not _zombies(spare):
        return
    # tar, pigz and the like are waited for by asyncio, whose threads take them at once; what is left is nobody's.
    time.sleep(_WAITERS_TURN_SEC)
    for child in _zombies(spare):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child.pid, os.WNOHANG)


def _zombies(spare: frozenset[int]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.pid not in spare and child.status() == psutil.STATUS_ZOMBIE:
                found.append(child)
    return found

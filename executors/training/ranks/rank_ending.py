"""Ends the processes of a training for good: also those that left its process group, or whose parent is gone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import psutil

MARK: Final = "FLOWMESH_RANKS"
"""Variable of the environment that marks what belongs to one group of ranks."""
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_GET_CHILD_SUBREAPER: Final = 37
_GONE_WITHIN_SEC: Final = 30.0
"""The kernel needs a while to take back large memory, and the next training wants that of the same GPUs."""
_POLL_SEC: Final = 0.01


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Inside, this process inherits what its children leave behind, so that it can take their exit status.

    Where that is not possible they stay with the daemon, which does the same.
    """
    libc, before = ctypes.CDLL(None), ctypes.c_int()
    libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, before, 0, 0, 0)


def children() -> frozenset[int]:
    """Ids of this process's children, of those that have ended too."""
    return frozenset(child.pid for child in psutil.Process().children())


def end_marked(mark: str, spare: frozenset[int]) -> list[int]:
    """Kill every process whose environment has the mark, and wait until none is left.

    Args:
        mark: the value of the variable `MARK`.
        spare: children of ours that somebody else waits for.

    Returns:
        Ids of processes that are still there; empty unless one sits in an uninterruptible system call.
    """
    deadline = time.monotonic() + _GONE_WITHIN_SEC
    killed: set[int] = set()
    while True:
        for process in _marked(mark):
            with contextlib.suppress(psutil.Error):
                process.kill()
            killed.add(process.pid)
        left = [pid for pid in killed if psutil.pid_exists(pid)]
        _reap(spare)  # what was killed, and what had ended before its parent was
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(_POLL_SEC)


def _reap(spare: frozenset[int]) -> None:
    """Take the exit status of children that have ended; else they would stay as zombies."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error, ChildProcessError):
            if child.pid not in spare and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile, or belongs to somebody else
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
    return found

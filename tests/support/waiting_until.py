"""Waiting for a condition with a name and a deadline, instead of sleeping."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

_POLL_SEC = 0.01

ValueT = TypeVar("ValueT")


def wait_until(look: Callable[[], ValueT | None], what: str, *, within_sec: float = 20.0) -> ValueT:
    """Return the first value of `look` that is true; fail with `what` when the time is over."""
    deadline = time.monotonic() + within_sec
    while True:
        value = look()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {within_sec:g} s in vain until {what}; last seen: {value!r}"
        time.sleep(_POLL_SEC)

"""Finds JSON that is nested so deeply that a reader in C overflows its stack, which no `except` can catch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

DEEPEST: Final = 1000
"""Lists and objects inside each other; Python's own reader gives up at about the same depth."""

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


def find_deep_line(path: Path) -> int | None:
    """Return the number, counted from 1, of the first line that is nested more deeply than `DEEPEST`, or None."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.count(b"[") + line.count(b"{") > DEEPEST and _is_deep(line):
                return number
    return None


def _is_deep(line: bytes) -> bool:
    depth = 0
    for bracket in _BRACKET.finditer(_STRING.sub(b"", line)):
        depth += 1 if bracket.group() in b"[{" else -1
        if depth > DEEPEST:
            return True
    return False

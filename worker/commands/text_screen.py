"""Output for people: tables and colours on a terminal, plain aligned text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

_GAP = "  "


def on_terminal() -> bool:
    """Whether a person looks at stdout."""
    return sys.stdout.isatty()


def say(text: str = "", *, style: str = "") -> None:
    """One line, or several, on stdout; `style` (a rich style) shows on a terminal only."""
    if on_terminal():
        Console().print(Text(text, style=style), soft_wrap=True)
    else:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def complain(text: str) -> None:
    """One line on stderr, with the program's name."""
    sys.stderr.write(f"flowmesh-worker: {text}\n")
    sys.stderr.flush()


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their headings. Cells are taken as they are: markup in them has no meaning."""
    if on_terminal():
        table = Table(*columns)
        for row in rows:
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        Console().print(table)
        return
    cells = [[_one_line(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    for row in cells:
        say(_GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show_fields(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values, one a line; empty values are left out."""
    shown = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        indented = value.replace("\n", "\n" + " " * (width + len(_GAP)))
        say(f"{name.ljust(width)}{_GAP}{indented}", style=_STYLES.get(value, ""))


def duration(seconds: float | None) -> str:
    """Seconds as people say them: `45 s`, `3 min`, `5.2 h`, `12 d`; a dash for None."""
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} d"


def _one_line(text: str) -> str:
    return " ".join(text.split())


_STYLES = {
    "OK": "green", "IDLE": "green", "SUCCEEDED": "green", "alive": "green",
    "WARN": "yellow", "QUEUED": "yellow", "STARTING": "yellow",
    "RUNNING": "cyan",
    "FAIL": "bold red", "FAILED": "bold red", "stale": "red", "UNREADABLE": "red",
}  # fmt: skip
"""Words that have one meaning wherever they stand."""

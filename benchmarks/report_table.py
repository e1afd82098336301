"""What a measurement is compared with, as one table and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Bound = Literal["<", "<=", ">="]
Verdict = Literal["met", "missed", "beside"]
"""`beside`: a comparison without a target; the table shows the ratio."""


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: what was measured.
        compared_with: what the other figure is.
        ours: our figure.
        theirs: the comparison figure or the target.
        unit: of both.
        verdict: see `Verdict`.
        bound: how a target is to be read; empty for a mere comparison.
        details: more figures, for the JSON file and for the line below the table.
    """

    name: str
    compared_with: str
    ours: float
    theirs: float
    unit: str
    verdict: Verdict
    bound: str = ""
    details: dict[str, float] = field(default_factory=dict)


def against_target(
    name: str, ours: float, target: tuple[Bound, float], unit: str, details: dict[str, float] | None = None
) -> Row:
    """Compare with a target of DESIGN section 7."""
    bound, limit = target
    met = {"<": ours < limit, "<=": ours <= limit, ">=": ours >= limit}[bound]
    return Row(name, "target", ours, limit, unit, "met" if met else "missed", bound, details or {})


def beside(name: str, other: tuple[str, float], ours: float, unit: str, details: dict[str, float] | None = None) -> Row:
    """Compare with something else: what it is, and its figure."""
    return Row(name, other[0], ours, other[1], unit, "beside", "", details or {})


def table(rows: Sequence[Row]) -> str:
    """All rows, aligned."""
    heads = ("what", "compared with", "ours", "theirs", "verdict")
    cells = [heads, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    verdict = f"x {row.ours / row.theirs:.2f}" if row.verdict == "beside" and row.theirs else row.verdict
    theirs = f"{row.bound} {_number(row.theirs)} {row.unit}".strip()
    return row.name, row.compared_with, f"{_number(row.ours)} {row.unit}", theirs, verdict


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that `percent` of 100 are not above."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def spread(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """p50, p95, p99 and the largest, for details."""
    found = {f"p{percent}": percentile(values, percent) * scale for percent in (50, 95, 99)}
    return found | {"max": max(values) * scale, "n": len(values)}

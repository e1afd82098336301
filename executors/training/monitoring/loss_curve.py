"""Draws `artifacts/training.png`: loss, learning rate and reward against the steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from executors.training.training_run import TrainingRun

METRICS_FILE: Final = "metrics.jsonl"
CURVE_FILE: Final = "training.png"

_PANELS: Final = {
    "loss": ("loss", "loss/policy_avg"),
    "learning rate": ("learning_rate", "lr"),
    "reward": ("reward", "objective/scores", "rewards/margins", "margin"),
}
"""Title of each panel, and the metrics that it shows the first of."""

Points = list[tuple[int, float]]


def draw_curve(run: TrainingRun) -> None:
    """Draw the curve of a run out of its metrics file. What goes wrong becomes a warning."""
    try:
        _draw(run.artifacts_dir / METRICS_FILE, run.artifacts_dir / CURVE_FILE, run.job.kind)
    except Exception as error:  # noqa: BLE001 - becomes a warning in the result; the trained model matters more
        run.tell.warn(f"artifacts/{CURVE_FILE} could not be drawn: {type(error).__name__}: {error}")


def read_curves(metrics_file: Path) -> dict[str, tuple[str, Points]]:
    """The curves that a metrics file holds: panel's title to the metric's name and its points."""
    lines = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    curves = {}
    for title, names in _PANELS.items():
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                curves[title] = (name, points)
                break
    return curves


def _draw(metrics_file: Path, picture: Path, kind: str) -> None:
    curves = read_curves(metrics_file) if metrics_file.exists() else {}
    if not curves:
        return
    # Not pyplot: it keeps its figures in a global list and looks for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6 * len(curves)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (title, (name, points)) in zip(axes, curves.items(), strict=True):
        panel.plot(*zip(*points, strict=True), marker="." if len(points) <= _FEW_POINTS else None, linewidth=1.2)
        panel.set_ylabel(title if name.replace("_", " ") == title else f"{title}\n({name})")
        panel.grid(visible=True, alpha=0.3)
    axes[0].set_title(f"{kind} training")
    axes[-1].set_xlabel("step")
    temporary = picture.with_name(f".{picture.name}.new")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(picture)


_FEW_POINTS: Final = 60

"""A training that lives several times: how far it is, who does it, and whether it ended where it should."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
from daemon_process import DaemonProcess
from daemon_world import TaskEnd, World
from training_models import load_saved
from training_tasks import TRAINING_SEC, metrics_of
from waiting_until import wait_until


def start_trainer(
    world: World, model: Path, worker_id: str = "w-1", *, idle: bool = True, **environment: str
) -> DaemonProcess:
    """Start a daemon whose trainings may read a model.

    Each rank has one thread: several that wait for each other are slow where others use the cores too.
    """
    environment = {"WORKER_ALLOWED_ROOTS": str(model), "OMP_NUM_THREADS": "1", **environment}
    return world.start(worker_id, idle=idle, **environment)


def folder_of(world: World, task_id: str) -> Path:
    return world.folder / "results" / task_id


def last_step(folder: Path) -> int:
    """The last step that is in `metrics.jsonl`; 0 if there is none."""
    try:
        lines = (folder / "artifacts" / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    return max([0, *(json.loads(line)["step"] for line in lines if line.endswith("\n"))])


def reach(folder: Path, step: int, total: int) -> None:
    """Wait until a running training has logged a step that no earlier life of it had reached."""
    wait_until(lambda: last_step(folder) >= step, f"{folder.name} is at step {step}", within_sec=TRAINING_SEC)
    assert last_step(folder) < total, "it was not caught in the middle"


def rank_of(folder: Path, rank: int = 0) -> psutil.Process:
    """The process that is a rank of a running training."""
    log = (folder / "logs" / f"rank{rank}.log").read_text()
    return psutil.Process(int(re.findall(rf"rank {rank} of \d+, pid (\d+)", log)[-1]))


def alive(process: psutil.Process) -> bool:
    """Whether a process still does anything; one of an init that never looks stays as a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def trainers_in(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that train, or start what trains; an engine itself is none."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if "executors.training.ranks.rank_process" in process.cmdline():
                found.append(process)
    return found


def whole_checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints that are marked as whole, the furthest first."""
    marks = (folder / "checkpoints").glob("checkpoint-*/complete.json")
    return sorted((int(mark.parent.name.removeprefix("checkpoint-")) for mark in marks), reverse=True)


def check_resumed(end: TaskEnd, step: int, total: int) -> None:
    """Check that a training went on from a checkpoint and ended at its last step, with each step counted once."""
    assert end.ok, end.error
    assert end.result["resumed_from_step"] == step
    assert end.result["resume_from_path"] == str(end.folder / "checkpoints" / f"checkpoint-{step}")
    assert end.result["train_metrics"]["steps"] == total
    assert steps_of(end) == [*range(1, total + 1)]
    load_saved(Path(end.result["final_model_path"]))


def steps_of(end: TaskEnd) -> list[int]:
    return [line["step"] for line in metrics_of(end.folder) if "train_runtime" not in line]


def weights_of(end: TaskEnd) -> dict[str, Any]:
    """The final model's tensors."""
    model, _ = load_saved(Path(end.result["final_model_path"]))
    return dict(model.state_dict())

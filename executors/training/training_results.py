"""The result of a training (WIRE 5.2: the same keys for every kind), and the numbers in it."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Final, Protocol

from executors.contract import Artifact, JsonObject, TaskOutput
from executors.training.device_plan import DevicePlan
from executors.training.training_job import TrainingJob, TrainingOutcome

_LIBRARIES: Final = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
_LAST_LOGGED: Final[Mapping[str, tuple[str, ...]]] = {
    "final_loss": ("loss", "loss/policy_avg"),
    "final_reward": ("objective/scores", "reward"),
    "final_reward_margin": ("rewards/margins", "margin"),
    "final_accuracy": ("rewards/accuracies", "accuracy", "mean_token_accuracy"),
    "mean_loss": ("train_loss",),
    "tokens": ("num_tokens",),
    "episodes": ("episode",),
}
"""Keys of `train_metrics`, each with the names under which the trainers log that number."""
_COUNTS: Final = frozenset({"steps", "tokens", "episodes"})


class TrainerState(Protocol):
    """What is read of `transformers.TrainerState`."""

    global_step: int
    epoch: float | None
    log_history: list[dict[str, Any]]
    num_input_tokens_seen: int


def train_metrics(state: TrainerState) -> dict[str, float]:
    """How a training ended: steps, epochs, tokens, and what was logged last of the loss and the like."""
    found = {"steps": float(state.global_step)}
    if state.epoch is not None:
        found["epochs"] = float(state.epoch)
    if state.num_input_tokens_seen:
        found["tokens"] = float(state.num_input_tokens_seen)
    for key, names in _LAST_LOGGED.items():
        if (value := last_logged(state.log_history, names)) is not None:
            found[key] = value
    return found


def last_logged(logged: Sequence[Mapping[str, Any]], names: Sequence[str]) -> float | None:
    """The last finite number among the log's entries of these names; None if there is none."""
    for line in reversed(logged):
        for name in names:
            value = line.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                return float(value)
    return None


def library_versions() -> dict[str, str]:
    """Versions of what decides the result beside the data and the seed."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a kind of training may not need it
            continue
    return found


def output_of(
    job: TrainingJob, plan: DevicePlan, outcome: TrainingOutcome, *, seconds: float, warnings: Sequence[str]
) -> TaskOutput:
    """The result of a training that succeeded.

    Args:
        job: what was run last.
        plan: where it ran.
        outcome: what came of it.
        seconds: how long it took, with all tries.
        warnings: sentences that go before the outcome's own.
    """
    resumed = outcome.resumed_from
    result: JsonObject = {
        "training_successful": True,
        "training_time_seconds": round(seconds, 3),
        "error_message": None,
        "model_name": outcome.model_name,
        "dataset_size": outcome.dataset_size,
        "output_dir": str(job.out_dir),
        "checkpoints_dir": str(job.checkpoints_dir),
        "resume_from_path": str(resumed.path) if resumed else None,
        "resumed_from_step": resumed.step if resumed else None,
        "train_metrics": {
            name: int(value) if name in _COUNTS else value
            for name, value in outcome.metrics.items()
            if math.isfinite(value)
        },
        "batch_size": job.batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "versions": dict(outcome.versions),
        "seed": outcome.seed,
        "devices": {"ranks": plan.ranks, "gpus": list(plan.gpus), "why": plan.why},
    }
    return TaskOutput(
        result=result,
        artifacts=_artifacts(outcome.saved),
        warnings=list(dict.fromkeys([*warnings, *outcome.warnings])),
    )


def _artifacts(saved: str) -> tuple[Artifact, ...]:
    """The final model; `final_model_path` and the like come from it. A LoRA adapter is always archived (WIRE 5.1)."""
    if not saved:
        return ()
    name = PurePosixPath(saved).name
    return (Artifact(path=saved, key=name, archive_always=name == "final_lora"),)

"""What a rank of a training run works with, and what the builders of the kinds of training return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from executors.contract import EnginePolicy, LogLevel
    from executors.training.spec.trainer_specs import TrainingSpec
    from executors.training.training_job import TrainingJob


class RankReport(Protocol):
    """How a rank talks to its launcher. Calls are cheap and never raise."""

    def progress(self, step: int, total: int, metrics: dict[str, float], message: str = "") -> None:
        """Tell how far the training is."""
        ...

    def log(self, level: LogLevel, text: str) -> None:
        """Write one line to the task's log."""
        ...

    def warn(self, text: str) -> None:
        """Give the sender of the task one sentence; it goes into the result."""
        ...


@dataclass
class TrainingRun:
    """One rank's view of a training run.

    Attributes:
        rank: 0 alone writes files and reports progress.
        world_size: how many ranks there are.
        tell: the way to the launcher.
    """

    job: TrainingJob
    spec: TrainingSpec
    rank: int
    world_size: int
    tell: RankReport

    @property
    def policy(self) -> EnginePolicy:
        """What the operator allows."""
        return self.job.policy

    @property
    def inputs(self) -> Mapping[str, Path]:
        """Where the files lie that the spec asked for, by their names."""
        return self.job.inputs

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes and reports."""
        return self.rank == 0

    @property
    def artifacts_dir(self) -> Path:
        """Where metrics, the loss curve and trackers' files go; it is made when it is missing."""
        folder = self.job.out_dir / "artifacts"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def wait_for_all(self) -> None:
        """Return once all ranks have come here; at once where there is only one."""
        if self.world_size > 1:
            import torch.distributed as ranks

            ranks.barrier()


class TrainerLike(Protocol):
    """What is used of a `transformers.Trainer`, which TRL's trainers are too."""

    state: Any
    args: Any
    model: Any
    processing_class: Any
    create_model_card: Any

    def add_callback(self, callback: Any) -> None:  # noqa: ANN401 - transformers.TrainerCallback is heavy to import
        """Add a callback after those that are there."""
        ...

    def train(self, resume_from_checkpoint: str | None = None) -> object:
        """Train to the end, from a checkpoint's state where one is given."""
        ...

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:  # noqa: FBT001, FBT002 - its own signature
        """Write the weights; every rank calls it."""
        ...


@dataclass
class BuiltTrainer:
    """A trainer that is ready to train.

    Attributes:
        trainer: a `transformers.Trainer` or something with the same surface.
        tokenizer: it is saved with the weights.
        adapter: whether what is saved is a LoRA adapter.
        folder: where the result goes, relative to the task's folder: `final_model`, `final_lora`,
            `checkpoints/final_model` or `checkpoints/final_lora`.
    """

    trainer: TrainerLike
    tokenizer: Any
    adapter: bool
    folder: str

"""What the launcher sends to each rank, and what the first of them gives back."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from executors.contract import EnginePolicy, JsonObject
from executors.training.spec.trainer_specs import SPEC_TYPES, TrainingKind, TrainingSpec


class ResumePoint(BaseModel):
    """A checkpoint to continue from: its folder, and the optimizer steps that lie behind it."""

    model_config = ConfigDict(frozen=True)

    path: Path
    step: int


class TrainingJob(BaseModel):
    """One run of training, as every rank gets it.

    Attributes:
        sent_spec: the spec as it was sent; see `spec`.
        inputs: where the files lie that the spec asked for, by their names.
        resume: where to continue; None: from the beginning.
        identity: digest of everything that decides the weights; checkpoints are marked with it.
        batch_size: examples on one device in one step; the spec's, or less after memory ran out.
        gradient_accumulation_steps: likewise.
        ranks: how many processes train together.
        use_cpu: whether no GPU may be used.
    """

    model_config = ConfigDict(frozen=True)

    kind: TrainingKind
    task_id: str
    sent_spec: JsonObject
    out_dir: Path
    policy: EnginePolicy
    inputs: dict[str, Path] = Field(default_factory=dict)
    resume: ResumePoint | None = None
    identity: str = ""
    batch_size: int
    gradient_accumulation_steps: int
    ranks: int = 1
    use_cpu: bool = True

    @cached_property
    def spec(self) -> TrainingSpec:
        """The validated spec."""
        return SPEC_TYPES[self.kind].model_validate(self.sent_spec)

    @property
    def checkpoints_dir(self) -> Path:
        """Where the trainer writes its checkpoints."""
        return self.out_dir / "checkpoints"

    @property
    def scratch_dir(self) -> Path:
        """For files that only the run itself needs; the launcher removes it."""
        return self.out_dir / "_scratch"


class TrainingOutcome(BaseModel):
    """What a run of training has come to.

    Attributes:
        dataset_size: rows that were trained on.
        metrics: final loss, steps, epochs, tokens and the like.
        saved: the final model's folder, relative to `out_dir`; empty if nothing was saved.
        versions: of the libraries that decide the result.
        resumed_from: the checkpoint that the run really continued from.
        warnings: sentences for the person who sent the task.
    """

    model_config = ConfigDict(frozen=True)

    dataset_size: int
    model_name: str
    metrics: dict[str, float] = Field(default_factory=dict)
    saved: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    seed: int
    resumed_from: ResumePoint | None = None
    warnings: list[str] = Field(default_factory=list)

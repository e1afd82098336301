"""`training` of each kind of training, where it differs from what all share (WIRE 4.5 to 4.7)."""

from __future__ import annotations

from typing import Self

from pydantic import Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from executors.training.spec.training_options import BatchSize, Count, TrainingOptions


class SftOptions(TrainingOptions):
    """`training` of sft."""


class LoraSftOptions(TrainingOptions):
    """`training` of lora_sft."""

    learning_rate: float = Field(default=2e-4, gt=0)
    gradient_checkpointing: bool = False


class DpoOptions(TrainingOptions):
    """`training` of dpo.

    Attributes:
        beta: how strongly the model is held near the reference; higher: nearer.
    """

    learning_rate: float = Field(default=5e-7, gt=0)
    batch_size: BatchSize = 4
    save_steps: Count = 500
    beta: float = Field(default=0.1, gt=0)


class RewardOptions(TrainingOptions):
    """`training` of reward."""

    learning_rate: float = Field(default=1e-5, gt=0)
    batch_size: BatchSize = 4


class RewardedOptions(TrainingOptions):
    """What `training` of ppo and grpo share.

    Attributes:
        temperature: of sampling, where `generation.temperature` is absent.
    """

    gradient_checkpointing: bool = False
    temperature: float | None = Field(default=None, gt=0)


class PpoOptions(RewardedOptions):
    """`training` of ppo.

    Attributes:
        steps: with the batch size of one device, how many episodes there are in all; replaces `num_train_epochs`.
        num_mini_batches: into how many parts the batch of one update is split.
        mini_batch_size: accepted; `num_mini_batches` decides.
        ppo_epochs: how often one batch is gone through.
        kl_coef: how strongly the policy is held near the reference.
        max_seq_length: tokens of a prompt; longer ones are cut.
    """

    learning_rate: float = Field(default=1.41e-5, gt=0)
    batch_size: BatchSize = 1
    max_seq_length: int = Field(default=512, ge=1, le=2**24)
    steps: Count | None = None
    mini_batch_size: JsonValue = None
    num_mini_batches: BatchSize = 1
    ppo_epochs: int = Field(default=4, ge=1, le=1000)
    kl_coef: float = Field(default=0.05, gt=0)

    @model_validator(mode="after")
    def _whole_mini_batches(self) -> Self:
        if self.steps is not None and self.max_steps is not None:
            raise PydanticCustomError(
                "two_lengths",
                "steps ({steps}) and max_steps ({max_steps}) are both given; expected one of them",
                {"steps": self.steps, "max_steps": self.max_steps},
            )
        batch = self.batch_size * self.gradient_accumulation_steps
        if batch % self.num_mini_batches:
            raise PydanticCustomError(
                "mini_batches",
                "num_mini_batches is {parts}, which does not divide batch_size x gradient_accumulation_steps = {batch}",
                {"parts": self.num_mini_batches, "batch": batch},
            )
        return self

    def total_episodes(self, batch_size: int) -> int | None:
        """How many episodes `steps` asks for, with so many on one device; None: the epochs decide."""
        return self.steps * batch_size if self.steps else None


class GrpoOptions(RewardedOptions):
    """`training` of grpo.

    Attributes:
        batch_size: completions on one device in one step.
        num_generations: completions of each prompt, which are compared with each other.
        beta: how strongly the model is held near the reference; 0: not at all, and no reference is loaded.
        max_seq_length: tokens of a prompt; longer ones are left out.
    """

    learning_rate: float = Field(default=1e-6, gt=0)
    batch_size: BatchSize = 8
    num_generations: int = Field(default=8, ge=2, le=2**20)
    beta: float = Field(default=0.0, ge=0)

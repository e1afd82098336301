"""From rows to a trainer that is ready to train, for every kind of training."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from executors.training.monitoring.training_callbacks import callbacks_for
from executors.training.spec.trainer_specs import TrainingKind
from executors.training.training_run import BuiltTrainer, TrainingRun

if TYPE_CHECKING:
    from datasets import Dataset

_BUILDERS: Final[dict[TrainingKind, str]] = {
    "sft": "executors.training.trainers.sft_training:build_sft",
    "lora_sft": "executors.training.trainers.sft_training:build_sft",
    "dpo": "executors.training.trainers.preference_training:build_dpo",
    "reward": "executors.training.trainers.preference_training:build_reward",
    "ppo": "executors.training.trainers.ppo_training:build_ppo",
    "grpo": "executors.training.trainers.grpo_training:build_grpo",
}
"""What makes the trainer of each kind, as "module:function"; a run imports only its own."""


def build_trainer(run: TrainingRun, rows: Dataset) -> BuiltTrainer:
    """Make a run's trainer, with all that happens beside its steps.

    Raises:
        ExecutorError: what the task asks for cannot be trained; see the builders.
    """
    module, _, function = _BUILDERS[run.job.kind].partition(":")
    build: Callable[[TrainingRun, Dataset], BuiltTrainer] = getattr(importlib.import_module(module), function)
    built = build(run, rows)
    for callback in callbacks_for(run):
        built.trainer.add_callback(callback)
    built.trainer.create_model_card = _no_card
    return built


def _no_card(*_: object, **__: object) -> None:
    """TRL writes a card of its own with each checkpoint; ours goes with the final model."""

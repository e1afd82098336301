"""Starts a trainer, from a checkpoint where the job names one; that may be of another task."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

from executors.errors import BadSpecError, ExecutorError
from executors.safetensors_headers import read_json_object
from executors.training.saving.run_checkpoints import MOST_STATE_BYTES, TRAINER_STATE
from executors.training.training_results import last_logged
from executors.training.training_run import TrainingRun

if TYPE_CHECKING:
    from pathlib import Path

_LONGEST_TEXT: Final = 400


def start_training(run: TrainingRun, trainer: Any) -> None:  # noqa: ANN401 - any trainer of TRL
    """Call a trainer's `train`.

    Raises:
        BadSpecError: `training.resume_from_path` is a checkpoint that does not fit the model or the optimizer.
    """
    point = run.job.resume
    if point is None:
        trainer.train()
        return
    _restore_token_count(trainer, point.path)
    begun: list[bool] = []
    trainer.callback_handler.callbacks.insert(0, _on_begin(begun))  # before any that may raise
    try:
        trainer.train(resume_from_checkpoint=str(point.path))
    except Exception as error:  # loading raises many kinds; those that are about the checkpoint are told so
        if begun or point.path.is_relative_to(run.job.checkpoints_dir) or not _is_about_checkpoint(error):
            raise
        raise BadSpecError(
            f"spec.training.resume_from_path is {str(point.path)!r}, which does not fit this task: "
            f"{' '.join(str(error).split())[:_LONGEST_TEXT]}",
            hint="Resume with the model, the lora section and the options of the run that wrote it; to start from its "
            "weights alone use checkpoint.load.",
        ) from error


def _is_about_checkpoint(error: Exception) -> bool:
    import torch

    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return False
    return not isinstance(error, MemoryError | torch.OutOfMemoryError | torch.AcceleratorError | ExecutorError)


def _on_begin(begun: list[bool]) -> Any:  # noqa: ANN401 - transformers.TrainerCallback
    """A callback that notes when everything is loaded."""
    from transformers import TrainerCallback

    class Begin(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: object, **_others: object) -> None:
            begun.append(True)

    return Begin()


def _restore_token_count(trainer: Any, checkpoint: Path) -> None:  # noqa: ANN401 - any trainer of TRL
    """TRL counts the tokens of one process; the run's count goes on from the checkpoint's."""
    name = "_total_train_tokens"
    if hasattr(trainer, name):
        logged = read_json_object(checkpoint / TRAINER_STATE, MOST_STATE_BYTES).get("log_history")
        setattr(trainer, name, int(last_logged(logged if isinstance(logged, list) else [], ("num_tokens",)) or 0))

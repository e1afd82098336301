"""TRL's PPO trainer with what it lacks: it resumes, saves the policy alone, draws by its seed, stops when asked."""

from __future__ import annotations

import gc
import math
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from executors.training.trainers.ppo_batches import SeededBatches, StoppedError
from executors.training.trainers.ppo_checkpoints import restore_checkpoint, write_checkpoint

if TYPE_CHECKING:
    Base = Any
else:
    Base = object
"""What the classes here are mixed with is heavy to import; see `ppo_trainer_type`."""

_SEEDS_APART: Final = 100_003
"""So far apart are the seeds of two ranks, as in TRL."""


def load_trl_ppo() -> Any:  # noqa: ANN401 - a module of a heavy library
    """Import TRL's module of PPO, without the notice that it is experimental: TRL is held at one release."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*trl.experimental.*")
        from trl.experimental import ppo
    return ppo


@cache
def ppo_trainer_type() -> Any:  # noqa: ANN401 - a class whose base is heavy to import
    """Return the class of the trainer: `RestartablePpo` on top of `trl.experimental.ppo.PPOTrainer`."""
    return type("RestartablePpoTrainer", (RestartablePpo, load_trl_ppo().PPOTrainer), {})


class RestartablePpo(Base):  # type: ignore[misc]
    """Trains a policy, with TRL's steps.

    Args:
        batches: the prompts.
        generation_config: the policy's, as it is to be saved; while it is trained it has one for sampling.
        more: see `trl.experimental.ppo.PPOTrainer`.
    """

    control: Any

    def __init__(self, *, batches: SeededBatches, generation_config: Any, **more: Any) -> None:  # noqa: ANN401
        from transformers import TrainerCallback

        self._counts = type("Counts", (Counts, TrainerCallback), {})(len(batches))
        self._saved_generation = generation_config
        self._tokens_counted = 0
        super().__init__(callbacks=[self._counts], **more)
        batches.stopped = lambda: self.control.should_training_stop
        self.dataloader = batches
        # TRL would add up the gradients of several mini batches before a step.
        parts = math.ceil(self.args.local_mini_batch_size / self.args.per_device_train_batch_size)
        self.accelerator.gradient_accumulation_steps = self.args.gradient_accumulation_steps = parts
        inner = self.accelerator.unwrap_model(self.model)
        if inner is not self.model:  # TRL asks the wrapper, which several ranks have around the model
            object.__setattr__(self.model, "policy", inner.policy)  # not as a second part of it

    def train(self, resume_from_checkpoint: str | None = None) -> Any:  # noqa: ANN401 - a type of a heavy library
        """Train to the end.

        Args:
            resume_from_checkpoint: folder of the checkpoint to go on from.

        Raises:
            BadSpecError: the checkpoint is of another kind of run.
        """
        from transformers import set_seed
        from transformers.trainer_utils import TrainOutput

        total = self.args.num_total_batches
        set_seed(self.args.seed + self.accelerator.process_index * _SEEDS_APART)
        before = restore_checkpoint(self, Path(resume_from_checkpoint)) if resume_from_checkpoint else None
        done = min(before.global_step, total) if before else 0
        self._counts.begin(before, total)
        self.dataloader.first = done
        self.args.num_total_batches = total - done  # TRL counts them from 1
        gc.freeze()  # TRL collects garbage twice in a step; without what is loaded by now that takes no time
        try:
            super().train()
        except StoppedError:
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        finally:
            gc.unfreeze()
            self.args.num_total_batches = total
        losses = [entry["loss/policy_avg"] for entry in self.state.log_history if "loss/policy_avg" in entry]
        return TrainOutput(self.state.global_step, sum(losses) / len(losses) if losses else 0.0, {})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what is a number, and the tokens; episodes per second count from the resume."""
        if "episode" in logs:
            logs["num_tokens"] = self._count_tokens()
        if "eps" in logs and self.state.episode:
            logs["eps"] *= 1 - self._counts.episodes_before / self.state.episode
        if math.isnan(logs.get("val/ratio_var", 0.0)):  # where a step has one part, there is no variance
            del logs["val/ratio_var"]
        super().log(logs, start_time)

    def _count_tokens(self) -> int:
        """Tokens of prompts and answers that all ranks have trained on; every rank calls it."""
        import torch

        judged = self.reward_model.backbone.tokens
        new = torch.tensor([judged - self._tokens_counted], device=self.accelerator.device)
        self._tokens_counted = judged
        self.state.num_input_tokens_seen += int(self.accelerator.gather(new).sum())
        return int(self.state.num_input_tokens_seen)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:  # noqa: FBT001, FBT002 - its own signature
        """Save the policy alone: a model or an adapter. Only the first rank writes."""
        del _internal_call
        if not self.accelerator.is_main_process:
            return
        sampling = self.policy_model.generation_config
        self.policy_model.generation_config = self._saved_generation
        try:
            self.policy_model.save_pretrained(output_dir or self.args.output_dir)
        finally:
            self.policy_model.generation_config = sampling

    def _save_checkpoint(self, model: Any, trial: Any) -> None:  # noqa: ANN401 - types of heavy libraries
        del model, trial
        write_checkpoint(self, Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")


class Counts:
    """A callback that gives the trainer its true counts, which TRL sets to zero, and saves at an epoch's end.

    Args:
        rows: how many the data set has.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._before: Any = None
        self._total = 0

    @property
    def episodes_before(self) -> int:
        """Episodes that lie behind the checkpoint that the run goes on from."""
        return self._before.episode if self._before else 0

    def begin(self, before: Any, total: int) -> None:  # noqa: ANN401 - trl's OnlineTrainerState
        """Say what holds from the next beginning on: the state to go on from, and the number of all steps."""
        self._before = before
        self._total = total

    def on_train_begin(self, args: Any, state: Any, control: Any, **_others: Any) -> None:  # noqa: ANN401
        """Set the counts, after TRL has set them to zero."""
        del args, control
        state.max_steps = self._total
        if self._before:
            for name in ("global_step", "episode", "epoch", "log_history", "num_input_tokens_seen"):
                setattr(state, name, getattr(self._before, name))

    def on_step_end(self, args: Any, state: Any, control: Any, **_others: Any) -> Any:  # noqa: ANN401
        """Ask for a checkpoint where `save_strategy` is `epoch`."""
        ended = state.episode // self._rows > (state.episode - args.batch_size) // self._rows
        if args.save_strategy == "epoch" and (ended or state.global_step >= state.max_steps):
            control.should_save = True
        return control

"""What happens beside the steps of a training run.

Progress, the metrics file, marks on checkpoints, trackers, the loss curve, and an end when the loss is no number.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from executors.errors import DivergedError
from executors.training.monitoring.loss_curve import METRICS_FILE, draw_curve
from executors.training.monitoring.trackers import SafeTracker, trackers_for
from executors.training.saving.resuming import start_training
from executors.training.saving.run_checkpoints import last_complete, mark_complete
from executors.training.training_results import last_logged
from executors.training.training_run import BuiltTrainer, TrainingRun

if TYPE_CHECKING:
    import torch
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SHOWN: Final = {
    "loss": ("loss", "loss/policy_avg"),
    "learning_rate": ("learning_rate", "lr"),
    "grad_norm": ("grad_norm",),
    "epoch": ("epoch",),
    "reward": ("reward", "objective/scores"),
    "reward_margin": ("rewards/margins", "margin"),
    "accuracy": ("mean_token_accuracy", "rewards/accuracies", "accuracy"),
    "kl": ("kl", "objective/kl"),
}
"""Metrics that go into the progress, each with its names in TRL's trainers."""

_MUST_BE_FINITE: Final = frozenset({"loss", "train_loss", "grad_norm", "reward", "kl"})
_MUST_BE_FINITE_BELOW: Final = ("objective/", "loss/")
_SUMMARY: Final = "train_runtime"
"""Only the line that a trainer logs at its end has this."""

_SECONDS_BETWEEN_NEWS: Final = 0.5
_SECONDS_OF_SILENCE: Final = 10.0


def callbacks_for(run: TrainingRun) -> list[TrainerCallback]:
    """The callbacks of one rank, in the order in which they are to be added."""
    from transformers import TrainerCallback

    watchers: list[_Watcher] = [_DivergenceGuard(run), _CheckpointMarks(run)]
    if run.is_first:
        watchers += [_MetricsFile(run), _ProgressNews(run), _TrackerNews(run), _LossCurve(run)]
    watchers.append(_EndOfTraining(run))
    # The trainer calls every event of a callback: `_Events` has those that we want, the base class all others.
    return [type("RunCallback", (_Events, TrainerCallback), {})(watchers)]


def train_to_end(run: TrainingRun, built: BuiltTrainer) -> None:
    """Train to the last step, from the checkpoint that the job names. All ranks call it, with `callbacks_for` added.

    Raises:
        BadSpecError: `training.resume_from_path` is a checkpoint that does not fit this task.
        DivergedError: the loss, or something else that has to be, is not a finite number.
    """
    try:
        start_training(run, built.trainer)
    except AlreadyAtEndError:
        run.tell.log("info", "the checkpoint is of the last step: nothing is left to train")
        state = built.trainer.state
        if run.is_first and state.global_step > state.max_steps:
            run.tell.warn(
                f"nothing was trained: the checkpoint is of step {state.global_step}, and the task asks for "
                f"{state.max_steps} steps"
            )


class AlreadyAtEndError(Exception):
    """Ends `train` when its checkpoint is of the last step, which the trainer itself would go beyond."""


class _Watcher:
    """Base of what looks at a training; each method is one moment of it."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run

    def begins(self, state: TrainerState) -> None:
        """The first step is about to begin; `state` is the checkpoint's where there is one."""

    def stepped(self, state: TrainerState) -> None:
        """An optimizer step is done."""

    def accumulated(self, state: TrainerState) -> None:
        """One of the batches of an optimizer step is done."""

    def saves(self, state: TrainerState, model: torch.nn.Module) -> None:
        """A checkpoint is about to be written."""

    def saved(self, state: TrainerState) -> None:
        """This rank has written its part of a checkpoint."""

    def logged(self, state: TrainerState, logs: Mapping[str, object], args: TrainingArguments) -> None:
        """There are metrics."""

    def ends(self, state: TrainerState, model: torch.nn.Module) -> None:
        """The last step is done."""


class _Events:
    """Turns the trainer's events into those of our watchers."""

    def __init__(self, watchers: Sequence[_Watcher]) -> None:
        self._watchers = watchers

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, _control: object, **_others: object) -> None:
        state.compute_steps(args, state.max_steps)  # a checkpoint brings those of the run that wrote it
        for watcher in self._watchers:
            watcher.begins(state)

    def on_step_end(
        self,
        _args: object,
        state: TrainerState,
        control: TrainerControl,
        **others: Any,  # noqa: ANN401 - the trainer's parts
    ) -> TrainerControl:
        for watcher in self._watchers:
            watcher.stepped(state)
        return self._before_save(state, control, others["model"])

    def on_substep_end(self, _args: object, state: TrainerState, _control: object, **_others: object) -> None:
        for watcher in self._watchers:
            watcher.accumulated(state)

    def on_epoch_end(
        self,
        _args: object,
        state: TrainerState,
        control: TrainerControl,
        **others: Any,  # noqa: ANN401
    ) -> TrainerControl:
        return self._before_save(state, control, others["model"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        _control: object,
        logs: Mapping[str, object],
        **_others: object,
    ) -> None:
        for watcher in self._watchers:
            watcher.logged(state, logs, args)

    def on_save(self, _args: object, state: TrainerState, _control: object, **_others: object) -> None:
        for watcher in self._watchers:
            watcher.saved(state)

    def on_train_end(
        self,
        _args: object,
        state: TrainerState,
        _control: object,
        **others: Any,  # noqa: ANN401
    ) -> None:
        for watcher in self._watchers:
            watcher.ends(state, others["model"])

    def _before_save(self, state: TrainerState, control: TrainerControl, model: torch.nn.Module) -> TrainerControl:
        """Have metrics logged, and so looked at, before each save and at the end."""
        if control.should_save or control.should_training_stop:
            control.should_log = True
        if control.should_save:
            for watcher in self._watchers:
                watcher.saves(state, model)
        return control


class _DivergenceGuard(_Watcher):
    """Ends the training when a metric or a weight is not a finite number, and before a checkpoint holds it."""

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self._bad_weight = ""
        self._finite_up_to = 0

    def begins(self, state: TrainerState) -> None:
        self._finite_up_to = state.global_step

    def logged(self, state: TrainerState, logs: Mapping[str, object], args: TrainingArguments) -> None:
        for name, value in logs.items():
            if not (name in _MUST_BE_FINITE or name.startswith(_MUST_BE_FINITE_BELOW)):
                continue
            if name == "grad_norm" and args.fp16:
                continue  # the loss scaler skips such steps and goes on with a smaller scale
            if isinstance(value, float) and not math.isfinite(value):
                self._stop(state, f"{name} is {value}", _first_number(logs, _SHOWN["learning_rate"]))
        if self._bad_weight:
            self._stop(state, self._bad_weight)
        self._finite_up_to = state.global_step

    def saves(self, state: TrainerState, model: torch.nn.Module) -> None:
        self._bad_weight = _bad_weight(model)
        # Where the metrics of this step are still to come, they tell more; `logged` is called before the save then.
        if self._bad_weight and state.log_history and state.log_history[-1].get("step") == state.global_step:
            self._stop(state, self._bad_weight)

    def ends(self, state: TrainerState, model: torch.nn.Module) -> None:
        self._bad_weight = _bad_weight(model)
        if self._bad_weight:
            self._stop(state, self._bad_weight)

    def _stop(self, state: TrainerState, what: str, learning_rate: float | None = None) -> NoReturn:
        rate = self._run.spec.training.learning_rate if learning_rate is None else learning_rate
        if self._run.is_first:
            draw_curve(self._run)
        raise DivergedError(
            f"the training diverged at step {state.global_step} of {state.max_steps}: {what}; "
            f"expected a finite number (learning rate {rate:g}; {self._kept()})",
            hint="Lower training.learning_rate or raise training.warmup_steps; with fp16 try bf16; "
            "look for rows that are empty or damaged.",
        )

    def _kept(self) -> str:
        """Name the last good checkpoint: the step after it had finite metrics, so it is not its weights that failed."""
        job = self._run.job
        last = last_complete(job.checkpoints_dir, job.identity)
        good = last_complete(job.checkpoints_dir, job.identity, below=self._finite_up_to)
        if last is None:
            return "no checkpoint had been written before"
        if good == last:
            return f"the last good checkpoint is {good.path}"
        doubt = "but no finite loss was seen after it"
        if good is None:
            return f"the only whole checkpoint is {last.path}, {doubt}"
        return f"the last good checkpoint is {good.path}; {last.path.name} is newer, {doubt}"


class _CheckpointMarks(_Watcher):
    """Marks each checkpoint as whole once every rank has written its part."""

    def saved(self, state: TrainerState) -> None:
        job = self._run.job
        self._run.wait_for_all()
        if self._run.is_first:
            mark_complete(job.checkpoints_dir / f"checkpoint-{state.global_step}", job.identity, state.global_step)
        self._run.wait_for_all()


class _MetricsFile(_Watcher):
    """Writes `artifacts/metrics.jsonl`: an object with `step` for each time the trainer logs."""

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self._path = run.artifacts_dir / METRICS_FILE

    def begins(self, state: TrainerState) -> None:
        """Drop what an earlier try wrote of steps that are done again."""
        temporary = self._path.with_name(f".{METRICS_FILE}.new")
        temporary.write_bytes(b"".join(_lines_up_to(self._path, state.global_step)))
        temporary.replace(self._path)

    def logged(self, state: TrainerState, logs: Mapping[str, object], args: TrainingArguments) -> None:
        del args
        line = json.dumps({"step": state.global_step, **_numbers(logs)}, allow_nan=False)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class _ProgressNews(_Watcher):
    """Reports step, total and the metrics that people look at."""

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self._metrics: dict[str, float] = {}
        self._started = self._counted = time.monotonic()
        self._first_step = 0
        self._tokens = 0.0
        self._told = -math.inf

    def begins(self, state: TrainerState) -> None:
        self._started = self._counted = time.monotonic()
        self._first_step = state.global_step
        self._tokens = last_logged(state.log_history, ("num_tokens",)) or 0.0
        self._tell(state, f"continues after step {state.global_step}" if state.global_step else "training begins")

    def stepped(self, state: TrainerState) -> None:
        if time.monotonic() - self._told >= _SECONDS_BETWEEN_NEWS:
            self._tell(state)

    def accumulated(self, state: TrainerState) -> None:
        if time.monotonic() - self._told >= _SECONDS_OF_SILENCE:  # a long step must not look like a hang
            self._tell(state)

    def logged(self, state: TrainerState, logs: Mapping[str, object], args: TrainingArguments) -> None:
        del args
        if _SUMMARY in logs:  # its numbers are of the whole run
            return
        for shown, names in _SHOWN.items():
            value = _first_number(logs, names)
            if value is not None:
                self._metrics[shown] = value
        tokens = _first_number(logs, ("num_tokens", "num_input_tokens_seen"))
        if tokens is not None:
            now = time.monotonic()
            if now > self._counted and tokens > self._tokens:
                self._metrics["tokens_per_sec"] = (tokens - self._tokens) / (now - self._counted)
            self._tokens, self._counted = tokens, now
        self._tell(state)

    def _tell(self, state: TrainerState, message: str = "") -> None:
        self._told = time.monotonic()
        done = state.global_step - self._first_step
        metrics = dict(self._metrics)
        if done > 0:
            metrics["eta_sec"] = (self._told - self._started) / done * max(state.max_steps - state.global_step, 0)
        self._run.tell.progress(state.global_step, state.max_steps, metrics, message)


class _TrackerNews(_Watcher):
    """Passes what is logged on to the trackers of `training.report_to`."""

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self._trackers: list[SafeTracker] = []

    def begins(self, state: TrainerState) -> None:
        self._trackers = trackers_for(self._run, state.global_step)

    def logged(self, state: TrainerState, logs: Mapping[str, object], args: TrainingArguments) -> None:
        del args
        numbers = _numbers(logs)
        for tracker in self._trackers:
            tracker.log(state.global_step, numbers)

    def ends(self, state: TrainerState, model: torch.nn.Module) -> None:
        del state, model
        for tracker in self._trackers:
            tracker.close()


class _LossCurve(_Watcher):
    """Draws the loss curve at the end."""

    def ends(self, state: TrainerState, model: torch.nn.Module) -> None:
        del state, model
        draw_curve(self._run)


class _EndOfTraining(_Watcher):
    """Comes last: ends a training that has no step left, once the checkpoint's weights are loaded."""

    def begins(self, state: TrainerState) -> None:
        if self._run.job.resume and state.global_step >= state.max_steps:
            if self._run.is_first:
                draw_curve(self._run)
            raise AlreadyAtEndError


def _bad_weight(model: torch.nn.Module) -> str:
    """Says which trained weight holds something that is no number; empty if none does."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and not weight.detach().isfinite().all():
            return f"the weight {name} holds a value that is no number"
    return ""


def _numbers(logs: Mapping[str, object]) -> dict[str, float]:
    """The finite numbers of a log; JSON has no others."""
    return {
        name: value
        for name, value in logs.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _first_number(logs: Mapping[str, object], names: tuple[str, ...]) -> float | None:
    numbers = _numbers({name: logs[name] for name in names if name in logs})
    return next(iter(numbers.values()), None)


def _lines_up_to(path: Path, step: int) -> list[bytes]:
    """The lines of a metrics file up to a step, without the summary of a run and without a line that was cut off."""
    kept = []
    for line in path.read_bytes().splitlines() if step and path.exists() else []:
        try:
            found = json.loads(line)
        except ValueError:  # the line that was being written when its process was killed
            continue
        logged = found.get("step") if isinstance(found, dict) and _SUMMARY not in found else None
        if isinstance(logged, int) and logged <= step:
            kept.append(line + b"\n")
    return kept

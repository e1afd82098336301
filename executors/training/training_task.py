"""`taskType: sft`, `lora_sft`, `dpo`, `ppo`, `grpo` and `reward` (WIRE 4.4 to 4.7).

The engine process only launches: the training itself runs in processes of its own
(`executors.training.ranks.rank_process`).
"""

from __future__ import annotations

import os
import shutil
import time
from typing import TypeVar

from executors.contract import Executor, ExecutorTask, Failure, TaskOutput
from executors.failure_report import ReportedFailureError
from executors.training.device_plan import DevicePlan, plan_devices
from executors.training.out_of_memory import memory_failure, retry_warning, smaller_job
from executors.training.ranks.rank_command import rank_command
from executors.training.ranks.rank_group import RankGroup, RanksOutOfMemoryError
from executors.training.saving.final_model import drop_unfinished
from executors.training.saving.run_checkpoints import identity_of, prepare_resume
from executors.training.spec.trainer_specs import (
    DpoSpec,
    GrpoSpec,
    LoraSftSpec,
    PpoSpec,
    RewardSpec,
    SftSpec,
    TrainingSpec,
    spec_warnings,
)
from executors.training.training_job import TrainingJob, TrainingOutcome
from executors.training.training_results import output_of

SpecT = TypeVar("SpecT", bound=TrainingSpec)


class TrainingTask(Executor[SpecT]):
    """What all kinds of training do. Its engine loads nothing, and is exclusive for the ranks' sake."""

    exclusive = True

    @classmethod
    def engine_key(cls, spec: SpecT) -> str:
        """The same for all: what a training loads is gone when it ends."""
        del spec
        return "training"

    def run(self, task: ExecutorTask[SpecT]) -> TaskOutput:
        """Train in processes of their own, and tell what came of it.

        Raises:
            BadSpecError: the spec asks for devices or checkpoints that are not there.
            TaskCancelledError: the task was asked to stop.
            ReportedFailureError: what a rank has told.
        """
        cores = len(os.sched_getaffinity(0))
        plan = plan_devices(task.spec, task.policy, cores=cores)
        task.report.log("info", f"training on {plan.why}")
        warnings = [*spec_warnings(task.spec, task.policy), *plan.warnings]
        began = time.monotonic()
        job, outcome = _train(_job_of(task, plan), plan, task, warnings, cores)
        return output_of(job, plan, outcome, seconds=time.monotonic() - began, warnings=warnings)


def _job_of(task: ExecutorTask[SpecT], plan: DevicePlan) -> TrainingJob:
    spec = task.spec
    # Where results go may hold a secret, and is no rank's business.
    sent = {key: value for key, value in task.sent_spec.items() if key not in {"output", "_upstreamResults"}}
    return TrainingJob(
        kind=spec.kind,
        task_id=task.task_id,
        sent_spec=sent,
        out_dir=task.out_dir,
        policy=task.policy,
        inputs=dict(task.inputs),
        identity=identity_of(spec, task.inputs, task.policy, ranks=plan.ranks),
        batch_size=spec.training.batch_size,
        gradient_accumulation_steps=spec.training.gradient_accumulation_steps,
        ranks=plan.ranks,
        use_cpu=plan.use_cpu,
    )


def _train(
    job: TrainingJob, plan: DevicePlan, task: ExecutorTask[SpecT], warnings: list[str], cores: int
) -> tuple[TrainingJob, TrainingOutcome]:
    """Train, and once more with a smaller batch where memory ran out and the spec wants that.

    Returns:
        The job that succeeded, and what came of it.
    """
    try:
        return job, _run_ranks(job, plan, task, cores)
    except RanksOutOfMemoryError as error:
        failure = memory_failure(error, job)
        smaller = smaller_job(job)
        if not job.spec.training.oom_retry or smaller is None:
            raise ReportedFailureError(failure) from error
    warning = retry_warning(job, smaller)
    task.report.log("warning", f"{warning}; {failure.message}")
    warnings.append(warning)
    try:
        return smaller, _run_ranks(smaller, plan, task, cores)
    except RanksOutOfMemoryError as error:
        raise ReportedFailureError(memory_failure(error, smaller)) from error
    except ReportedFailureError as error:
        if error.failure.reason != "bad_spec":
            raise
        raise ReportedFailureError(_not_smaller(failure, error.failure)) from error


def _not_smaller(failure: Failure, refused: Failure) -> Failure:
    """The spec suits its own batch but not half of it: then the lack of memory is what its sender has to hear."""
    message = f"{failure.message}; a second try with half the batch is not possible: {refused.message}"
    return failure.model_copy(update={"message": message})


def _run_ranks(job: TrainingJob, plan: DevicePlan, task: ExecutorTask[SpecT], cores: int) -> TrainingOutcome:
    _drop_links(job)
    decision = prepare_resume(job.out_dir, job.identity, task.spec, job.policy)
    if decision.note:
        task.report.log("info", decision.note)
    logs = job.out_dir / "logs"
    logs.mkdir(exist_ok=True)
    _tidy(job)  # after a run that was cut off
    try:
        group = RankGroup(
            lambda address: rank_command(plan, address, cores=cores),
            job.ranks,
            job.model_copy(update={"resume": decision.point}),
            logs,
            task.report,
        )
        return group.run()
    finally:
        _tidy(job)


def _tidy(job: TrainingJob) -> None:
    shutil.rmtree(job.scratch_dir, ignore_errors=True)
    drop_unfinished(job.out_dir)


def _drop_links(job: TrainingJob) -> None:
    """Nothing is written, or removed, behind a link that somebody has put into the task's folder."""
    for folder in (job.checkpoints_dir, job.scratch_dir):
        if folder.is_symlink():
            folder.unlink()


class SftTraining(TrainingTask[SftSpec]):
    """Supervised fine-tuning of all weights."""

    spec_type = SftSpec


class LoraSftTraining(TrainingTask[LoraSftSpec]):
    """Supervised fine-tuning of a LoRA adapter."""

    spec_type = LoraSftSpec


class DpoTraining(TrainingTask[DpoSpec]):
    """Direct preference optimisation."""

    spec_type = DpoSpec


class PpoTraining(TrainingTask[PpoSpec]):
    """Proximal policy optimisation against a reward."""

    spec_type = PpoSpec


class GrpoTraining(TrainingTask[GrpoSpec]):
    """Group-relative policy optimisation against a reward."""

    spec_type = GrpoSpec


class RewardTraining(TrainingTask[RewardSpec]):
    """Training of a reward model on preferences."""

    spec_type = RewardSpec

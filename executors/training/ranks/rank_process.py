"""One rank of a training: `python -m executors.training.ranks.rank_process SOCKET RANK`.

It takes its job from the launcher, trains together with the other ranks, and says how that ended. What it prints is in
the task's `logs/rank<N>.log`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Final

from executors.contract import Failure
from executors.errors import ExecutorError
from executors.failure_report import ReportedFailureError, verdict_on
from executors.training.monitoring.training_callbacks import train_to_end
from executors.training.ranks.rank_channel import RankChannel, finite
from executors.training.ranks.rank_logs import log_name
from executors.training.ranks.rank_messages import RankDone, RankFailed
from executors.training.rows.training_rows import read_rows
from executors.training.saving.final_model import save_final
from executors.training.trainers.trainer_building import build_trainer
from executors.training.training_job import TrainingJob, TrainingOutcome
from executors.training.training_results import library_versions, train_metrics
from executors.training.training_run import TrainingRun

_NO_MEMORY: Final = frozenset({"gpu_oom", "host_oom"})


def main() -> None:
    """Do one rank's part."""
    rank = int(sys.argv[2])
    channel = RankChannel(sys.argv[1], rank)
    job = channel.job()
    status = 0
    try:
        _print_to(job.out_dir / "logs" / log_name(rank), f"rank {rank} of {job.ranks}, pid {os.getpid()}")
        faulthandler.enable()
        outcome = train(job, rank, channel)
        channel.send(RankDone(outcome=outcome if rank == 0 else None))
    except Exception as error:  # noqa: BLE001 - it becomes the task's failure; all ranks end with it
        if not isinstance(error, ExecutorError):
            _print_traceback()
        channel.send(_failed(error, job, rank))
        if job.ranks > 1:  # torchrun might take the end of this rank for the cause, and not that of another
            channel.wait_for_launcher()
        status = 1
    else:
        _leave_group()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)  # the ordinary way waits for threads that libraries leave behind


def train(job: TrainingJob, rank: int, channel: RankChannel) -> TrainingOutcome:
    """Read the rows, build the trainer, train and save."""
    from transformers import set_seed

    spec = job.spec
    _find_gpu(job)
    set_seed(spec.training.seed)
    run = TrainingRun(job=job, spec=spec, rank=rank, world_size=job.ranks, tell=channel)
    scratch = job.scratch_dir / f"rank{rank}"
    scratch.mkdir(parents=True, exist_ok=True)
    rows = read_rows(run, scratch)
    built = build_trainer(run, rows)
    channel.log("info", f"rank {rank}: {len(rows)} rows, training begins")
    train_to_end(run, built)
    save_final(run, built)
    run.wait_for_all()  # nobody leaves before everything is written
    return TrainingOutcome(
        dataset_size=len(rows),
        model_name=spec.model_name,
        metrics=finite(train_metrics(built.trainer.state)),
        saved=built.folder if spec.training.save_model else "",
        versions=library_versions(),
        seed=spec.training.seed,
        resumed_from=job.resume,
    )


def _print_to(file: Path, title: str) -> None:
    """From now on what this process and its children print goes to a file, heavy imports included."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    print(f"--- {time.strftime('%Y-%m-%dT%H:%M:%S%z')} {title}", flush=True)  # noqa: T201 - the log's own headline


def _print_traceback() -> None:
    with contextlib.suppress(OSError):  # the log's disk may be full, which must not hide what happened
        traceback.print_exc()


def _find_gpu(job: TrainingJob) -> None:
    """See that the GPUs of the plan are there: a trainer would go on without them on the CPU.

    Raises:
        ReportedFailureError: fewer are there.
    """
    if job.use_cpu:
        return
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < job.ranks:
        raise ReportedFailureError(
            Failure(
                reason="gpu_fault",
                message=f"torch {torch.__version__} finds {found} of the {job.ranks} GPUs given to this training",
                hint="run `flowmesh-worker doctor` on the worker, or send the task with enforce_cpu: true",
                retryable=True,
            )
        )


def _failed(error: Exception, job: TrainingJob, rank: int) -> RankFailed:
    failure = verdict_on(error).failure
    hint = failure.hint.replace("logs/engine.log", f"logs/{log_name(rank)}")
    if failure.reason == "executor_error" and (given := job.spec.training.trl):  # words that TRL reads only as it goes
        hint = f"{hint}; the task sets training.trl ({', '.join(sorted(given))}): check these values"
    return RankFailed(
        failure=failure.model_copy(update={"hint": hint}),
        foreseen=isinstance(error, ExecutorError),
        out_of_memory=failure.reason in _NO_MEMORY,
        memory={} if job.use_cpu else _gpu_memory(),
    )


def _gpu_memory() -> dict[str, float]:
    """Bytes of this rank's GPU; empty where torch does not say."""
    try:
        import torch

        return {
            "allocated": float(torch.cuda.max_memory_allocated()),
            "reserved": float(torch.cuda.memory_reserved()),
            "total": float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory),
        }
    except Exception:  # noqa: BLE001 - the context is broken, or there is none; the failure is told without numbers
        return {}


def _leave_group() -> None:
    import torch.distributed as ranks

    try:
        if ranks.is_available() and ranks.is_initialized():
            ranks.destroy_process_group()
    except Exception:  # noqa: BLE001 - it is in the log; everything is saved and said
        _print_traceback()


if __name__ == "__main__":
    main()

"""What is said, and done, when a training runs out of memory."""

from __future__ import annotations

from collections.abc import Mapping

from executors.contract import Failure
from executors.gpu_memory import gib
from executors.training.ranks.rank_group import RanksOutOfMemoryError
from executors.training.spec.trainer_specs import TrainingSpec
from executors.training.training_job import TrainingJob


def memory_failure(error: RanksOutOfMemoryError, job: TrainingJob) -> Failure:
    """The failure with the numbers that decided it, and what to lower."""
    options = job.spec.training
    told = error.failure
    where = "the host's memory ran out" if told.reason == "host_oom" else "GPU memory ran out"
    amounts = _amounts(error.memory)
    message = (
        f"{where} in rank {error.rank} with training.batch_size {job.batch_size}, "
        f"gradient_accumulation_steps {job.gradient_accumulation_steps} and max_seq_length {options.max_seq_length}"
        f"{f' ({amounts})' if amounts else ''}: {told.message}"
    )
    return told.model_copy(update={"message": message, "hint": _hint(job)})


def smaller_job(job: TrainingJob) -> TrainingJob | None:
    """The same training with half the batch and doubled accumulation; None if there is nothing to halve.

    An odd batch is split into more parts: a step takes as many examples as before, so that the steps stay the same and
    a checkpoint of the first try fits.
    """
    if job.batch_size == 1:
        return None
    parts = next(number for number in range(2, job.batch_size + 1) if job.batch_size % number == 0)
    return job.model_copy(
        update={
            "batch_size": job.batch_size // parts,
            "gradient_accumulation_steps": job.gradient_accumulation_steps * parts,
        }
    )


def retry_warning(failed: TrainingJob, smaller: TrainingJob) -> str:
    """What the sender hears of the second try."""
    return (
        f"memory ran out with training.batch_size {failed.batch_size}: tried again with batch_size "
        f"{smaller.batch_size} and gradient_accumulation_steps {smaller.gradient_accumulation_steps} (oom_retry)"
    )


def _amounts(memory: Mapping[str, float]) -> str:
    if not memory.get("total"):
        return ""
    allocated, reserved, total = (gib(int(memory.get(name, 0))) for name in ("allocated", "reserved", "total"))
    return f"{allocated} GiB allocated at most, {reserved} GiB reserved, of {total} GiB"


def _hint(job: TrainingJob) -> str:
    """What to lower or to switch on; nothing that is lowest or on already."""
    spec = job.spec
    options = spec.training
    ways = []
    if job.batch_size > 1:
        ways.append("lower training.batch_size and raise training.gradient_accumulation_steps in return")
    ways.append("lower training.max_seq_length")
    if not options.gradient_checkpointing:
        ways.append("set training.gradient_checkpointing")
    if not options.bf16 and not job.use_cpu:
        ways.append("set training.bf16")
    if way := _lora_way(spec):
        ways.append(way)
    if job.batch_size > 1 and not options.oom_retry:
        ways.append("set training.oom_retry, which tries once more with half the batch")
    return "; ".join(ways)


def _lora_way(spec: TrainingSpec) -> str:
    if spec.uses_lora:
        return ""
    return "send it as lora_sft, which trains an adapter only" if spec.kind == "sft" else "give lora options"

"""On which devices a training runs, and with how many processes (WIRE 8; `gpu.count` caps always, 9.41)."""

from __future__ import annotations

from dataclasses import dataclass

from executors.contract import EnginePolicy
from executors.errors import BadSpecError
from executors.training.spec.trainer_specs import TrainingSpec


@dataclass(frozen=True)
class DevicePlan:
    """Where a training runs.

    Attributes:
        ranks: how many processes train together, one on each GPU.
        gpus: names of the GPUs, as many as there are ranks; empty: the CPU.
        why: one sentence for people.
        warnings: sentences for the person who sent the task.
        grouped: whether the ranks form a group even where there is only one.
    """

    ranks: int
    gpus: tuple[str, ...]
    why: str
    warnings: tuple[str, ...] = ()
    grouped: bool = False

    @property
    def use_cpu(self) -> bool:
        """Whether no GPU may be used."""
        return not self.gpus

    @property
    def cuda_visible_devices(self) -> str:
        """The variable of that name for the ranks; empty hides every GPU."""
        return ",".join(self.gpus)


def plan_devices(spec: TrainingSpec, policy: EnginePolicy, *, cores: int) -> DevicePlan:
    """Choose the devices.

    Args:
        spec: the task's spec.
        policy: names the GPUs that engines may use.
        cores: CPU cores that may be used; on the CPU there are at most as many processes.

    Raises:
        BadSpecError: it asks for devices that are not there, or for more processes than fit.
    """
    usable = _visible(spec, policy)
    if spec.enforce_cpu:
        return _on_cpu(spec, cores, "enforce_cpu is set")
    if not policy.gpus:
        return _on_cpu(spec, cores, "this worker has no GPU to use")
    if spec.gpu_limit == 0:
        return _on_cpu(spec, cores, "resources.hardware.gpu.count is 0")
    return _on_gpus(spec, usable)


def _visible(spec: TrainingSpec, policy: EnginePolicy) -> tuple[str, ...]:
    """The GPUs that `training.visible_devices` leaves: numbers into the worker's own, or names."""
    wanted = spec.training.visible_devices
    if not wanted or not policy.gpus:
        return policy.gpus
    by_word = {str(number): name for number, name in enumerate(policy.gpus)}
    by_word |= {name.lower(): name for name in policy.gpus}
    unknown = [word for word in wanted if word.strip().lower() not in by_word]
    if unknown:
        there = ", ".join(f"{number} ({name})" for number, name in enumerate(policy.gpus))
        raise BadSpecError(
            f"training.visible_devices names {', '.join(map(repr, unknown))}; this worker's GPUs are: {there}",
            hint="give numbers or names of that list, or leave visible_devices out",
        )
    return tuple(dict.fromkeys(by_word[word.strip().lower()] for word in wanted))


def _on_cpu(spec: TrainingSpec, cores: int, why: str) -> DevicePlan:
    options = spec.training
    ranks = options.nproc_per_node or 1
    if ranks > cores:
        raise BadSpecError(
            f"training.nproc_per_node is {ranks}, expected at most {cores}: the training runs on the CPU "
            f"({why}), which has {cores} cores",
            hint="lower training.nproc_per_node or leave it out",
        )
    warnings = []
    if options.visible_devices:
        warnings.append(f"training.visible_devices has no effect: the training ran on the CPU ({why})")
    return DevicePlan(ranks, (), f"CPU, {_processes(ranks)}: {why}", tuple(warnings))


def _on_gpus(spec: TrainingSpec, usable: tuple[str, ...]) -> DevicePlan:
    options = spec.training
    most, why = _most_ranks(spec, usable)
    asked = options.nproc_per_node
    if asked is not None and asked > most:
        raise BadSpecError(
            f"training.nproc_per_node is {asked}, expected at most {most}: {why}",
            hint="lower training.nproc_per_node or leave it out",
        )
    ranks = asked or most
    if asked:
        why = f"training.nproc_per_node is {asked}"
    elif spec.kind == "lora_sft" and ranks > 1:
        ranks, why = 1, "lora_sft uses one process unless training.nproc_per_node says otherwise"
    if ranks > 1:
        return DevicePlan(ranks, usable[:ranks], f"{ranks} GPUs, {_processes(ranks)}: {why}")
    if options.primary_gpu >= len(usable):
        there = ", ".join(f"{number} ({name})" for number, name in enumerate(usable))
        raise BadSpecError(
            f"training.primary_gpu is {options.primary_gpu}; the GPUs to choose from are: {there}",
            hint="give a number of that list, or leave primary_gpu out",
        )
    # DeepSpeed looks for MPI where it finds no group.
    grouped = bool(options.deepspeed)
    return DevicePlan(1, (usable[options.primary_gpu],), f"1 GPU, {_processes(1)}: {why}", grouped=grouped)


def _most_ranks(spec: TrainingSpec, usable: tuple[str, ...]) -> tuple[int, str]:
    """How many processes the GPUs and the spec allow, and what limits them."""
    there = len(usable)
    limits = [(there, f"{there} GPU{'s' if there > 1 else ''} may be used")]
    if spec.gpu_limit is not None:
        limits.append((spec.gpu_limit, f"resources.hardware.gpu.count is {spec.gpu_limit}"))
    if spec.training.allow_multi_gpu is False:
        limits.append((1, "training.allow_multi_gpu is false"))
    if any(name.upper().startswith("MIG-") for name in usable):
        limits.append((1, "slices of GPUs (MIG) cannot train together"))
    return min(limits, key=lambda limit: limit[0])


def _processes(ranks: int) -> str:
    return f"{ranks} process{'es' if ranks > 1 else ''}"

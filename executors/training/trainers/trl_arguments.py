"""Turns a spec into an instance of one of TRL's configuration classes."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Final

from executors.errors import BadSpecError, MissingLibraryError
from executors.training.spec.trainer_specs import GrpoSpec
from executors.training.trainers.sharding import sharding_arguments
from executors.training.trainers.trl_fields import TrlFields

if TYPE_CHECKING:
    from executors.training.training_run import TrainingRun

_RANKS_WAIT_SEC: Final = 24 * 3600
"""For each other, while the first reads rows or saves. That one has died, or hangs, the launcher and the daemon see."""


def trl_arguments(run: TrainingRun, config_type: type, **own: object) -> Any:  # noqa: ANN401 - a heavy type
    """Make the configuration of a trainer. Making it also sets up the process's device and its group of ranks.

    Args:
        run: the run.
        config_type: TRL's configuration class of this kind of training.
        own: what this kind of training adds, or says otherwise than all kinds do.

    Raises:
        BadSpecError: options that exclude each other, that this host cannot honour, or that TRL refuses.
        MissingLibraryError: an option needs a library that is not installed.
    """
    _check_host(run)
    ours = {**_common_arguments(run), **own}
    arguments = {**ours, **TrlFields(config_type, ours).accept(run.spec.training.trl)}
    _check_groups(run, arguments)
    if run.job.ranks == 1:
        arguments.pop("ddp_backend", None)  # TRL would look for a group of processes
    try:
        return config_type(**arguments)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise BadSpecError(
            f"TRL's {config_type.__name__} refuses the options in spec.training: {error}",
            hint="Change the option that the text names, in spec.training or spec.training.trl.",
        ) from error


def _common_arguments(run: TrainingRun) -> dict[str, Any]:
    """What all kinds of training give to their configuration class."""
    options, job = run.spec.training, run.job
    optional = {"ddp_find_unused_parameters": options.ddp_find_unused_parameters}
    return {
        "output_dir": str(job.checkpoints_dir),
        "per_device_train_batch_size": job.batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "num_train_epochs": options.num_train_epochs,
        "max_steps": options.max_steps or -1,
        "learning_rate": options.learning_rate,
        "warmup_steps": options.warmup_steps,
        "fp16": options.fp16,
        "bf16": options.bf16,
        "gradient_checkpointing": options.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "seed": options.seed,
        "data_seed": options.seed,
        "use_cpu": job.use_cpu,
        "ddp_timeout": _RANKS_WAIT_SEC,
        "logging_first_step": True,
        "logging_steps": options.logging_steps,
        "logging_nan_inf_filter": False,
        "save_strategy": options.save_strategy,
        "save_steps": options.save_steps,
        "save_total_limit": options.save_total_limit,
        "save_only_model": False,
        "push_to_hub": False,
        "report_to": "none",  # trackers are callbacks of ours
        "disable_tqdm": True,
        **{name: value for name, value in optional.items() if value is not None},
        **sharding_arguments(run),
    }


def _check_host(run: TrainingRun) -> None:
    """Refuse what needs a GPU or a library that is not there."""
    four_bits = run.spec.uses_lora and run.spec.lora is not None and run.spec.lora.load_in_4bit
    if run.job.use_cpu:
        why = "spec.enforce_cpu is true" if run.spec.enforce_cpu else "the task has no GPU"
        if run.spec.training.fp16:
            raise BadSpecError(
                f"spec.training.fp16 is true, but {why}; expected a GPU, or spec.training.bf16, or neither"
            )
        if four_bits:
            raise BadSpecError(f"spec.lora.load_in_4bit is true, but {why}; expected a GPU, or load_in_4bit false")
    if four_bits and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingLibraryError(
            "spec.lora.load_in_4bit is true, but the library 'bitsandbytes' is not installed",
            hint="Install it on the worker (uv pip install bitsandbytes), or set load_in_4bit to false.",
        )


def _check_groups(run: TrainingRun, arguments: dict[str, Any]) -> None:
    """Refuse a GRPO batch that splits the completions of one prompt."""
    if not isinstance(run.spec, GrpoSpec) or {"generation_batch_size", "steps_per_generation"} & arguments.keys():
        return
    completions = run.job.batch_size * run.job.gradient_accumulation_steps * run.job.ranks
    each = run.spec.training.num_generations
    if completions % each:
        raise BadSpecError(
            f"spec.training.num_generations is {each}, which does not divide the {completions} completions of a step: "
            f"batch_size {run.job.batch_size} x gradient_accumulation_steps {run.job.gradient_accumulation_steps} "
            f"x {run.job.ranks} processes",
            hint="Choose batch_size so that it is a multiple of num_generations.",
        )

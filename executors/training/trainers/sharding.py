"""`training.deepspeed` and `training.fsdp` (WIRE 8): how a model is split over several GPUs."""

from __future__ import annotations

import importlib.util
import json
import re
from typing import TYPE_CHECKING, Any, Final, Literal

from executors.errors import BadSpecError, MissingLibraryError
from executors.local_paths import confine
from executors.secret_masking import shown
from executors.training.trainers.trl_fields import is_plain

if TYPE_CHECKING:
    from pathlib import Path

    from executors.training.training_run import TrainingRun

_Way = Literal["deepspeed", "fsdp"]

_LONGEST_FILE: Final = 1024**2
_DEEPEST: Final = 16
_REFUSED: Final = {
    "deepspeed": frozenset(
        {"autotuning", "comet", "csv_monitor", "data_efficiency", "elasticity", "nebula", "tensorboard", "wandb"}
    ),
    "fsdp": frozenset({"xla", "xla_fsdp_settings", "xla_fsdp_v2", "xla_fsdp_grad_ckpt"}),
}
"""Sections that write files elsewhere, call hosts or change how many processes there are."""
_NAMES_FILE: Final = re.compile(r"(path|file|dir|folder)$", re.IGNORECASE)
"""Keys such as `nvme_path` and `output_file`: also a plain word there is a file in whatever folder the worker runs."""


def sharding_arguments(run: TrainingRun) -> dict[str, Any]:
    """Keyword arguments of TRL's configuration classes for splitting the model; empty where it is not split.

    Without a wish of the task, full fine-tuning on several GPUs uses DeepSpeed's ZeRO if DeepSpeed is installed.

    Raises:
        BadSpecError: a configuration that cannot be used, or no GPU.
        MissingLibraryError: DeepSpeed is asked for and not installed.
    """
    options = run.spec.training
    if options.deepspeed:
        _needs_gpu(run, "deepspeed")
        if not _has_deepspeed():
            raise MissingLibraryError(
                "spec.training.deepspeed is given, but the library 'deepspeed' is not installed",
                hint="Install it on the worker (uv pip install deepspeed), or remove the key.",
            )
        return {"deepspeed": _configuration(run, "deepspeed", options.deepspeed)}
    if options.fsdp:
        return _fsdp_arguments(run)
    if not (options.auto_deepspeed and run.spec.kind == "sft" and run.job.ranks > 1 and not run.job.use_cpu):
        return {}
    if _has_deepspeed():
        return {"deepspeed": zero_configuration(options.deepspeed_stage)}
    asked = {"auto_deepspeed", "auto_deepspeed_stage", "zero_stage"} & options.model_fields_set
    if asked and run.is_first:
        run.tell.warn(
            f"spec.training.{min(asked)} has no effect: the library 'deepspeed' is not installed on the worker; "
            "each GPU holds the whole model"
        )
    return {}


def zero_configuration(stage: int) -> dict[str, Any]:
    """DeepSpeed's ZeRO with the trainer's own batch sizes and precision.

    Args:
        stage: 1 splits the optimizer's state, 2 the gradients too, 3 the weights too.
    """
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": True,
            "contiguous_gradients": True,
            **({"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}),
        },
    }


def _fsdp_arguments(run: TrainingRun) -> dict[str, Any]:
    _needs_gpu(run, "fsdp")
    if run.job.ranks == 1:
        if run.is_first:
            run.tell.warn("spec.training.fsdp has no effect: there is one process, so nothing to split")
        return {}
    wish = run.spec.training.fsdp
    if wish is True:
        return {"fsdp": True}
    if isinstance(wish, str) and not wish.lstrip().startswith("{"):
        if is_plain(wish):
            return {"fsdp": wish}
        raise BadSpecError(
            f"spec.training.fsdp is {shown(wish)}; expected options such as 'full_shard auto_wrap', or an object"
        )
    return {"fsdp": True, "fsdp_config": _configuration(run, "fsdp", wish)}


def _needs_gpu(run: TrainingRun, way: _Way) -> None:
    if run.job.use_cpu:
        why = "spec.enforce_cpu is true" if run.spec.enforce_cpu else "the task has no GPU"
        raise BadSpecError(f"spec.training.{way} is given, but {why}; expected GPUs, or no {way}")


def _configuration(run: TrainingRun, way: _Way, given: object) -> dict[str, Any]:
    """An object as it is, JSON text, or the content of a file."""
    field = f"spec.training.{way}"
    if isinstance(given, str):
        is_text = given.lstrip().startswith("{")
        given = _parsed(given, field) if is_text else _parsed(_read(confine(given, field, run.policy), field), field)
    if not isinstance(given, dict):
        raise BadSpecError(f"{field} is no object; expected a configuration, or the path of a file with one")
    if refused := sorted(_REFUSED[way] & given.keys()):
        raise BadSpecError(f"{field}.{refused[0]} is not for tasks to set", hint="Remove the section.")
    _check_plain(given, field, _DEEPEST)
    return given


def _read(path: Path, field: str) -> str:
    try:
        if not path.is_file():  # opening a named pipe would wait for a writer
            raise BadSpecError(f"{field} names {str(path)!r}, which is no regular file; expected a configuration")
        if path.stat().st_size > _LONGEST_FILE:
            raise BadSpecError(f"{field} names a file of more than {_LONGEST_FILE} bytes; expected a configuration")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadSpecError(f"{field} names a file that cannot be read: {error}") from error


def _parsed(text: str, field: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSpecError(f"{field} is no JSON ({error}); expected an object") from error


def _check_plain(value: object, field: str, deepest: int) -> None:
    """Make sure that a configuration names no files and no hosts."""
    if deepest == 0:
        raise BadSpecError(f"{field} is nested too deeply")
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, str) and _NAMES_FILE.search(key):
                raise BadSpecError(f"{field}.{key} is not for tasks to set: it names a file", hint="Remove the key.")
            _check_plain(inner, f"{field}.{key}", deepest - 1)
    elif isinstance(value, list):
        for inner in value:
            _check_plain(inner, field, deepest - 1)
    elif value is not None and not is_plain(value):
        raise BadSpecError(
            f"{field} is {shown(str(value))}; expected a number, a switch or a plain word: no path, no address"
        )


def _has_deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None

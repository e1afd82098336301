"""LoRA of a training run: which modules get an adapter, or which adapter is trained further."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from executors.errors import BadSpecError, ExecutorError, ModelLoadError
from executors.input_spec import AdapterEntry
from executors.local_paths import confine
from executors.lora.lora_adapters import check_base, find_adapters
from executors.lora.lora_files import CONFIG_FILE
from executors.model_spec import CHECKPOINT
from executors.safetensors_headers import read_headers

if TYPE_CHECKING:
    from executors.training.training_run import TrainingRun
    from executors.weights_source import WeightsSource

_ALL_LINEAR: Final = "all-linear"
_MOST_NAMED: Final = 30
_TRAINER_STATE: Final = "trainer_state.json"


def adapter_to_continue(run: TrainingRun) -> Path | None:
    """The folder of the adapter that the run trains further; None: it begins with a new one, or trains whole weights.

    Raises:
        BadSpecError: `checkpoint.load` is an adapter, and the run trains whole weights.
    """
    field, folder = _named_adapter(run)
    if folder is None:
        return None
    if not run.spec.uses_lora:
        raise BadSpecError(
            f"{field} is a LoRA adapter, and this task trains whole weights; expected the weights of a model",
            hint="Use the task type lora_sft (or a section lora in dpo, reward, ppo and grpo), or merge the adapter "
            "into its model first.",
        )
    return folder


def _named_adapter(run: TrainingRun) -> tuple[str, Path | None]:
    found = run.inputs.get(CHECKPOINT) if run.spec.checkpoint.load is not None else None
    if found is not None:
        return "spec.checkpoint.load", found if (found / CONFIG_FILE).is_file() else None
    field, named = "spec.training.resume_from_path", run.spec.training.resume_from_path
    if named is None:
        return field, None
    folder = confine(named, field, run.policy)
    # A trainer's checkpoint of a LoRA run holds an adapter too; that one is resumed.
    is_adapter = (folder / CONFIG_FILE).is_file() and not (folder / _TRAINER_STATE).exists()
    return field, folder if is_adapter else None


def check_adapter(run: TrainingRun, folder: Path, source: WeightsSource) -> None:
    """Make sure, before weights are loaded, that an adapter is whole and belongs to the base model.

    Raises:
        BadSpecError: it is not, or of a kind that cannot be trained further.
        ModelLoadError: its files have vanished.
    """
    field, _ = _named_adapter(run)
    entry = AdapterEntry.model_validate({"path": str(folder), "name": "adapter", "apply": "merge"})
    try:
        (adapter,) = find_adapters([entry], {"model.adapters[0]": folder}, engine="transformers").merged
        check_base(
            adapter, read_headers(Path(source.location)) if source.stamp else {}, run.spec.model.source.identifier
        )
    except ExecutorError as error:
        # The same checks serve spec.model.adapters, and say so.
        told = error.message.replace("spec.model.adapters[0] 'adapter'", field)
        raise type(error)(told, hint=error.hint) from error
    if run.is_first and "lora" in run.spec.model_fields_set:
        run.tell.warn(f"spec.lora is ignored: {field} is an adapter, which keeps its own rank, alpha and modules")


def attach_adapter(run: TrainingRun, model: Any, folder: Path) -> Any:  # noqa: ANN401 - heavy types
    """Put an adapter on its base model, ready to be trained further.

    Raises:
        ModelLoadError: it does not fit.
    """
    import peft
    import torch

    field, _ = _named_adapter(run)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True, torch_device=str(model.device))
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # PEFT raises many kinds, and each is about the adapter and this model
        raise ModelLoadError(
            f"{field} cannot be put on the model {run.spec.model.source.identifier!r}: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:400]}",
            hint="Check that the adapter is whole and belongs to this model.",
        ) from error


def lora_config(run: TrainingRun, model: Any) -> Any:  # noqa: ANN401 - heavy types
    """Say which adapter a trainer is to put on a model.

    Args:
        run: the run.
        model: what `base_models` has loaded.

    Returns:
        A `peft.LoraConfig`; None where the run trains whole weights, or the model already has its adapter.

    Raises:
        BadSpecError: no module has one of the names in `lora.target_modules`, or one that has cannot take an adapter.
    """
    import peft

    lora = run.spec.lora
    if lora is None or not run.spec.uses_lora or isinstance(model, peft.PeftModel):
        return None
    classifies = "SequenceClassification" in type(model).__name__
    if not classifies and lora.task_type.upper() != "CAUSAL_LM":
        raise BadSpecError(f"spec.lora.task_type is {lora.task_type!r}; expected 'CAUSAL_LM'")
    targets = _ALL_LINEAR if lora.target_modules == (_ALL_LINEAR,) else _targets(run, model, tell=run.is_first)
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias=lora.bias,
        target_modules=targets,
        use_rslora=lora.use_rslora,
        task_type="SEQ_CLS" if classifies else "CAUSAL_LM",
    )


def check_target_modules(run: TrainingRun, model: Any) -> None:  # noqa: ANN401 - heavy types
    """Look whether the modules that are to get an adapter are there; the model's weights need not be.

    Raises:
        BadSpecError: see `lora_config`.
    """
    if run.spec.lora is not None and run.spec.lora.target_modules != (_ALL_LINEAR,):
        _targets(run, model, tell=False)


def _targets(run: TrainingRun, model: Any, *, tell: bool) -> list[str]:  # noqa: ANN401 - heavy types
    assert run.spec.lora is not None  # noqa: S101 - lora_config has looked
    wanted = run.spec.lora.target_modules
    modules: Mapping[str, Any] = dict(model.named_modules())
    takers = _module_types()
    reached = {name: [key for key in modules if key == name or key.endswith(f".{name}")] for name in wanted}
    there = sorted({key.rpartition(".")[2] for key, module in modules.items() if isinstance(module, takers[:2])})
    listed = ", ".join(there[:_MOST_NAMED])
    unmatched = [name for name, keys in reached.items() if not keys]
    hint = f"Name modules of this model, or {_ALL_LINEAR!r} for all linear ones but the head."
    if len(unmatched) == len(reached):
        raise BadSpecError(
            f"spec.lora.target_modules is {list(wanted)}, and no module of the model {run.spec.model_name!r} has one "
            f"of these names; its linear modules are {listed}",
            hint=hint,
        )
    for name, keys in reached.items():
        for key in keys:
            if not isinstance(modules[key], takers):
                raise BadSpecError(
                    f"spec.lora.target_modules has {name!r}, which in the model {run.spec.model_name!r} is a "
                    f"{type(modules[key]).__name__} ({key}); expected linear modules: {listed}",
                    hint=hint,
                )
    if unmatched and tell:
        run.tell.warn(
            f"spec.lora.target_modules: no module of the model has the name {', '.join(map(repr, unmatched))}; "
            f"its linear modules are {listed}"
        )
    return [name for name, keys in reached.items() if keys]


def _module_types() -> tuple[type, ...]:
    """What PEFT puts a LoRA adapter on; the linear ones first."""
    import torch
    from transformers.pytorch_utils import Conv1D

    nn = torch.nn
    return (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)

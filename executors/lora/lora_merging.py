"""Merges LoRA adapters into a model's weights: in memory, or into a new folder for an engine that reads its own."""

from __future__ import annotations

import errno
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from executors.errors import ExecutorError, MissingLibraryError, ModelLoadError
from executors.lora.lora_files import Adapter, label_of, name_targets
from executors.safetensors_headers import read_headers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INSTALL_HINT: Final = "Install the extra on the worker: uv sync --inexact --extra inference."
_SPARE: Final = 1.05
"""Room on the disk that a merged model must find, by the size of its weights: tokenizer and headers come on top."""

_LONGEST_TEXT: Final = 400
_FOR_TOKENIZER: Final = frozenset({"revision", "trust_remote_code", "gguf_file", "token", "cache_dir"})


def merge_into(model: PreTrainedModel, adapters: Sequence[Adapter]) -> PreTrainedModel:
    """Add the effect of adapters to a model's weights, for good.

    Args:
        model: is changed, and must not be used after a failure.
        adapters: merged in this order.

    Returns:
        The model, without any trace of PEFT.

    Raises:
        MissingLibraryError: PEFT is not installed.
        ModelLoadError: an adapter does not fit the model, or the weights would not be finite numbers.
    """
    import torch

    if not adapters:
        return model
    try:
        import peft
    except ImportError as error:
        raise MissingLibraryError(f"merging a LoRA adapter needs PEFT: {error}", hint=_INSTALL_HINT) from error
    for adapter in adapters:
        try:
            model = _merge_one(model, adapter, peft)
        except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError, ModelLoadError):
            raise
        except Exception as error:  # PEFT raises many kinds, and each is about the adapter and this model
            raise ModelLoadError(
                f"{adapter.title} cannot be merged into the model: {type(error).__name__}: {_cut(error)}",
                hint="Check that the adapter is whole and belongs to this model; quantised weights take none, unless "
                "it is applied at run time (apply: runtime).",
            ) from error
    return model


def _cut(error: Exception) -> str:
    """Its text on one line; PyTorch names every single weight that does not fit."""
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"


def _merge_one(model: PreTrainedModel, adapter: Adapter, peft: Any) -> PreTrainedModel:  # noqa: ANN401 - the module
    from peft.tuners.lora import LoraLayer

    _untie(model, adapter)
    config = peft.LoraConfig.from_pretrained(str(adapter.folder))
    name_targets(config, adapter.named_targets)
    config.task_type = None  # other kinds of task would get heads of their own
    config.init_lora_weights = False  # every value comes from the file
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # they are no longer tied
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match any")  # they have no effect
        wrapped = peft.PeftModel.from_pretrained(
            model, str(adapter.folder), config=config, torch_device=str(model.device)
        )
        layers = [(name, layer) for name, layer in wrapped.named_modules() if isinstance(layer, LoraLayer)]
        # Experts may be joined into fewer modules in memory than in the file.
        reached = sum("experts" not in name for name, _ in layers)
        expected = sum("experts" not in module.name for module in adapter.modules)
        if adapter.modules and reached != expected:
            raise ModelLoadError(
                f"{adapter.title} does not fit the model: it changes {expected} modules, of which the model has "
                f"{reached}",
                hint="Check that the adapter belongs to this model.",
            )
        for _, layer in layers:
            layer.set_scale("default", adapter.scale)
        merged: PreTrainedModel = wrapped.merge_and_unload(safe_merge=True)
    return merged


def _untie(model: PreTrainedModel, adapter: Adapter) -> None:
    """Give input and output embeddings weights of their own, if only one of them is to change."""
    import torch

    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if inputs is None or outputs is None or inputs.weight is not outputs.weight:
        return
    names = {id(layer): name.rpartition(".")[2] for name, layer in model.named_modules()}
    if any(module.name.rpartition(".")[2] in {names[id(inputs)], names[id(outputs)]} for module in adapter.modules):
        outputs.weight = torch.nn.Parameter(outputs.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False


def write_merged_model(  # noqa: PLR0913 - one call brings all of it
    location: str,
    load_options: Mapping[str, object],
    tokenizer_location: str,
    adapters: Sequence[Adapter],
    target: Path,
    *,
    tokenizer_options: Mapping[str, object] | None = None,
) -> Path:
    """Write a model with adapters merged into its weights, and its tokenizer, as a new folder.

    The model is held in the host's memory meanwhile.

    Args:
        location: the base model, as `from_pretrained` takes it.
        load_options: for its `from_pretrained`; without `dtype` it keeps the type in which it is stored.
        tokenizer_location: where its tokenizer is.
        adapters: merged in this order.
        target: the folder to write, replaced if it exists; removed if anything fails.
        tokenizer_options: for the tokenizer's `from_pretrained`; by default those of `load_options` that it knows.

    Returns:
        `target`.

    Raises:
        MissingLibraryError: Transformers or PEFT is not installed.
        ModelLoadError: the model cannot be loaded or saved, or an adapter does not fit.
        OSError: the disk is too full.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingLibraryError(f"merging needs torch and transformers: {error}", hint=_INSTALL_HINT) from error
    if tokenizer_options is None:
        tokenizer_options = {key: value for key, value in load_options.items() if key in _FOR_TOKENIZER}
    what = f"the model {location!r} with {label_of(adapters)!r} merged into it"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    try:
        if Path(location).is_dir() and load_options.get("dtype", "auto") == "auto":  # known before the long way
            _need_space(target, sum(facts.nbytes for facts in read_headers(Path(location)).values()), what)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_location, **tokenizer_options)
        model = transformers.AutoModelForCausalLM.from_pretrained(location, **{"dtype": "auto", **load_options})
        model = merge_into(model, adapters)
        _need_space(target, sum(weight.nbytes for weight in model.parameters()), what)
        _keep_token_ids_only(model)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)
        if not isinstance(error, Exception) or isinstance(error, ExecutorError | MemoryError | torch.OutOfMemoryError):
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        if isinstance(error, ImportError):
            raise MissingLibraryError(f"{what} needs a library: {error}", hint=_INSTALL_HINT) from error
        if "No space left" in str(error):  # the error of safetensors is no OSError
            raise OSError(errno.ENOSPC, f"no space left on the disk for {what}", str(target)) from error
        # The libraries raise many kinds, and each is about the model or its tokenizer.
        raise ModelLoadError(f"{what} cannot be made: {type(error).__name__}: {_cut(error)}") from error
    return target


def _need_space(folder: Path, nbytes: int, what: str) -> None:
    free, needed = shutil.disk_usage(folder).free, int(nbytes * _SPARE)
    if free < needed:
        told = f"{what} needs {needed / 2**30:.1f} GiB on the disk, free are {free / 2**30:.1f}"
        raise OSError(errno.ENOSPC, told, str(folder))


def _keep_token_ids_only(model: PreTrainedModel) -> None:
    """Drop a checkpoint's sampling values: tasks name their own, and some that exist cannot be saved."""
    import transformers

    kept = model.generation_config
    if kept is not None:
        model.generation_config = transformers.GenerationConfig(
            bos_token_id=kept.bos_token_id,
            eos_token_id=kept.eos_token_id,
            pad_token_id=kept.pad_token_id,
            suppress_tokens=kept.suppress_tokens,
            begin_suppress_tokens=kept.begin_suppress_tokens,
        )

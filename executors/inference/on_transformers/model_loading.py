"""Loads a causal language model and its tokenizer with Transformers, on the CPU or on GPUs."""

from __future__ import annotations

import errno
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from executors.contract import EnginePolicy
from executors.errors import BadSpecError, MissingLibraryError, ModelLoadError
from executors.inference.inference_spec import InferenceSpec
from executors.inference.on_transformers.transformers_adapters import check_adapters
from executors.inference.prompt_rendering import PromptRenderer
from executors.lora.lora_adapters import Adapter, identity
from executors.lora.lora_merging import merge_into
from executors.tokenizer_check import check_tokenizer_config
from executors.weights_source import WeightsSource, find_weights, hub_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPREADING_MAPS = frozenset({"auto", "balanced", "balanced_low_0"})
_INSTALL_HINT = "Install the extra on the worker: uv sync --inexact --extra inference."


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate.

    Attributes:
        model: in evaluation mode, with no sampling defaults of its own.
        renderer: makes tokens for it.
        pad_id: fills up shorter rows.
        device: for example `cpu` or `cuda:0`, or `cuda:0,cuda:1` when spread.
        dtype: type of the weights in memory, for example `bfloat16`.
        source: what was loaded.
        vocabulary: how many scores the model gives at each place.
        never: tokens that the model's own configuration rules out.
        not_first: tokens that it rules out at the start of an output.
        merged: adapters that are in the weights.
    """

    model: PreTrainedModel
    renderer: PromptRenderer
    pad_id: int
    device: str
    dtype: str
    source: WeightsSource
    vocabulary: int
    never: tuple[int, ...] = ()
    not_first: tuple[int, ...] = ()
    merged: tuple[Adapter, ...] = ()


def engine_key(spec: InferenceSpec) -> str:
    """Return all of a spec that changes what gets loaded, as stable text (WIRE 9.18)."""
    source, options, load = spec.model.source, spec.model.transformers, spec.checkpoint.load
    placement = _requested_device(spec)
    return json.dumps(
        {
            "engine": "transformers",
            "identifier": source.identifier,
            "revision": source.revision,
            "gguf_file": source.gguf_file,
            "checkpoint": load and load.identity,
            "dtype": options.dtype,
            "device": placement,
            "gpus": spec.gpu_limit if placement in _SPREADING_MAPS else None,
            "bits": 8 if options.load_in_8bit else 4 if options.load_in_4bit else None,
            "flash_attention": options.use_flash_attention_2,
            "remote_code": spec.trusts_remote_code,
            "merged": identity(spec.model.adapters),
        },
        sort_keys=True,
    )


def load_model(
    spec: InferenceSpec, policy: EnginePolicy, inputs: Mapping[str, Path], merged: Sequence[Adapter] = ()
) -> LoadedModel:
    """Load model and tokenizer.

    Args:
        spec: the spec.
        policy: what the operator allows.
        inputs: what the daemon has found or fetched.
        merged: adapters to merge into the weights.

    Raises:
        BadSpecError: a path or device that cannot be used here, or an adapter of another model.
        MissingLibraryError: Transformers, or what a chosen option needs, is not installed.
        ModelLoadError: not found, not readable, not a text generation model.
    """
    source = find_weights(spec, policy, inputs)
    field, name = "spec.model.source.identifier", spec.model_name
    if spec.checkpoint.load is not None:
        field, name = "spec.checkpoint.load", spec.checkpoint.load.shown_name
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingLibraryError(f"inference needs torch and transformers: {error}", hint=_INSTALL_HINT) from error
    if merged:
        _require_whole_weights(spec)
        check_adapters(merged, source, name)
    options = _weight_options(spec, source)
    base = source.base or source
    try:
        tokenizer_options = hub_options(spec, policy, base)
        check_tokenizer_config(base.location, **tokenizer_options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(base.location, **tokenizer_options)
        model = _load_weights(spec, policy, source, options)
    except ImportError as error:
        raise MissingLibraryError(
            f"loading {name!r} needs a library that is not installed: {error}", hint=_INSTALL_HINT
        ) from error
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError, ModelLoadError):
        raise
    except Exception as error:  # from_pretrained raises many kinds, and each is about the model
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise ModelLoadError(
            f"{field} {name!r} cannot be loaded: {type(error).__name__}: {error}", hint=_load_hint(source, error)
        ) from error
    model = merge_into(model, merged)
    model.eval()
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    end_ids = _end_ids(model.generation_config.eos_token_id, tokenizer.eos_token_id)
    pad_id = next((known for known in (tokenizer.pad_token_id, *sorted(end_ids)) if known is not None), 0)
    # Sampling values that come with a checkpoint must not leak into a task that names its own.
    kept = model.generation_config
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=kept.bos_token_id,
        eos_token_id=sorted(end_ids) or None,
        pad_token_id=pad_id,
    )
    return LoadedModel(
        model=model,
        renderer=PromptRenderer(
            tokenizer, end_ids, getattr(model.config.get_text_config(), "max_position_embeddings", None) or None
        ),
        pad_id=pad_id,
        device=_device_name(model),
        dtype=str(model.dtype).removeprefix("torch."),
        source=source,
        vocabulary=model.config.get_text_config().vocab_size,
        never=tuple(kept.suppress_tokens or ()),
        not_first=tuple(kept.begin_suppress_tokens or ()),
        merged=tuple(merged),
    )


def _require_whole_weights(spec: InferenceSpec) -> None:
    options = spec.model.transformers
    for key in ("load_in_8bit", "load_in_4bit"):
        if getattr(options, key):
            raise BadSpecError(
                f"spec.model.adapters: an adapter cannot be merged into weights with spec.model.transformers.{key}",
                hint="Apply it at run time (apply: runtime), or remove the key.",
            )


def _load_weights(
    spec: InferenceSpec, policy: EnginePolicy, source: WeightsSource, options: dict[str, object]
) -> PreTrainedModel:
    import transformers

    where = hub_options(spec, policy, source)
    if source.weights_file and source.base:
        of_base = hub_options(spec, policy, source.base)
        config = transformers.AutoConfig.from_pretrained(source.base.location, **of_base)
        config.transformers_weights = source.weights_file
        try:
            ends = transformers.GenerationConfig.from_pretrained(source.base.location, **of_base)
        except OSError:  # many models have no such file
            ends = transformers.GenerationConfig.from_model_config(config)
        options |= {"config": config, "generation_config": ends}
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        source.location, **where, **options, output_loading_info=True
    )
    if spec.checkpoint.load is not None and told["missing_keys"]:  # they would be random
        missing = sorted(told["missing_keys"])
        raise ModelLoadError(
            f"spec.checkpoint.load {spec.checkpoint.load.shown_name!r} lacks {len(missing)} of the model's weights, "
            f"for instance {missing[0]!r}",
            hint="Check that the checkpoint is whole and belongs to this model.",
        )
    loaded: PreTrainedModel = model
    return loaded


def _load_hint(source: WeightsSource, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "This model runs Python code of its author; allow that with WORKER_ALLOW_REMOTE_CODE=1 at the worker."
    if source.stamp:
        return "Check that the files are whole and belong to a text generation model that Transformers knows."
    return (
        "Check the name and the revision; a gated model needs HF_TOKEN at the worker; without network (HF_HUB_OFFLINE) "
        "only models in the local cache work. A folder of your own must lie below WORKER_ALLOWED_ROOTS."
    )


def _requested_device(spec: InferenceSpec) -> str | None:
    asked = spec.model.transformers.device_map
    if asked is not None:  # `enforce_cpu` chooses this engine; an explicit map still chooses the device
        return asked
    return "cpu" if spec.enforce_cpu or spec.gpu_limit == 0 else None


def _weight_options(spec: InferenceSpec, source: WeightsSource) -> dict[str, object]:
    import torch

    options = spec.model.transformers
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = _requested_device(spec) or ("cuda" if gpus else "cpu")
    if device == "cuda" and not gpus:
        raise BadSpecError(
            "spec.model.transformers.device_map is 'cuda', but this worker sees no CUDA device",
            hint="Use 'cpu' or 'auto', leave it out, or send the task to a worker with a GPU.",
        )
    chosen: dict[str, object] = {"dtype": "auto" if options.dtype == "auto" else getattr(torch, options.dtype)}
    if device != "cpu":
        chosen["device_map"] = device
    if device in _SPREADING_MAPS and spec.gpu_limit is not None and spec.gpu_limit < gpus:
        chosen["max_memory"] = _memory_of_first(spec.gpu_limit)
    if source.gguf_file and options.dtype == "auto" and device != "cpu" and gpus:
        chosen["dtype"] = torch.bfloat16  # GGUF is unpacked to float32, which wastes a GPU's memory
    if options.load_in_8bit or options.load_in_4bit:
        chosen["quantization_config"] = _quantisation(options.load_in_4bit, source)
    if options.use_flash_attention_2:
        _need("flash_attn", "spec.model.transformers.use_flash_attention_2", "Install flash-attn, or remove the key.")
        chosen["attn_implementation"] = "flash_attention_2"
    return chosen


def _quantisation(four_bit: bool, source: WeightsSource) -> object:  # noqa: FBT001 - read at its one call
    key = "spec.model.transformers." + ("load_in_4bit" if four_bit else "load_in_8bit")
    if source.gguf_file:
        raise BadSpecError(f"{key} is true, but {source.gguf_file!r} is already quantised; remove one of the two")
    _need("bitsandbytes", key, "Install bitsandbytes at the worker, or remove the key.")
    from transformers import BitsAndBytesConfig

    config: object = BitsAndBytesConfig(load_in_4bit=four_bit, load_in_8bit=not four_bit)
    return config


def _need(library: str, key: str, hint: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise MissingLibraryError(f"{key} is true, which needs the library {library!r}; it is not installed", hint=hint)


def _memory_of_first(gpus: int) -> dict[int | str, int]:
    """Return the bytes that may be filled on the first GPUs and, for what does not fit, in the host's memory."""
    import torch

    memory: dict[int | str, int] = {gpu: int(torch.cuda.mem_get_info(gpu)[0] * 0.9) for gpu in range(gpus)}
    return {**memory, "cpu": int(psutil.virtual_memory().available * 0.8)}


def _end_ids(configured: int | list[int] | None, of_tokenizer: int | None) -> frozenset[int]:
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(known for known in (*several, of_tokenizer) if known is not None)


def _device_name(model: PreTrainedModel) -> str:
    spread = getattr(model, "hf_device_map", None)
    if not spread:
        return str(model.device)
    names = {f"cuda:{device}" if isinstance(device, int) else str(device) for device in spread.values()}
    return ",".join(sorted(names))

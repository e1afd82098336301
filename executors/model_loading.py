"""Loads a causal language model and its tokenizer with Transformers, on the CPU or on GPUs."""

from __future__ import annotations

import errno
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from executors.contract import EnginePolicy
from executors.errors import BadSpecError, MissingLibraryError, ModelLoadError
from executors.inference_spec import CHECKPOINT, InferenceSpec
from executors.local_paths import confine, find_local

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SPREADING_MAPS = frozenset({"auto", "balanced", "balanced_low_0"})
_TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"}
)
_MOST_NAMED = 5
_INSTALL_HINT = "Install the extra on the worker: uv sync --inexact --extra inference."


@dataclass(frozen=True)
class WeightsSource:
    """Where weights come from.

    Attributes:
        location: a hub name, or the absolute folder.
        gguf_file: the quantised file inside it; None for ordinary weights.
        stamp: name, size and change time of each local file, to notice weights that were written anew;
            empty for the hub.
        weights_file: the file inside it that holds weights and nothing else; None if the folder is a whole model.
        base: what lacks here (tokenizer, configuration of a lone weights file) comes from there; None: nothing lacks.
    """

    location: str
    gguf_file: str | None
    stamp: tuple[tuple[str, int, int], ...]
    weights_file: str | None = None
    base: WeightsSource | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate.

    Attributes:
        model: in evaluation mode, with no sampling defaults of its own.
        tokenizer: belongs to the model.
        end_ids: tokens that end a text.
        pad_id: fills up shorter rows.
        context_tokens: prompt and output together at most; None when the model has no such limit.
        device: for example `cpu` or `cuda:0`, or `cuda:0,cuda:1` when spread.
        dtype: type of the weights in memory, for example `bfloat16`.
        source: what was loaded.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]
    pad_id: int
    context_tokens: int | None
    device: str
    dtype: str
    source: WeightsSource


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
        },
        sort_keys=True,
    )


def find_weights(spec: InferenceSpec, policy: EnginePolicy, inputs: Mapping[str, Path]) -> WeightsSource:
    """Find the weights that a spec names, without reading them.

    Args:
        spec: the spec.
        policy: holds the allowed roots.
        inputs: what the daemon has found or fetched; with `checkpoint.load` in the spec it holds `CHECKPOINT`.

    Raises:
        BadSpecError: the path is missing, not allowed, or a folder in which the GGUF file is not clear; a checkpoint
            that is no model.
        ModelLoadError: the checkpoint has vanished.
    """
    if spec.checkpoint.load is None:
        return _find_named(spec, policy)
    if CHECKPOINT not in inputs:
        raise RuntimeError("spec.checkpoint.load is set, but the daemon gave the engine no files for it")
    try:
        return _find_checkpoint(spec, policy, inputs[CHECKPOINT])
    except FileNotFoundError as error:
        raise ModelLoadError(
            f"spec.checkpoint.load: {inputs[CHECKPOINT]} has vanished", hint="Send the task again."
        ) from error


def _find_checkpoint(spec: InferenceSpec, policy: EnginePolicy, found: Path) -> WeightsSource:
    field = "spec.checkpoint.load"
    files = [found] if found.is_file() else sorted(path for path in found.iterdir() if path.is_file())
    names = {path.name for path in files}
    if "adapter_config.json" in names:
        raise BadSpecError(
            f"{field} is a LoRA adapter ({found.name!r} holds adapter_config.json), and this version runs none; "
            "expected whole weights",
            hint="Merge the adapter into its model, and give the merged folder.",
        )
    if found.is_dir() and "config.json" in names:
        base = None if names & _TOKENIZER_FILES else _base_of(spec, policy, f"{field} has no tokenizer files")
        return WeightsSource(str(found), None, _stamp(files), base=base)
    weights = [path for path in files if path.suffix.lower() in {".gguf", ".safetensors"}]
    if len(weights) != 1:
        what = ", ".join(path.name for path in weights or files[:_MOST_NAMED]) or "nothing"
        raise BadSpecError(
            f"{field} is {found.name!r}, which holds {what}; "
            "expected a folder with config.json, or one .gguf or .safetensors file",
            hint="Give spec.checkpoint.load.subdir where the model lies deeper in an archive.",
        )
    (file,) = weights
    if file.suffix.lower() == ".gguf":
        return WeightsSource(str(file.parent), file.name, _stamp([file]))
    base = _base_of(spec, policy, f"{field} is the file {file.name!r} alone, without config.json")
    if base.gguf_file or base.weights_file:
        raise BadSpecError(
            f"{field} is the file {file.name!r} alone; spec.model.source is a .gguf file, which cannot complete it",
            hint="Name the model in its ordinary form in spec.model.source.identifier.",
        )
    return WeightsSource(str(file.parent), None, _stamp([file]), weights_file=file.name, base=base)


def _base_of(spec: InferenceSpec, policy: EnginePolicy, what_lacks: str) -> WeightsSource:
    if not spec.model.source.identifier:
        raise BadSpecError(f"{what_lacks}; expected spec.model.source.identifier to name the model it belongs to")
    return _find_named(spec, policy)


def _find_named(spec: InferenceSpec, policy: EnginePolicy) -> WeightsSource:
    source = spec.model.source
    field = "spec.model.source.identifier"
    local = find_local(source.identifier, field, policy)
    if local is None:
        return WeightsSource(location=source.identifier, gguf_file=source.gguf_file, stamp=())
    if local.is_file():
        if local.suffix.lower() != ".gguf":
            raise BadSpecError(f"{field} is the file {str(local)!r}; expected a folder with a model, or a .gguf file")
        return WeightsSource(location=str(local.parent), gguf_file=local.name, stamp=_stamp([local]))
    if source.gguf_file:
        chosen = confine(local / source.gguf_file, "spec.model.source.gguf_file", policy)
        return WeightsSource(location=str(chosen.parent), gguf_file=chosen.name, stamp=_stamp([chosen]))
    files = [path for path in local.iterdir() if path.is_file()]
    if any(path.name == "config.json" for path in files):
        return WeightsSource(location=str(local), gguf_file=None, stamp=_stamp(files))
    quantised = sorted(path.name for path in files if path.suffix.lower() == ".gguf")
    if len(quantised) != 1:
        found = f"the files {', '.join(quantised)}" if quantised else "neither config.json nor a .gguf file"
        raise BadSpecError(
            f"{field} is the folder {str(local)!r}, which has {found}; expected config.json or one .gguf file",
            hint="Name one of several .gguf files in spec.model.source.gguf_file.",
        )
    return WeightsSource(location=str(local), gguf_file=quantised[0], stamp=_stamp(files))


def _stamp(files: list[Path]) -> tuple[tuple[str, int, int], ...]:
    facts = ((path.name, path.stat()) for path in sorted(files))
    return tuple((name, status.st_size, status.st_mtime_ns) for name, status in facts)


def load_model(spec: InferenceSpec, policy: EnginePolicy, inputs: Mapping[str, Path]) -> LoadedModel:
    """Load model and tokenizer.

    Raises:
        BadSpecError: a path or device that cannot be used here.
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
    options = _weight_options(spec, source)
    base = source.base or source
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base.location, **_where(spec, policy, base))
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
        suppress_tokens=kept.suppress_tokens,
        begin_suppress_tokens=kept.begin_suppress_tokens,
    )
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        end_ids=end_ids,
        pad_id=pad_id,
        context_tokens=getattr(model.config.get_text_config(), "max_position_embeddings", None) or None,
        device=_device_name(model),
        dtype=str(model.dtype).removeprefix("torch."),
        source=source,
    )


def _where(spec: InferenceSpec, policy: EnginePolicy, source: WeightsSource) -> dict[str, object]:
    """What tells Transformers which files, and whether the model's own code may run."""
    # Many task files ask for remote code without need, so the wish alone is no reason to refuse them.
    where: dict[str, object] = {"trust_remote_code": spec.trusts_remote_code and policy.allow_remote_code}
    if spec.model.source.revision and not source.stamp:
        where["revision"] = spec.model.source.revision
    if source.gguf_file:
        where["gguf_file"] = source.gguf_file
    return where


def _load_weights(
    spec: InferenceSpec, policy: EnginePolicy, source: WeightsSource, options: dict[str, object]
) -> PreTrainedModel:
    import transformers

    where = _where(spec, policy, source)
    if source.weights_file and source.base:
        of_base = _where(spec, policy, source.base)
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

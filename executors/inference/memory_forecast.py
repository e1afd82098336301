"""How much memory a model will need, told from its files before anything is loaded, and refusals with the numbers.

A forecast counts what is certain and leaves out what is not, so that nothing is refused that would have run.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from executors.errors import ExecutorError
from executors.gpu_memory import GpuMemory, describe, gib
from executors.safetensors_headers import TensorFacts, read_headers, read_json_object

_MIB: Final = 1024**2
_CONFIG_LIMIT: Final = 16 * _MIB
_COUNT_LIMIT: Final = 2**31  # of layers, heads, tokens …: larger numbers are not believed
_LAYERS_LIMIT: Final = 10_000

_CUDA_CONTEXT_BYTES: Final = 512 * _MIB
_CPU_RUNTIME_BYTES: Final = 768 * _MIB
_STEP_TOKENS: Final = 2048
_STEP_SEQUENCES: Final = 64

_FLOATS: Final = frozenset({"F16", "BF16", "F32", "F64"})
_WIDE_NAMES: Final = frozenset({"float32", "float", "fp32"})
_QUANTISED_KEYS: Final = frozenset({"quantization_config", "compression_config"})
_LAYER_WEIGHT: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d{1,5}\.")
_NOT_TEXT: Final = re.compile(r"(?:^|\.)(?:vision|visual|audio|image)")

_INNER_CONFIGS: Final = ("thinker_config", "text_config", "llm_config", "language_config")
_FULL_ATTENTION: Final = frozenset(
    {"full_attention", "attention", "indexed_attention", "deepseek_sparse_attention", "qwen_sparse_attention"}
)
"""Words in `layer_types` for layers that keep every token, sparse ones included."""
_LOCAL_WINDOWS: Final = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
_HYBRID_KEYS: Final = frozenset(
    {
        "attn_layer_period", "attn_type_list", "conv_L_cache", "full_attention_interval", "hybrid_override_pattern",
        "layers_block_type", "linear_attn_config", "ssm_cfg", "state_size",
    }
)  # fmt: skip
"""Keys of models in which not every layer has a KV cache; `layer_types`, if there, tells which have one."""
_UNEVEN_KEYS: Final = frozenset({"block_configs", "compress_ratios", "global_head_dim", "swa_num_key_value_heads"})
"""Keys of models whose layers cache different amounts for a token."""


class NotEnoughMemoryError(ExecutorError):
    """The model will not fit into the memory that is free; raised before anything is loaded."""


class NotEnoughGpuMemoryError(NotEnoughMemoryError):
    """A GPU has too little free memory."""

    reason = "gpu_oom"


class NotEnoughHostMemoryError(NotEnoughMemoryError):
    """The host has too little free memory. Another try may find more."""

    reason = "host_oom"
    retryable = True


@dataclass(frozen=True)
class MemoryForecast:
    """What one device will have to hold at least, in bytes.

    Attributes:
        weights_bytes: the device's share of the weights, in the type they are loaded as.
        kv_cache_bytes: the device's share for one sequence of `context_tokens`; 0 where it cannot be told.
        overhead_bytes: an assumption: 512 MiB for the CUDA context and libraries (on the host 768 MiB for the process
            and its libraries), the widest activations of a step of 2048 tokens, the logits of 64 sequences, and the
            room that vLLM keeps for LoRA adapters. CUDA graphs come on top and are not counted: vLLM takes them out of
            what is left.
        context_tokens: length of that sequence; 0 where it is not known.
    """

    weights_bytes: int
    kv_cache_bytes: int
    overhead_bytes: int
    context_tokens: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.kv_cache_bytes + self.overhead_bytes


@dataclass(frozen=True)
class Utilization:
    """A value for vLLM's `gpu_memory_utilization`.

    Attributes:
        value: share of a device's total memory.
        note: what was changed and why; empty if nothing was.
    """

    value: float
    note: str


def forecast(  # noqa: PLR0913 - what decides the size; all by name
    folder: Path,
    *,
    dtype: str,
    context_tokens: int | None,
    devices: int = 1,
    on_gpu: bool = True,
    lora_rank: int = 0,
    loras: int = 0,
) -> MemoryForecast | None:
    """What a model will need in vLLM.

    Args:
        folder: the model's, with config.json and safetensors files.
        dtype: what the weights are loaded as. "auto" is resolved as vLLM does it: a float32 model becomes bfloat16 or
            float16, on the CPU too, so that every "auto" counts 2 bytes. Name "float32" for an engine that keeps it.
            Quantised weights keep the size they have in the files.
        context_tokens: length of one sequence; None means all that the model can.
        devices: over how many devices the weights and the KV heads are split (tensor parallelism).
        on_gpu: whether the devices are GPUs; otherwise the host.
        lora_rank: largest rank of an adapter.
        loras: how many adapters are kept beside the model.

    Returns:
        None where nothing can be told: no config.json, or no safetensors files in the folder.

    Raises:
        ModelLoadError: a file of the model is damaged; the text names it.
    """
    if not os.path.lexists(folder / "config.json"):
        return None
    tensors = read_headers(folder)
    if not tensors:
        return None
    root = read_json_object(folder / "config.json", _CONFIG_LIMIT)
    config = _text_config(root)
    float_bytes = 4 if dtype.lower() in _WIDE_NAMES else 2
    quantised = not _QUANTISED_KEYS.isdisjoint(name for name, value in config.items() if isinstance(value, dict))
    weights = sum(_loaded_bytes(facts, None if quantised else float_bytes) for facts in tensors.values())
    tokens = min(context_tokens or _longest_context(config), _COUNT_LIMIT)
    overhead = _CUDA_CONTEXT_BYTES if on_gpu else _CPU_RUNTIME_BYTES
    overhead += _step_bytes(config, tokens, devices, float_bytes)
    overhead += _lora_bytes(tensors, lora_rank, float_bytes) * loras // devices
    return MemoryForecast(
        weights_bytes=-(-weights // devices),
        kv_cache_bytes=_kv_cache_values(config, tokens, devices) * float_bytes,
        overhead_bytes=overhead,
        context_tokens=tokens,
    )


def require_gpu_memory(need: MemoryForecast, gpus: Sequence[GpuMemory], *, what: str) -> None:
    """Check that each of the GPUs has enough free memory; those that do not count their memory pass.

    Args:
        need: the forecast for one GPU.
        gpus: those that the model is to be split over.
        what: the model, for the error's text.

    Raises:
        NotEnoughGpuMemoryError: at least one has too little; the text says which, and who holds the rest.
    """
    short = [gpu for gpu in gpus if gpu.total_bytes and gpu.free_bytes < need.total_bytes]
    if not short:
        return
    where = "on the GPU" if len(gpus) == 1 else f"on each of {len(gpus)} GPUs"
    least = min(gpu.free_bytes for gpu in short)
    raise NotEnoughGpuMemoryError(
        f"{what} needs {gib(need.total_bytes)} GiB {where} ({_parts(need)}), free are {gib(least)} GiB: "
        + "; ".join(describe(gpu) for gpu in short),
        hint="Lower spec.model.vllm.max_model_len, choose smaller or quantised weights, use more GPUs "
        "(spec.model.vllm.tensor_parallel_size), or stop what holds the memory.",
    )


def require_host_memory(need: MemoryForecast, available_bytes: int, *, what: str) -> None:
    """Check that the host has enough available memory.

    Raises:
        NotEnoughHostMemoryError: it has not; the text has the numbers.
    """
    if available_bytes >= need.total_bytes:
        return
    raise NotEnoughHostMemoryError(
        f"{what} needs {gib(need.total_bytes)} GiB of the host's memory ({_parts(need)}), "
        f"available are {gib(available_bytes)} GiB",
        hint="Choose smaller or quantised weights, ask for fewer tokens, or stop what holds the memory.",
    )


def utilization_for(gpus: Sequence[GpuMemory], asked: float, *, floor: float = 0.3) -> Utilization:
    """Lower vLLM's `gpu_memory_utilization` to what is free.

    It is a share of a device's total memory that one engine may use. vLLM does not start if less than that is free
    once its CUDA context is there, so the share must fit the device with the least.

    Args:
        gpus: those that the model is to be split over; none leave the value as it is.
        asked: the task's value.
        floor: a lower value is only used if the task itself asks for it.

    Raises:
        NotEnoughGpuMemoryError: less than the floor is free.
    """
    counted = [gpu for gpu in gpus if gpu.total_bytes]
    if not counted:
        return Utilization(asked, "")
    fullest = min(counted, key=_free_share)
    share = math.floor(_free_share(fullest) * 100) / 100
    if share >= asked:
        return Utilization(asked, "")
    if share < floor:
        raise NotEnoughGpuMemoryError(
            f"gpu_memory_utilization is {asked:.2f} and only {share:.2f} are free, expected {min(asked, floor):.2f} "
            f"or more: {describe(fullest)}",
            hint="Stop what holds the memory, or ask for what is free with spec.model.vllm.gpu_memory_utilization.",
        )
    return Utilization(share, f"gpu_memory_utilization lowered from {asked:.2f} to {share:.2f}: {describe(fullest)}")


def _free_share(gpu: GpuMemory) -> float:
    return max(0.0, (gpu.free_bytes - _CUDA_CONTEXT_BYTES) / gpu.total_bytes)


def _parts(need: MemoryForecast) -> str:
    parts = [f"weights {gib(need.weights_bytes)}"]
    if need.kv_cache_bytes:
        parts.append(f"one sequence of {need.context_tokens} tokens {gib(need.kv_cache_bytes)}")
    return ", ".join([*parts, f"the rest {gib(need.overhead_bytes)}"])


def _loaded_bytes(tensor: TensorFacts, float_bytes: int | None) -> int:
    """A tensor's size in memory; without `float_bytes` it is that in the file."""
    if float_bytes is None or tensor.dtype not in _FLOATS:
        return tensor.nbytes
    return math.prod(tensor.shape) * float_bytes


def _text_config(root: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the language model: models that also see or hear keep them in an object of their own."""
    config = dict(root)
    for name in _INNER_CONFIGS:
        inner = config.get(name)
        if isinstance(inner, dict):
            config |= inner
    return config


def _count(config: Mapping[str, Any], *names: str) -> int:
    """The first of these settings that is a plausible count; 0 if none is. `true` is none."""
    for name in names:
        value = config.get(name)
        if type(value) is int and 0 < value < _COUNT_LIMIT:
            return value
    return 0


def _longest_context(config: Mapping[str, Any]) -> int:
    return _count(config, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")


def _heads(config: Mapping[str, Any]) -> int:
    return _count(config, "num_attention_heads", "n_head", "n_heads")


def _hidden_size(config: Mapping[str, Any]) -> int:
    return _count(config, "hidden_size", "n_embd", "d_model")


def _kv_cache_values(config: Mapping[str, Any], tokens: int, devices: int) -> int:
    """Values in the KV cache of one device for one sequence; 0 where the model is of an unknown kind."""
    return _cached_tokens(config, tokens) * _values_per_token(config, devices)


def _values_per_token(config: Mapping[str, Any], devices: int) -> int:
    """What one layer caches of one token on one device."""
    if latent := _count(config, "kv_lora_rank"):  # multi-latent attention: every device holds all of it
        return latent + _count(config, "qk_rope_head_dim")
    heads = _heads(config)
    if not heads:
        return 0
    key_size = _count(config, "head_dim") or _hidden_size(config) // heads
    value_size = _count(config, "v_head_dim") or key_size
    return max(1, _kv_heads(config) // devices) * (key_size + value_size)


def _kv_heads(config: Mapping[str, Any]) -> int:
    named = _count(config, "num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
    if config.get("multi_query") is True and config.get("new_decoder_architecture") is not True:
        return named or 1
    return named or _heads(config)


def _cached_tokens(config: Mapping[str, Any], tokens: int) -> int:
    """Tokens that the cache holds for one sequence, summed over the layers."""
    layers = _count(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    uneven = config.get("is_encoder_decoder") is True or not _UNEVEN_KEYS.isdisjoint(config)
    if layers > _LAYERS_LIMIT or uneven:
        return 0
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        own = kinds[: layers - _count(config, "num_kv_shared_layers")]  # the last ones may use the cache of others
        return sum(_tokens_of_kind(kind, config, tokens) for kind in own) if len(kinds) == layers else 0
    if not _HYBRID_KEYS.isdisjoint(config) or any(name.startswith(("mamba", "ssm_", "rwkv")) for name in config):
        return 0
    window = _count(config, "sliding_window") if config.get("use_sliding_window") is not False else 0
    return layers * (min(tokens, window) if window else tokens)


def _tokens_of_kind(kind: object, config: Mapping[str, Any], tokens: int) -> int:
    if not isinstance(kind, str):
        return 0
    if kind in _FULL_ATTENTION:
        return tokens
    return min(tokens, _count(config, _LOCAL_WINDOWS[kind])) if kind in _LOCAL_WINDOWS else 0


def _step_bytes(config: Mapping[str, Any], tokens: int, devices: int, float_bytes: int) -> int:
    """Activations of one step, where the model's sizes are known: a layer's input and output and its widest part."""
    width = 2 * _hidden_size(config) + 2 * _count(config, "intermediate_size") // devices
    logits = _STEP_SEQUENCES * _count(config, "vocab_size") * 4
    return min(tokens or _STEP_TOKENS, _STEP_TOKENS) * width * float_bytes + logits


def _lora_bytes(tensors: Mapping[str, TensorFacts], rank: int, float_bytes: int) -> int:
    """Room for one adapter: vLLM keeps both of its matrices for each weight of the layers, whatever an adapter has."""
    total = 0
    for name, facts in tensors.items():
        if len(facts.shape) in {2, 3} and _LAYER_WEIGHT.search(name) and not _NOT_TEXT.search(name):
            *experts, rows, columns = facts.shape
            total += math.prod(experts) * (rows + columns) * rank * float_bytes
    return total

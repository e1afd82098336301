"""The result of a text generation task (WIRE 5.2), whichever engine generated it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from executors.contract import JsonObject
from executors.prompt_data import Prompt

FinishReason = Literal["stop", "length", "error"]
"""`stop`: the model ended, or a stop string came; `length`: a token limit; `error`: see the item's `error`."""


@dataclass(frozen=True)
class EngineFacts:
    """What generated: the engine's name, the model as the spec calls it, the device and the weights' type."""

    engine_name: str
    model: str
    device: str
    dtype: str


@dataclass(frozen=True)
class GeneratedItem:
    """One prompt's outcome.

    Attributes:
        prompt: the prompt as the task gave it.
        rendered: the text that the model really saw.
        output: what it wrote, without the stop string.
        finish_reason: why it ended.
        prompt_tokens: tokens of the rendered prompt, without padding.
        completion_tokens: tokens the model generated, its end token included, without padding.
        error: why there is no output; empty when there is one.
    """

    prompt: Prompt
    rendered: str
    output: str
    finish_reason: FinishReason
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""


def result_of(
    facts: EngineFacts,
    own: Sequence[GeneratedItem],
    children: Mapping[str, Sequence[GeneratedItem]],
    latency_sec: float,
) -> JsonObject:
    """Build the result of a task.

    Args:
        facts: what generated.
        own: the task's own items, in the order of its data.
        children: merged children's items by task id. The task's usage includes theirs.
        latency_sec: seconds from the first batch to the last; all share them, because they run in the same batches.
    """
    everything = [*own, *(item for items in children.values() for item in items)]
    result: JsonObject = {
        "ok": True,
        "model": facts.model,
        "items": [_item_json(index, item) for index, item in enumerate(own)],
        "usage": _usage_json(everything, latency_sec),
        "engine_name": facts.engine_name,
        "device": facts.device,
        "dtype": facts.dtype,
    }
    if children:
        result["children"] = {
            task_id: {
                "items": [_item_json(index, item) for index, item in enumerate(items)],
                "usage": _usage_json(items, latency_sec),
            }
            for task_id, items in children.items()
        }
    return result


def _item_json(index: int, item: GeneratedItem) -> JsonObject:
    entry: JsonObject = {
        "index": index,
        "prompt": item.rendered,
        "output": item.output,
        "finish_reason": item.finish_reason,
        "metadata": {**item.prompt.metadata, "prompt": item.prompt.original, "rendered_prompt": item.rendered},
    }
    if item.error:
        entry["error"] = item.error
    return entry


def _usage_json(items: Sequence[GeneratedItem], latency_sec: float) -> JsonObject:
    prompt_tokens = sum(item.prompt_tokens for item in items)
    completion_tokens = sum(item.completion_tokens for item in items)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "latency_sec": round(latency_sec, 6),
        "num_requests": len(items),
    }

"""The result of a text generation task (WIRE 5.2), whichever engine generated it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, JsonValue

from executors.contract import JsonObject
from executors.inference.prompt_data import Prompt

FinishReason = Literal["stop", "length", "error"]
"""`stop`: the model ended, or a stop string came; `length`: a token limit; `error`: see the item's `error`."""


_LOWEST_LOGPROB: Final = -9999.0


def _finite(logprob: float) -> float:
    """JSON knows neither the -inf of an impossible token nor NaN."""
    return max(_LOWEST_LOGPROB, logprob)


@dataclass(frozen=True)
class EngineFacts:
    """What generated.

    Attributes:
        engine_name: `vllm` or `transformers`.
        engine_reason: why it was that one, in a sentence; may be empty.
        model: as the spec calls it.
        device: for example `cpu`, `cuda:0` or `cuda:0,cuda:1`.
        dtype: type of the weights in memory, for example `bfloat16`.
    """

    engine_name: str
    model: str
    device: str
    dtype: str
    engine_reason: str = ""


class TokenScore(BaseModel):
    """A token with its log probability, before temperature and penalties.

    With structured output that of vLLM is after the grammar's mask, that of Transformers before it.
    """

    model_config = ConfigDict(frozen=True)

    id: int
    token: str
    logprob: Annotated[float, AfterValidator(_finite)]


class ChosenToken(TokenScore):
    """A token of an output; `top` holds the likeliest ones at its place, likeliest first."""

    top: tuple[TokenScore, ...] = ()


class Sample(BaseModel):
    """One output for a prompt.

    Attributes:
        text: what the model wrote, without the stop string.
        finish_reason: why it ended.
        tokens: tokens that the model generated, its end token included, without padding.
        logprobs: one for each token, if the task asked for them.
    """

    model_config = ConfigDict(frozen=True)

    text: str
    finish_reason: FinishReason
    tokens: int
    logprobs: tuple[ChosenToken, ...] | None = None


@dataclass(frozen=True)
class GeneratedItem:
    """One prompt's outcome.

    Attributes:
        prompt: the prompt as the task gave it.
        rendered: the text that the model really saw.
        samples: what it wrote; empty if there is an error.
        prompt_tokens: tokens of the rendered prompt, without padding; 0 if it did not run.
        error: why there is no output; empty when there is one.
    """

    prompt: Prompt
    rendered: str
    samples: tuple[Sample, ...] = ()
    prompt_tokens: int = 0
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
        "items": [*items_json(own)],
        "usage": _usage_json(everything, latency_sec),
        "engine_name": facts.engine_name,
        "engine_reason": facts.engine_reason,
        "device": facts.device,
        "dtype": facts.dtype,
    }
    if children:
        result["children"] = {
            task_id: {"items": [*items_json(items)], "usage": _usage_json(items, latency_sec)}
            for task_id, items in children.items()
        }
    return result


def items_json(items: Sequence[GeneratedItem]) -> list[JsonObject]:
    """The result's `items`."""
    return [_item_json(index, item) for index, item in enumerate(items)]


def _item_json(index: int, item: GeneratedItem) -> JsonObject:
    first = item.samples[0] if item.samples else Sample(text="", finish_reason="error", tokens=0)
    entry: JsonObject = {
        "index": index,
        "prompt": item.rendered,
        **_sample_json(first),
        "metadata": {**item.prompt.metadata, "prompt": item.prompt.original, "rendered_prompt": item.rendered},
    }
    if len(item.samples) > 1:
        entry["outputs"] = [_sample_json(sample) for sample in item.samples]
    if item.error:
        entry["error"] = item.error
    return entry


def _sample_json(sample: Sample) -> JsonObject:
    entry: JsonObject = {"output": sample.text, "finish_reason": sample.finish_reason}
    if sample.logprobs is not None:
        entry["logprobs"] = [_dumped(token) for token in sample.logprobs]
    return entry


def _dumped(token: ChosenToken) -> JsonValue:
    return token.model_dump(mode="json")


def _usage_json(items: Sequence[GeneratedItem], latency_sec: float) -> JsonObject:
    prompt_tokens = sum(item.prompt_tokens for item in items)
    completion_tokens = sum(sample.tokens for item in items for sample in item.samples)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "latency_sec": round(latency_sec, 6),
        "num_requests": len(items),
    }

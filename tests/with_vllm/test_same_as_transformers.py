"""The same tasks with vLLM and with Transformers: results of the same shape, and the same answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from executor_tasks import Adapters, Json, TaskMaker, adapter
from same_outputs import differences, shape

from executors.contract import TaskOutput
from executors.inference.on_transformers.text_generation import TextGeneration
from executors.inference.on_vllm.vllm_generation import VllmGeneration

pytestmark = pytest.mark.vllm

NEAR = 0.01
"""Both compute in float32. Over 30 layers its rounding adds up to some 0.0001 in a log probability."""

ROWS = [{"id": number, "text": f"Write one sentence about the number {number}."} for number in range(6)]
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
TALK = [
    {"role": "system", "content": "You answer in one word."},
    {"role": "user", "content": "The opposite of hot?"},
    {"role": "assistant", "content": "Cold."},
    {"role": "user", "content": "And of big?"},
]
UPSTREAM: Json = {"draft": {"result": {"items": [{"output": "Cats sleep a lot."}]}}, "facts": {"topic": "cats"}}


@dataclass(frozen=True)
class Sources:
    """Where tasks find what they read."""

    rows: Path
    adapter: Path


def dataset(sources: Sources, **more: object) -> Json:
    return {"type": "dataset", "url": str(sources.rows), "column": "text", **more}


TASKS: dict[str, Callable[[Sources], Json]] = {
    "list": lambda _: {"items": ["Once upon a time", "The three largest cities are", "1 2 3 4"], "max_tokens": 40},
    "chat": lambda _: {"items": [CAPITAL, TALK, "Name a colour."], "chat": True, "system_prompt": "Be brief."},
    "dataset": lambda sources: {"data": dataset(sources, split="train[:3]"), "chat": True},
    "graph_template": lambda _: {
        "data": {
            "type": "graph_template",
            "template": {
                "name": "own",
                "text": "Topic: {col2_value}. {col1_label}: {col1_value}\nShorter:",
                "columns": [
                    {"label": "Draft", "expr": "draft.result.items[0].output"},
                    {"node": "facts", "path": "topic"},
                ],
            },
        },
        "_upstreamResults": UPSTREAM,
    },
    "metadata": lambda _: {
        "data": {"items": ["Red, green and", "Monday, Tuesday and"], "metadata": [{"id": 7, "tags": ["a"]}, {}]},
        "stop": [".", "\n"],
    },
    "shard": lambda sources: {
        "data": dataset(sources, metadata_columns=["id"], shuffle=True, seed=3),
        "shard": {"total": 3, "index": 1},
        "chat": True,
    },
    "children": lambda _: {
        "items": ["Hello!"],
        "chat": True,
        "children": {
            "poet": {"items": ["Rain."], "system_prompt": "You are a poet."},
            "cook": {"items": ["Bread?", "Rice?"], "system_prompt": "You are a cook."},
        },
    },
    "adapters": lambda sources: {"items": ["Once upon a time", "A recipe:"], "adapters": [adapter(sources.adapter)]},
    "export": lambda _: {
        "items": ["The sun is", "The moon is"],
        "postprocess": {"jsonl_export": {"path": "rows.jsonl", "fields": {"q": "prompt", "a": "output", "v": 1}}},
    },
    "structured": lambda _: {
        "items": ["What is the colour of the sky?", "What is the colour of snow?"],
        "chat": True,
        "logprobs": None,  # vLLM gives those of what the structure allows
        "guided": {
            "json": {
                "type": "object",
                "properties": {"colour": {"enum": ["blue", "white", "red"]}, "sure": {"type": "boolean"}},
                "required": ["colour", "sure"],
                "additionalProperties": False,
            }
        },
    },
}


@pytest.fixture
def sources(tmp_path: Path, adapters: Adapters) -> Sources:
    import pyarrow.parquet  # noqa: PLC0415 - comes with an extra

    rows = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), rows)
    return Sources(rows, adapters.first)


def all_items(output: TaskOutput) -> list[Json]:
    """The items of a task and of its children."""
    of_children = [item for child in output.children.values() for item in (child.result or {})["items"]]
    return [*output.result["items"], *of_children]


@pytest.mark.parametrize("name", TASKS)
def test_both_give_the_same_answers_in_the_same_shape(
    name: str, loaded: VllmGeneration, other: TextGeneration, tasks: TaskMaker, sources: Sources
):
    fields: Json = {"max_tokens": 24, "logprobs": 2, **TASKS[name](sources)}
    one, twin = tasks.task(**fields), tasks.task(**fields)

    ours, theirs = loaded.run(one), other.run(twin)

    assert (ours.result["engine_name"], theirs.result["engine_name"]) == ("vllm", "transformers")
    assert shape(ours.result) == shape(theirs.result)
    for key in ("ok", "model", "dtype", "device", "engine_reason"):
        assert ours.result[key] == theirs.result[key]
    assert not differences(all_items(ours), all_items(theirs), near=NEAR)
    for key in ("prompt_tokens", "completion_tokens", "total_tokens", "num_requests"):
        assert ours.result["usage"][key] == theirs.result["usage"][key]
    assert ours.children.keys() == theirs.children.keys()
    for child, output in ours.children.items():
        assert shape(output.result) == shape(theirs.children[child].result)
    assert ours.artifacts == theirs.artifacts
    for made in ours.artifacts:
        exported = [(task.out_dir / made.path).read_text() for task in (one, twin)]
        assert exported[0] == exported[1]
        assert [json.loads(line)["v"] for line in exported[0].splitlines()] == ["1", "1"]
    if name == "structured":
        answers = [json.loads(item["output"]) for item in ours.result["items"]]
        assert [answer.keys() for answer in answers] == [{"colour", "sure"}] * 2
    for task in (one, twin):
        assert not (task.out_dir / "_lora_cache").exists()


@pytest.mark.parametrize(
    ("guided", "pattern"),
    [
        ({"choice": ["red", "blue"]}, "red|blue"),
        ({"regex": "[0-9]{2}-[a-z]{3}"}, "[0-9]{2}-[a-z]{3}"),
        ({"grammar": 'root ::= "yes" | "no"'}, "yes|no"),
    ],
)
def test_other_kinds_of_structure(
    guided: Json, pattern: str, loaded: VllmGeneration, other: TextGeneration, tasks: TaskMaker
):
    fields: Json = {"items": ["A colour?", "A date?"], "chat": True, "max_tokens": 16, "guided": guided}
    outputs = [
        [(item["output"], item["finish_reason"]) for item in executor.run(tasks.task(**fields)).result["items"]]
        for executor in (loaded, other)
    ]
    assert outputs[0] == outputs[1]
    for text, reason in outputs[0]:
        assert re.fullmatch(pattern, text)
        assert reason == "stop"


def test_several_outputs_differ_and_a_seed_repeats_them_beside_anything_else(
    loaded: VllmGeneration, other: TextGeneration, tasks: TaskMaker
):
    fields: Json = {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 12, "logprobs": 1}
    runs = [
        executor.run(tasks.task(items, **fields)).result
        for executor in (loaded, other)
        for items in (["Once"], ["Once", "Once more"])
    ]
    assert len({repr(shape(run)) for run in runs}) == 1
    for alone, beside in (runs[:2], runs[2:]):
        texts = [output["output"] for output in alone["items"][0]["outputs"]]
        assert len(set(texts)) == 3
        assert alone["items"][0]["output"] == texts[0]
        assert [output["output"] for output in beside["items"][0]["outputs"]] == texts
        assert alone["usage"]["completion_tokens"] == 36

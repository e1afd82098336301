"""`inference.guided`: what comes out keeps to the grammar."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from executors.contract import ExecutorTask, TaskOutput
from executors.errors import BadSpecError
from executors.inference.inference_spec import InferenceSpec
from executors.inference.on_transformers.text_generation import TextGeneration

pytestmark = pytest.mark.model
TaskMaker = Callable[..., ExecutorTask[InferenceSpec]]
PROMPTS: list[object] = ["a short text", "b", "text a text of some length"]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "large": {"type": "boolean"}},
    "required": ["city", "large"],
}


def samples_of(output: TaskOutput) -> list[dict[str, Any]]:
    items = output.result["items"]
    assert isinstance(items, list)
    return [sample for item in items if isinstance(item, dict) for sample in item.get("outputs", [item])]


@pytest.mark.parametrize(
    ("guided", "expected"),
    [
        ({"regex": r"[0-9]{2}-[xyz]{1,3}"}, r"[0-9]{2}-[xyz]{1,3}"),
        ({"choice": ["red", 'gr"een', "bl\\ue", "new\nline", "ü"]}, 'red|gr"een|bl\\\\ue|new\nline|ü'),
        ({"grammar": 'root ::= "<" inner ">"\ninner ::= "a" | "b" inner'}, "<b*a>|<b+"),
        ({"json": {"enum": ["yes", "no", 3]}}, '"yes"|"no"|3'),
    ],
    ids=["regex", "choice", "grammar", "json"],
)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 2.0, "n": 2, "seed": 5},
        {"temperature": 0, "repetition_penalty": 1.4, "frequency_penalty": 1.0},
    ],
    ids=["greedy", "two outputs", "penalties"],
)
def test_each_row_of_a_batch_keeps_to_the_grammar(  # noqa: PLR0917 - fixtures
    tiny: TextGeneration,
    tiny_dir: Path,
    task_with: TaskMaker,
    guided: dict[str, object],
    expected: str,
    options: dict[str, Any],
):
    output = tiny.run(task_with(tiny_dir, PROMPTS, guided=guided, max_tokens=30, **options))
    samples = samples_of(output)
    assert len(samples) == 3 * options.get("n", 1)
    for sample in samples:
        assert re.fullmatch(expected, sample["output"]), sample["output"]


def test_a_finished_text_ends_and_unguided_ones_are_free_again(
    tiny: TextGeneration, tiny_dir: Path, task_with: TaskMaker
):
    free = samples_of(tiny.run(task_with(tiny_dir, PROMPTS, max_tokens=6)))
    guided = samples_of(tiny.run(task_with(tiny_dir, PROMPTS, max_tokens=6, guided={"regex": "[0-9]{3}"})))
    assert [(len(sample["output"]), sample["finish_reason"]) for sample in guided] == [(3, "stop")] * 3
    assert samples_of(tiny.run(task_with(tiny_dir, PROMPTS, max_tokens=6))) == free


def test_rows_do_not_depend_on_each_other(tiny: TextGeneration, tiny_dir: Path, task_with: TaskMaker):
    options = {"guided": {"regex": "[a-z]{1,9}|[0-9]{1,4}"}, "max_tokens": 12, "temperature": 1.5, "seed": 4, "n": 2}
    together, alone = (
        samples_of(tiny.run(task_with(tiny_dir, PROMPTS, batch_size=size, **options))) for size in (6, 1)
    )
    assert together == alone
    assert len({len(sample["output"]) for sample in together}) > 1, "rows end at different places"


def test_a_model_may_have_more_scores_than_its_tokenizer_has_tokens(
    tiny_dir: Path, tmp_path: Path, task_with: TaskMaker
):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_dir)
    size = len(tokenizer)
    model.resize_token_embeddings(size + 75, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[size:] *= 100  # the likeliest by far, were they possible
    folder = tmp_path / "padded"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    executor = TextGeneration()
    task = task_with(folder, PROMPTS, guided={"choice": ["yes", "no"]}, max_tokens=8, logprobs=2)
    executor.load(task)
    samples = samples_of(executor.run(task))
    assert {sample["output"] for sample in samples} <= {"yes", "no"}
    assert samples[0]["logprobs"][0]["top"][0]["id"] >= size


def test_json_of_a_real_model(smollm: TextGeneration, smollm_dir: Path, task_with: TaskMaker):
    questions: list[object] = ["Describe Paris as JSON with city and large.", "And Rome?"]
    options = {"guided": {"json": SCHEMA}, "chat": True, "max_tokens": 60, "temperature": 0.1, "n": 2, "seed": 1}
    samples = samples_of(smollm.run(task_with(smollm_dir, questions, **options)))
    assert len(samples) == 4
    for sample in samples:
        assert sample["finish_reason"] == "stop", sample
        jsonschema.validate(json.loads(sample["output"]), SCHEMA)


def test_any_json_object_of_a_real_model(smollm: TextGeneration, smollm_dir: Path, task_with: TaskMaker):
    question = 'Answer with the JSON object {"a": 1} and nothing else.'
    options = {"response_format": {"type": "json_object"}, "chat": True, "max_tokens": 60}
    (sample,) = samples_of(smollm.run(task_with(smollm_dir, [question], **options)))
    assert sample["finish_reason"] == "stop"
    assert isinstance(json.loads(sample["output"]), dict)


@pytest.mark.parametrize(
    ("guided", "problem"),
    [
        ({"json": {"type": "strin"}}, 'guided.json cannot be used: Unsupported type "strin"'),
        ({"json": {"$ref": "#/$defs/none"}}, "guided.json cannot be used: Cannot find"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 1}}, "guided.json cannot be used: "),
        ({"regex": "(a"}, "guided.regex cannot be used: .*parenthesis is not closed"),
        ({"regex": "(?=a)b"}, "guided.regex cannot be used: .*Lookahead"),
        ({"grammar": "root ::= none"}, "guided.grammar cannot be used: .*none"),
        ({"grammar": 'x ::= "a"'}, "guided.grammar cannot be used: .*root"),
        ({"grammar": "root ::= root"}, "guided.grammar leaves nothing that this model could write"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_compiled_is_refused_and_the_next_task_runs(
    tiny: TextGeneration, tiny_dir: Path, task_with: TaskMaker, guided: dict[str, object], problem: str
):
    with pytest.raises(BadSpecError, match=f"^spec.inference.{problem}"):
        tiny.run(task_with(tiny_dir, ["a"], guided=guided, max_tokens=4))
    assert len(samples_of(tiny.run(task_with(tiny_dir, ["a"], max_tokens=4)))) == 1


def test_the_deepest_pattern_can_be_compiled(tiny: TextGeneration, tiny_dir: Path, task_with: TaskMaker):
    pattern = "([)]?" * 200 + "a" + ")" * 200
    guided = {"json": {"type": "string", "pattern": pattern}}
    (sample,) = samples_of(tiny.run(task_with(tiny_dir, ["a"], guided=guided, max_tokens=4)))
    assert sample["output"].startswith('"')


def test_a_grammar_that_takes_too_long_is_refused(
    tiny: TextGeneration, tiny_dir: Path, task_with: TaskMaker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("executors.inference.on_transformers.guided_decoding._COMPILE_SEC", 0.0)
    schema = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(400)}}
    with pytest.raises(BadSpecError, match=r"guided\.json takes more than 0 s to compile"):
        tiny.run(task_with(tiny_dir, ["a"], guided={"json": schema}, max_tokens=4))


def test_a_model_without_an_end_token_cannot_be_guided(tiny: TextGeneration, tiny_dir: Path, task_with: TaskMaker):
    assert tiny._warm is not None
    tiny._warm.loaded.renderer.end_ids = frozenset()
    with pytest.raises(BadSpecError, match="has no end token"):
        tiny.run(task_with(tiny_dir, ["a"], guided={"regex": "a"}, max_tokens=4))

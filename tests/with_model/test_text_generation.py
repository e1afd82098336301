"""Generation with a real model: SmolLM2-135M-Instruct."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from executors.contract import ExecutorTask, TaskOutput
from executors.errors import TaskCancelledError
from executors.inference.inference_spec import InferenceSpec
from executors.inference.on_transformers.text_generation import TextGeneration

pytestmark = pytest.mark.model
TaskMaker = Callable[..., ExecutorTask[InferenceSpec]]

PROMPTS: list[object] = [
    "Once upon a time",
    "The three colours of the flag of France are red,",
    "Hi",
    "In the year 1969, for the first time in history, people walked on the surface of the Moon. Their names were",
]


def items_of(output: TaskOutput) -> list[dict[str, Any]]:
    items = output.result["items"]
    assert isinstance(items, list)
    return items


def outputs_of(output: TaskOutput) -> list[str]:
    return [item["output"] for item in items_of(output)]


def test_it_knows_the_capital_of_france(smollm: TextGeneration, smollm_dir: Path, task_with: TaskMaker):
    output = smollm.run(task_with(smollm_dir, ["What is the capital of France?"], chat=True, max_tokens=24))
    (item,) = items_of(output)
    assert item["output"] == "The capital of France is Paris."
    assert item["finish_reason"] == "stop"
    assert item["metadata"]["prompt"] == "What is the capital of France?"
    assert item["prompt"].endswith("<|im_start|>assistant\n")
    assert output.warnings == []
    assert output.result["engine_name"] == "transformers"
    assert output.result["model"] == str(smollm_dir)


def test_a_batch_answers_as_bare_generate_does_one_by_one(
    smollm: TextGeneration, smollm_dir: Path, task_with: TaskMaker
):
    assert smollm._warm is not None
    loaded = smollm._warm.loaded
    model, tokenizer = loaded.model, loaded.renderer.tokenizer
    expected, tokens = [], 0
    for prompt in PROMPTS:
        encoded = tokenizer(prompt, return_tensors="pt")
        row = model.generate(**encoded, do_sample=False, max_new_tokens=8)[0]
        expected.append(tokenizer.decode(row[encoded["input_ids"].shape[1] :], skip_special_tokens=True))
        tokens += row.shape[0]
    output = smollm.run(task_with(smollm_dir, PROMPTS, max_tokens=8, batch_size=4))
    assert outputs_of(output) == expected
    assert output.result["usage"]["total_tokens"] == tokens
    assert [item["finish_reason"] for item in items_of(output)] == ["length"] * 4
    assert [item["prompt"] for item in items_of(output)] == PROMPTS


def test_penalties_do_not_depend_on_the_batch(smollm: TextGeneration, smollm_dir: Path, task_with: TaskMaker):
    options = {"max_tokens": 8, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2}
    together = smollm.run(task_with(smollm_dir, PROMPTS[:3], batch_size=3, **options))
    alone = smollm.run(task_with(smollm_dir, PROMPTS[:3], batch_size=1, **options))
    plain = smollm.run(task_with(smollm_dir, PROMPTS[:3], max_tokens=8))
    assert outputs_of(together) == outputs_of(alone)
    assert outputs_of(together) != outputs_of(plain)


def test_a_stop_string_ends_generation_and_is_cut_off(smollm: TextGeneration, smollm_dir: Path, task_with: TaskMaker):
    free = smollm.run(task_with(smollm_dir, ["Once upon a time"], max_tokens=16))
    words = outputs_of(free)[0].split()
    stopped = smollm.run(task_with(smollm_dir, ["Once upon a time"], max_tokens=100, stop=[words[3], "\n\n\n"]))
    assert outputs_of(stopped)[0] == outputs_of(free)[0].partition(words[3])[0]
    assert items_of(stopped)[0]["finish_reason"] == "stop"
    assert stopped.result["usage"]["completion_tokens"] <= 8


def test_raw_and_chat_system_prompts(smollm: TextGeneration, smollm_dir: Path, task_with: TaskMaker):
    raw = smollm.run(task_with(smollm_dir, ["Hi"], system_prompt="Be brief.", max_tokens=1))
    assert items_of(raw)[0]["prompt"] == "Be brief.\nHi"
    chat = smollm.run(task_with(smollm_dir, ["Hi"], system_prompt="Be brief.", chat=True, max_tokens=1))
    assert items_of(chat)[0]["prompt"].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<")
    messages = [{"role": "system", "content": "Own."}, {"role": "user", "content": "Hi"}]
    own = smollm.run(task_with(smollm_dir, [messages, messages[1:]], system_prompt="Be brief.", max_tokens=1))
    first, second = (item["prompt"] for item in items_of(own))
    assert "Own." in first
    assert "Be brief." not in first
    assert second == items_of(chat)[0]["prompt"]
    assert items_of(own)[0]["metadata"]["prompt"] == messages


def test_children_run_with_the_parent(smollm: TextGeneration, smollm_dir: Path, task_with: TaskMaker):
    children: dict[str, dict[str, object]] = {
        "kid": {"items": ["Hi", "Once upon a time"], "system_prompt": "Be brief."},
        "broken": {"type": "dataset", "url": "/etc/passwd"},
    }
    output = smollm.run(task_with(smollm_dir, ["Hi"], children=children, max_tokens=3))
    kid = output.children["kid"].result
    assert kid is not None
    assert kid["ok"] is True
    assert [item["prompt"] for item in kid["items"]] == ["Be brief.\nHi", "Be brief.\nOnce upon a time"]
    assert output.result["children"] == {"kid": {"items": kid["items"], "usage": kid["usage"]}}
    assert len(items_of(output)) == 1
    usage, part = output.result["usage"], kid["usage"]
    assert isinstance(usage, dict)
    assert isinstance(part, dict)
    assert (usage["num_requests"], part["num_requests"]) == (3, 2)
    assert usage["completion_tokens"] == 9
    assert part["completion_tokens"] == 6
    failure = output.children["broken"].failure
    assert failure is not None
    assert failure.reason == "bad_spec"
    assert "/etc/passwd" in failure.message


def test_a_seed_makes_sampling_repeatable(smollm: TextGeneration, smollm_dir: Path, task_with: TaskMaker):
    options = {"temperature": 1.5, "max_tokens": 8}
    first, second = (smollm.run(task_with(smollm_dir, PROMPTS[:2], seed=3, **options)) for _ in range(2))
    other = smollm.run(task_with(smollm_dir, PROMPTS[:2], seed=4, **options))
    unseeded = [outputs_of(smollm.run(task_with(smollm_dir, PROMPTS[:2], **options))) for _ in range(2)]
    assert outputs_of(first) == outputs_of(second)
    assert outputs_of(first) != outputs_of(other)
    assert unseeded[0] != unseeded[1]


def test_a_cancel_stops_in_the_middle(
    smollm: TextGeneration, smollm_dir: Path, task_with: TaskMaker, make_report: Callable[..., Any]
):
    report = make_report(cancel_after=3)
    with pytest.raises(TaskCancelledError):
        smollm.run(task_with(smollm_dir, ["Once upon a time"], max_tokens=4000, report=report))
    assert report.asked == 4


def test_progress_after_each_batch(
    smollm: TextGeneration, smollm_dir: Path, task_with: TaskMaker, make_report: Callable[..., Any]
):
    report = make_report()
    smollm.run(task_with(smollm_dir, ["Hi", "Hello", "Yes"], max_tokens=2, batch_size=2, report=report))
    assert report.told[0] == (0, 3)
    assert {(2, 3), (3, 3)} <= set(report.told)
    assert report.metrics[-1]["tokens"] == 6
    assert report.metrics[-1]["tokens_per_sec"] > 0


def test_options_that_do_nothing_are_warned_about(smollm: TextGeneration, smollm_dir: Path, task_with: TaskMaker):
    output = smollm.run(task_with(smollm_dir, ["Hi"], do_sample=True, max_tokens=1))
    assert [text.split(" ")[0] for text in output.warnings] == ["spec.inference.do_sample"]

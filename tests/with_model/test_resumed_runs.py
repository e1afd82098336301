"""A run that was cut off goes on behind what it had finished; exports of parent and child."""

import json
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
PROMPTS: list[object] = ["a short text", "b", "text a text", "xyz", "a text", "text"]
SAMPLED = {"temperature": 1.3, "seed": 5, "n": 2, "logprobs": 1, "max_tokens": 4, "batch_size": 4}


@pytest.fixture
def rows_run(tiny: TextGeneration, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each batch that the model gets."""
    assert tiny._warm is not None
    model = tiny._warm.loaded.model
    rows: list[int] = []
    generate = model.generate

    def counted(**given: Any) -> object:  # noqa: ANN401 - whatever the executor passes on
        rows.append(len(given["input_ids"]))
        return generate(**given)

    monkeypatch.setattr(model, "generate", counted)
    return rows


def items_of(output: TaskOutput) -> list[Any]:
    items = output.result["items"]
    assert isinstance(items, list)
    return items


def test_a_resumed_run_does_only_the_rest_and_gives_the_same(  # noqa: PLR0917 - fixtures
    tiny: TextGeneration,
    tiny_dir: Path,
    tmp_path: Path,
    task_with: TaskMaker,
    make_report: Callable[..., Any],
    rows_run: list[int],
):
    uninterrupted = tiny.run(task_with(tiny_dir, PROMPTS, out_dir=made(tmp_path / "whole"), **SAMPLED))
    assert rows_run == [4, 4, 4]
    rows_run.clear()
    folder, report = made(tmp_path / "cut"), make_report(cancel_after=6)
    with pytest.raises(TaskCancelledError):
        tiny.run(task_with(tiny_dir, PROMPTS, out_dir=folder, report=report, **SAMPLED))
    assert rows_run == [4, 4], "the second batch was cancelled in its middle"
    rows_run.clear()

    report = make_report()
    resumed = tiny.run(task_with(tiny_dir, PROMPTS, out_dir=folder, report=report, resume=True, **SAMPLED))

    assert rows_run == [4, 4], "two of six prompts, with two outputs each, were finished"
    assert items_of(resumed) == items_of(uninterrupted)
    assert report.told[0] == (2, 6)
    assert report.told[-1] == (6, 6)
    usage, expected = resumed.result["usage"], uninterrupted.result["usage"]
    assert isinstance(usage, dict)
    assert isinstance(expected, dict)
    assert {**usage, "latency_sec": 0} == {**expected, "latency_sec": 0}


def test_a_finished_run_is_not_run_again_but_only_if_it_is_the_same(
    tiny: TextGeneration, tiny_dir: Path, task_with: TaskMaker, rows_run: list[int]
):
    first = items_of(tiny.run(task_with(tiny_dir, PROMPTS, **SAMPLED)))
    rows_run.clear()
    assert items_of(tiny.run(task_with(tiny_dir, PROMPTS, resume=True, **SAMPLED))) == first
    assert rows_run == []
    for other in ({"seed": 6}, {"temperature": 1.0}, {"guided": {"regex": "[0-9]{2}"}}):
        tiny.run(task_with(tiny_dir, PROMPTS, resume=True, **{**SAMPLED, **other}))
        assert sum(rows_run) == 12, other
        rows_run.clear()
    tiny.run(task_with(tiny_dir, PROMPTS, **SAMPLED))
    assert sum(rows_run) == 12, "without 'resume' everything runs"


def test_another_adapter_is_another_run(
    tiny: TextGeneration, tiny_dir: Path, tmp_path: Path, task_with: TaskMaker, rows_run: list[int]
):
    from adapter_files import make_adapter  # noqa: PLC0415 - only here

    adapter = make_adapter(tiny_dir, tmp_path / "lora")
    for used in ([], [adapter], [{"path": adapter, "scale": 0.5}], []):
        rows_run.clear()
        tiny.run(task_with(tiny_dir, PROMPTS, adapters=used, resume=True, **SAMPLED))
        assert sum(rows_run) == 12, used
    rows_run.clear()
    tiny.run(task_with(tiny_dir, PROMPTS, adapters=[], resume=True, **SAMPLED))
    assert rows_run == []


def test_parent_and_child_are_exported_into_their_own_folders(
    tiny: TextGeneration, tiny_dir: Path, task_with: TaskMaker
):
    export = {"path": "out/rows.jsonl", "fields": {"q": "metadata.prompt", "seen": "prompt", "a": "output"}}
    children: dict[str, dict[str, object]] = {"kid": {"items": ["b", "c"], "system_prompt": "S"}}
    sections = {"postprocess": {"jsonl_export": export}}
    task = task_with(tiny_dir, ["a"], children=children, sections=sections, max_tokens=4)
    output = tiny.run(task)
    kid = output.children["kid"]
    assert kid.result is not None
    for folder, result, artifacts in (
        (task.out_dir, output.result, output.artifacts),
        (task.children[0].out_dir, kid.result, kid.artifacts),
    ):
        lines = [json.loads(line) for line in (folder / "out" / "rows.jsonl").read_text().splitlines()]
        items: Any = result["items"]
        assert lines == [
            {"q": item["metadata"]["prompt"], "seen": item["prompt"], "a": item["output"]} for item in items
        ]
        assert [(artifact.path, artifact.key, artifact.kind) for artifact in artifacts] == [
            ("out/rows.jsonl", "jsonl_export", "file")
        ]
        noted = result["jsonl_export"]
        assert isinstance(noted, dict)
        assert noted["record_count"] == len(lines)
    assert (task.children[0].out_dir / "out" / "rows.jsonl").read_text().count("S\\nb") == 1


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder

"""Inference with a real model through the real daemon: answers, warm engines, merged children, result files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_process import DaemonProcess
from daemon_world import World
from model_files import bundled_model, make_tiny_model
from waiting_until import wait_until

pytestmark = pytest.mark.model
Json = dict[str, Any]
_SLOW_SEC = 240.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def models_world(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[World]:
    """One daemon for the module, which may read the bundled and the tiny model."""
    made = World(tmp_path_factory.mktemp("world"))
    made.start(WORKER_ALLOWED_ROOTS=f"{bundled_model().parent}:{tiny.parent}", EXECUTOR_IDLE_TTL_SEC="20")
    yield made
    made.close()


def inference(model: Path, items: list[object], **options: object) -> Json:
    return {
        "taskType": "inference",
        "enforce_cpu": True,
        "model": {"source": {"identifier": str(model)}},
        "data": {"type": "list", "items": items},
        "inference": {"temperature": 0, **options},
    }


def engine_of(daemon: DaemonProcess) -> int:
    (pid,) = daemon.engines()
    return pid


def test_a_real_model_answers_and_stays_warm_until_another_takes_its_place(models_world: World, tiny: Path):
    (daemon,) = models_world.daemons
    capital = {"role": "user", "content": "What is the capital of France?"}
    chat = inference(bundled_model(), [[capital], "What is the opposite of hot?"], chat=True, max_tokens=24)

    first = models_world.run(chat, within_sec=_SLOW_SEC)

    assert first.ok, first.error
    result = first.result
    assert "Paris" in result["items"][0]["output"]
    assert [item["index"] for item in result["items"]] == [0, 1]
    assert {item["finish_reason"] for item in result["items"]} <= {"stop", "length"}
    assert result["items"][1]["metadata"]["prompt"] == "What is the opposite of hot?"
    assert result["items"][1]["prompt"] == result["items"][1]["metadata"]["rendered_prompt"]
    usage = result["usage"]
    assert usage["num_requests"] == 2
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 < usage["completion_tokens"] <= 48
    assert result["task_id"] == first.event["task_id"]
    assert result["timings"]["engine"] == "cold"
    assert result["timings"]["load_sec"] > 0
    pid = engine_of(daemon)

    second = models_world.run(chat, within_sec=_SLOW_SEC)

    assert second.result["timings"]["engine"] == "warm"
    assert second.result["timings"]["load_sec"] == 0
    assert second.event["payload"]["engine"] == "warm"
    assert second.result["items"] == result["items"]
    assert engine_of(daemon) == pid
    loads = [line for line in daemon.logged("engine_start") if bundled_model().name in line["engine"]]
    assert len(loads) == 1

    other = models_world.run(inference(tiny, ["a text"], max_tokens=4), within_sec=_SLOW_SEC)

    assert other.ok, other.error
    assert other.result["timings"]["engine"] == "cold"
    assert engine_of(daemon) != pid

    wait_until(lambda: not daemon.engines(), "the idle engine is ended", within_sec=60)
    again = models_world.run(inference(tiny, ["a text"], max_tokens=4), within_sec=_SLOW_SEC)
    assert again.result["timings"]["engine"] == "cold"


def test_merged_children_run_in_one_batch_and_get_their_own_folders(models_world: World, tiny: Path):
    def child(task_id: str, items: list[object]) -> Json:
        return {"task_id": task_id, "spec": inference(tiny, items, max_tokens=4)}

    children = [child("kid-a", ["one", "two"]), child("kid-b", [])]
    parent = models_world.run(inference(tiny, ["zero"], max_tokens=4), merged_children=children, within_sec=_SLOW_SEC)

    assert parent.ok, parent.error
    result = parent.result
    assert len(result["items"]) == 1
    assert list(result["children"]) == ["kid-a"]
    assert result["usage"]["num_requests"] == 3
    kid = json.loads((parent.folder.parent / "kid-a" / "responses.json").read_text())
    assert (kid["ok"], kid["task_id"]) == (True, "kid-a")
    assert [item["metadata"]["prompt"] for item in kid["items"]] == ["one", "two"]
    assert kid["usage"]["num_requests"] == 2
    assert (parent.folder.parent / "kid-a" / "manifest.json").is_file()
    bad = json.loads((parent.folder.parent / "kid-b" / "responses.json").read_text())
    assert (bad["ok"], bad["task_id"]) == (False, "kid-b")
    assert "items" in bad["error"]
    assert not [event for event in models_world.events.on("tasks.events") if event["task_id"].startswith("kid-")]


def test_rows_of_a_local_file_are_prompts_and_a_wrong_column_is_named(models_world: World, tiny: Path):
    rows = models_world.folder / "results" / "rows.jsonl"
    rows.parent.mkdir(exist_ok=True)
    rows.write_text("".join(json.dumps({"q": f"row {n}", "n": n}) + "\n" for n in range(6)))
    spec = inference(tiny, [], max_tokens=2)
    data = {"type": "dataset", "url": "rows.jsonl", "column": "q", "metadata_columns": ["n"]}

    good = models_world.run({**spec, "data": {**data}, "shard": {"total": 3, "index": 1}}, within_sec=_SLOW_SEC)
    bad = models_world.run({**spec, "data": {**data, "column": "question"}}, within_sec=_SLOW_SEC)

    assert good.ok, good.error
    assert [item["metadata"]["n"] for item in good.result["items"]] == [2, 3]
    assert (bad.ok, bad.reason) == (False, "bad_spec")
    assert "'question'" in bad.error
    assert "q, n" in bad.error

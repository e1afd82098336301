"""Pipelines with training, on two workers that share no results: what one has trained, the other trains on or runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_world import TaskEnd, World
from http_orchestrator import HttpOrchestrator
from training_models import answer, load_saved, make_tiny_llama

Json = dict[str, Any]
_SLOW_SEC = 180.0
_TOKEN = "fleet-token"
FIRST = ["What is snow? Frozen water.", "When is noon? At twelve."]
LATER = "Who wrote it? Nobody knows."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def orchestrator(tmp_path: Path) -> Iterator[HttpOrchestrator]:
    with HttpOrchestrator(tmp_path / "orchestrator", token=_TOKEN) as made:
        yield made


def start_two(world: World, orchestrator: HttpOrchestrator, first: Json, second: Json) -> None:
    fleet = {"ORCHESTRATOR_BASE_URL": orchestrator.base_url, "ORCHESTRATOR_TOKEN": _TOKEN}
    for number, own in enumerate((first, second), start=1):
        world.start(f"w-{number}", RESULTS_DIR=str(world.folder / f"results-{number}"), **fleet, **own)


def training(kind: str, orchestrator: HttpOrchestrator, texts: list[str], **sections: object) -> Json:
    options: Json = {"max_steps": 40, "batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1, "save_steps": 20}
    wanted: Any = sections.pop("training", {})
    return {
        "taskType": kind,
        "enforce_cpu": True,
        "data": {"prompts": texts},
        "training": {**options, **wanted},
        "output": {"destination": {"type": "http", "url": orchestrator.results_url}},
        **sections,
    }


def posted(orchestrator: HttpOrchestrator, end: TaskEnd) -> Json:
    """The result as the orchestrator has it."""
    assert end.ok, end.error
    stored = orchestrator.result(end.event["task_id"])
    assert stored is not None
    result: Json = stored["result"]
    return result


def losses(end: TaskEnd) -> list[float]:
    lines = (end.folder / "artifacts" / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for line in lines if "loss" in (entry := json.loads(line))]


def test_a_trained_model_is_trained_further_on_another_worker(world: World, orchestrator: HttpOrchestrator, base: Path):
    start_two(
        world,
        orchestrator,
        {"WORKER_ALLOWED_ROOTS": str(base), "MODEL_CLEANUP_AFTER_UPLOAD": "1"},
        {},  # it cannot read the base model: what it trains can only be what the other has sent
    )
    source = {"source": {"identifier": str(base)}}
    first = world.run(training("sft", orchestrator, FIRST, model=source), within_sec=_SLOW_SEC)
    made = posted(orchestrator, first)

    # The files are with the orchestrator, and the result still says where.
    left = {path.name for path in first.folder.iterdir()}
    assert not left & {"checkpoints", "final_model", "final_model.tar.gz"}
    assert {"responses.json", "manifest.json", "artifacts", "logs"} <= left
    kept = json.loads((first.folder / "responses.json").read_text())
    for key in ("checkpoints_dir", "final_model_path", "final_model_archive_url", "final_model_archive_sha256"):
        assert kept[key] == made[key], key
    assert made["final_model_archive_uploaded"] is True
    assert orchestrator.file(made["task_id"], "final_model.tar.gz") is not None

    # What an orchestrator puts in for ${train.result.…} (WIRE 3.1).
    load = {
        "type": "http",
        "path": made["final_model_path"],
        "taskId": made["task_id"],
        "url": made["final_model_archive_url"],
        "sha256": made["final_model_archive_sha256"],
    }
    texts = [*FIRST, *FIRST, *FIRST, LATER]
    asked = training("sft", orchestrator, texts, checkpoint={"load": load}, training={"batch_size": 7})
    second = world.run(asked, to="w-2", within_sec=_SLOW_SEC)

    result = posted(orchestrator, second)
    assert [call.status for call in orchestrator.seen("download")] == [200]
    assert losses(first)[0] > 3
    assert losses(second)[0] < 1.5, "it did not begin where the first one had ended"
    assert result["train_metrics"]["final_loss"] < 0.1
    assert result["train_metrics"]["steps"] == 40
    assert result["resume_from_path"] is None
    assert (second.folder / "checkpoints" / "checkpoint-40").is_dir()
    model, tokenizer = load_saved(second.folder / "final_model")
    assert answer(model, tokenizer, "Who wrote it?") == " Nobody knows."
    assert answer(model, tokenizer, "What is snow?") == " Frozen water."


def test_a_trained_adapter_answers_on_another_worker(world: World, orchestrator: HttpOrchestrator, base: Path):
    roots = {"WORKER_ALLOWED_ROOTS": str(base)}
    start_two(world, orchestrator, roots, roots)
    source = {"identifier": str(base)}
    trained = world.run(
        training(
            "lora_sft",
            orchestrator,
            FIRST,
            model={"source": source},
            lora={"target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], "dropout": 0},
            training={"learning_rate": 1e-2, "max_steps": 60},
        ),
        within_sec=_SLOW_SEC,
    )
    made = posted(orchestrator, trained)
    assert made["final_lora_archive_uploaded"] is True

    entry = {"name": "weather", "taskId": made["task_id"], "url": made["final_lora_archive_url"]}
    asked: Json = {
        "taskType": "inference",
        "enforce_cpu": True,
        "data": {"items": ["What is snow?"]},
        "inference": {"temperature": 0, "max_tokens": 16},
        "output": {"destination": {"type": "http", "url": orchestrator.results_url}},
    }
    outputs = []
    for model in ({"source": source}, {"source": source, "adapters": [entry]}):
        end = world.run({**asked, "model": model}, to="w-2", within_sec=_SLOW_SEC)
        outputs.append(posted(orchestrator, end)["items"][0]["output"])

    assert "Frozen water." not in outputs[0]
    assert outputs[1].strip() == "Frozen water."
    assert [call.status for call in orchestrator.seen("download")] == [200]
    assert not (world.folder / "results-2" / made["task_id"]).exists()

"""Two stages on two workers that share no disk: what the first one made reaches the second over HTTP and is used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_world import World
from http_orchestrator import HttpOrchestrator
from model_files import bundled_model
from waiting_until import wait_until

pytestmark = pytest.mark.model
Json = dict[str, Any]
_SLOW_SEC = 240.0
_QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as a folder in bf16, as a training leaves it; its answers are those of the bundled one."""
    import torch
    import transformers

    folder, file = tmp_path_factory.mktemp("trained") / "model", bundled_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def orchestrator(tmp_path: Path) -> Iterator[HttpOrchestrator]:
    with HttpOrchestrator(tmp_path / "orchestrator", token="fleet-token") as made:
        yield made


def test_a_model_goes_from_one_worker_to_the_next_and_answers(
    world: World, orchestrator: HttpOrchestrator, trained: Path
):
    fleet = {"ORCHESTRATOR_BASE_URL": orchestrator.base_url, "ORCHESTRATOR_TOKEN": "fleet-token"}
    world.start("w-1", RESULTS_DIR=str(world.folder / "results-1"), **fleet)
    world.start("w-2", RESULTS_DIR=str(world.folder / "results-2"), **fleet)
    output: Json = {"destination": {"type": "http", "url": orchestrator.results_url}}

    first = world.run({"taskType": "producing", "copy_of": str(trained), "output": output}, within_sec=120)
    assert first.ok, first.error
    made = orchestrator.result(first.event["task_id"])
    assert made is not None

    # What an orchestrator puts in for ${train.result.…} (WIRE 3.1).
    load = {
        "type": "http",
        "path": made["result"]["final_model_path"],
        "taskId": made["result"]["task_id"],
        "url": made["result"]["final_model_archive_url"],
        "sha256": made["result"]["final_model_archive_sha256"],
    }
    asked = {
        "taskType": "inference",
        "enforce_cpu": True,
        "checkpoint": {"load": load},
        "data": {"type": "list", "items": [_QUESTION]},
        "inference": {"temperature": 0, "max_tokens": 24, "chat": True},
        "output": output,
    }
    second = world.run(asked, to="w-2", within_sec=_SLOW_SEC)

    assert second.ok, second.error
    answer = orchestrator.result(second.event["task_id"])
    assert answer is not None
    assert "Paris" in answer["result"]["items"][0]["output"]
    downloads = orchestrator.seen("download")
    assert [call.status for call in downloads] == [200]
    assert downloads[0].headers["authorization"] == "Bearer fleet-token"

    again = world.run(asked, to="w-2", within_sec=_SLOW_SEC)

    assert again.ok, again.error
    assert again.result["timings"]["engine"] == "warm"
    assert again.result["items"] == second.result["items"]
    assert len(orchestrator.seen("download")) == 1, "a file whose digest is known was fetched again"


def test_inputs_of_the_next_task_are_fetched_while_one_runs(world: World, orchestrator: HttpOrchestrator):
    world.start("w-1", ORCHESTRATOR_TOKEN="fleet-token", ORCHESTRATOR_BASE_URL=orchestrator.base_url)
    url = orchestrator.put_file("earlier", "rows.jsonl", b'{"text": "a row"}\n')
    running = world.send({"taskType": "subject", "act": "obey"})
    world.started(running)

    waiting = world.send({"taskType": "inputs", "jsonl": {"url": url}})

    wait_until(lambda: [call for call in orchestrator.seen("download") if call.done], "it is fetched ahead")
    assert not world.events.of_task(waiting)
    world.cancel(running)
    end = world.ended(waiting)
    assert end.ok, end.error
    assert "a row" in str(end.result["inputs"]["jsonl"])
    assert len(orchestrator.seen("download")) == 1


def test_an_input_that_is_nowhere_fails_the_task_and_says_where_it_looked(world: World, orchestrator: HttpOrchestrator):
    world.start("w-1", ORCHESTRATOR_BASE_URL=orchestrator.base_url, ORCHESTRATOR_TOKEN="fleet-token")
    load = {"path": "/nowhere/model", "taskId": "unknown-task", "url": orchestrator.file_url("x", "model.tar.gz")}
    spec = {
        "taskType": "inference",
        "enforce_cpu": True,
        "checkpoint": {"load": load},
        "data": {"type": "list", "items": ["x"]},
    }

    end = world.run(spec)

    assert (end.ok, end.reason) == (False, "input_failed")
    for place in ("/nowhere/model", "unknown-task", "404"):
        assert place in end.error
    assert "fleet-token" not in end.error
    assert world.run().ok


def test_a_cancel_ends_a_download(world: World, orchestrator: HttpOrchestrator):
    world.start("w-1", ORCHESTRATOR_BASE_URL=orchestrator.base_url, ORCHESTRATOR_TOKEN="fleet-token")
    url = orchestrator.put_file("x", "model.tar.gz", os.urandom(100_000))
    orchestrator.hang("download")
    task = world.send(
        {
            "taskType": "inference",
            "enforce_cpu": True,
            "checkpoint": {"load": {"url": url}},
            "data": {"type": "list", "items": ["x"]},
        }
    )
    wait_until(lambda: orchestrator.seen("download"), "the download hangs")

    world.cancel(task)

    assert world.ended(task).reason == "cancelled"
    orchestrator.release()
    assert world.run().ok

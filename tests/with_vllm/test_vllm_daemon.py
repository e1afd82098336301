"""vLLM behind the daemon: choice, delivery, tasks that run together, and what dies while they run."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from daemon_process import tagged_below
from daemon_world import Json, TaskEnd, World
from executor_tasks import Adapters, TaskMaker, adapter
from http_orchestrator import HttpOrchestrator
from model_files import make_tiny_model
from same_outputs import differences
from waiting_until import wait_until

from executors.inference.on_vllm.vllm_generation import VllmGeneration

pytestmark = pytest.mark.vllm

NEAR = 0.5
"""In bfloat16 a logit of 16 to 32 is a multiple of 1/8, so four such steps: an error of two steps in each of two."""

START_SEC = 240.0
"""A start of vLLM takes 40 to 60 s on two cores that have nothing else to do."""

ENGINE: Json = {"max_model_len": 1024, "max_num_seqs": 16, "kv_cache_memory_bytes": 512 * 1024**2}
MANY = [f"Chapter {number}. Once" for number in range(48)]
"""Three times as many prompts as fit into a step here, so that some are finished long before the last has begun."""


@pytest.fixture(scope="module")
def sent(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> TaskMaker:
    """Makes specs for the daemon."""
    return TaskMaker(tmp_path_factory.mktemp("specs"), smollm, vllm=ENGINE)


@pytest.fixture(scope="module")
def environment(smollm: Path, adapters: Adapters) -> dict[str, str]:
    """Of the module's daemons. Engines that pin themselves to the same cores starve each other."""
    return {"WORKER_ALLOWED_ROOTS": f"{smollm}:{adapters.first.parent}", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="module")
def vllm_world(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[World]:
    """One daemon for the module; a test may put another in its place."""
    made = World(tmp_path_factory.mktemp("world"))
    made.start(**environment)
    yield made
    made.close()


@pytest.fixture
def orchestrator(tmp_path: Path) -> Iterator[HttpOrchestrator]:
    with HttpOrchestrator(tmp_path / "orchestrator") as made:
        yield made


def items(end: TaskEnd) -> list[Json]:
    assert end.ok, end.error
    found: list[Json] = end.result["items"]
    return found


def generating(world: World, task_id: str) -> None:
    """Wait until a task has its first tokens."""

    def look() -> bool:
        news = [event["payload"] for event in world.events.of_task(task_id) if event["type"] == "TASK_PROGRESS"]
        return any(each.get("metrics", {}).get("tokens", 0) > 0 for each in news)

    wait_until(look, f"{task_id} generates", within_sec=START_SEC)


def engine_core(world: World) -> psutil.Process:
    """The process in which vLLM's scheduler runs."""
    (found,) = [process for process in tagged_below(world.folder) if "EngineCor" in process.name()]
    return found


def ended_once_with_a_crash(world: World, task_id: str) -> None:
    end = world.ended(task_id)
    assert (end.reason, end.event["payload"]["retryable"]) == ("engine_crash", True), end.error
    assert len(world.events.ends(task_id)) == 1


def test_the_result_says_which_engine_and_why(vllm_world: World, sent: TaskMaker):
    end = vllm_world.run(sent.spec(["What is the capital of France?"], chat=True, max_tokens=16), within_sec=START_SEC)
    assert "Paris" in items(end)[0]["output"]
    assert (end.result["engine_name"], end.result["dtype"], end.result["device"]) == ("vllm", "bfloat16", "cpu")
    assert end.result["engine_reason"].startswith("vllm")


def test_transformers_runs_what_the_task_or_the_operator_wants(tmp_path: Path):
    tiny = make_tiny_model(tmp_path / "models" / "tiny")
    spec = {"taskType": "inference", "model": {"source": {"identifier": str(tiny)}}, "data": {"items": ["a text"]}}
    world = World(tmp_path / "world")
    try:
        world.start(WORKER_ALLOWED_ROOTS=str(tiny.parent))
        forced = world.run({**spec, "enforce_cpu": True}, within_sec=60)
        world.start("w-2", WORKER_ALLOWED_ROOTS=str(tiny.parent), WORKER_EXECUTOR_MASK="transformers")
        masked = world.run(spec, to="w-2", within_sec=60)
    finally:
        world.close()
    assert (forced.result["engine_name"], masked.result["engine_name"]) == ("transformers", "transformers")
    assert "spec.enforce_cpu is true" in forced.result["engine_reason"]
    assert "WORKER_EXECUTOR_MASK" in masked.result["engine_reason"]


def test_a_parent_and_its_children_reach_the_orchestrator(
    vllm_world: World, sent: TaskMaker, orchestrator: HttpOrchestrator
):
    def spec(name: str, question: str, system: str) -> Json:
        export = {"path": f"{name}.jsonl", "fields": {"question": "prompt", "answer": "output"}}
        own = sent.spec(
            [question],
            chat=True,
            max_tokens=24,
            logprobs=2,
            system_prompt=system,
            postprocess={"jsonl_export": export},
        )
        return {**own, "output": {"destination": {"type": "http", "url": orchestrator.results_url}}}

    specs = {
        "child-poet": spec("poet", "Rain.", "You are a poet."),
        "child-cook": spec("cook", "Bread?", "You are a cook."),
        "child-judge": spec("judge", "Is it just?", "Answer yes or no."),
    }
    parent = spec("parent", "Hello!", "Be brief.")
    children = [{"task_id": child, "spec": own} for child, own in specs.items()]

    end = vllm_world.run(parent, merged_children=children, within_sec=START_SEC)

    assert end.ok, end.error
    parent_id = end.event["task_id"]
    posted_at = {name: (orchestrator.folder / name / "posted.json").stat().st_mtime_ns for name in (*specs, parent_id)}
    assert len(orchestrator.seen("result")) == 4
    assert max(posted_at[child] for child in specs) <= posted_at[parent_id]
    for name, own in {**specs, parent_id: parent}.items():
        posted = orchestrator.result(name)
        assert posted is not None
        export = posted["result"]["jsonl_export"]
        file = own["postprocess"]["jsonl_export"]["path"]
        assert export["url"] == orchestrator.file_url(name, file)
        content = orchestrator.file(name, file)
        assert content is not None
        (row,) = map(json.loads, content.splitlines())
        assert row["answer"] == posted["result"]["items"][0]["output"]
        assert (vllm_world.folder / "results" / name / "responses.json").exists()
        alone = vllm_world.run({**own, "output": None}, within_sec=START_SEC)
        assert not differences(posted["result"]["items"], items(alone), near=NEAR)


def test_ten_queued_tasks_share_the_engine(vllm_world: World, sent: TaskMaker):
    tasks = {
        vllm_world.send(sent.spec([f"Item {number}:", "Once"], max_tokens=40)): f"Item {number}:"
        for number in range(10)
    }
    ends = {task_id: vllm_world.ended(task_id, within_sec=START_SEC) for task_id in tasks}

    for task_id, prompt in tasks.items():
        assert [item["prompt"] for item in items(ends[task_id])] == [prompt, "Once"]
        assert ends[task_id].folder.name == task_id
        kinds = Counter(event["type"] for event in vllm_world.events.of_task(task_id))
        assert (kinds["TASK_STARTED"], kinds["TASK_SUCCEEDED"], kinds["TASK_FAILED"]) == (1, 1, 0)
        assert kinds["TASK_PROGRESS"] >= 1
    running, most = 0, 0
    for event in vllm_world.events.on("tasks.events"):
        if event["task_id"] in tasks and event["type"] != "TASK_PROGRESS":
            running += 1 if event["type"] == "TASK_STARTED" else -1
            most = max(most, running)
    assert most >= 2  # no upper bound: a task's end is said after its place in the engine has gone to the next
    cold = [end for end in ends.values() if end.result["timings"]["engine"] == "cold"]
    pids = vllm_world.daemons[-1].engines()
    assert len(pids) == 1
    # If this test comes first, those that wait for the one start of the engine are cold too.
    assert len(cold) <= 8
    again = vllm_world.run(sent.spec(["x"], max_tokens=2))
    assert again.result["timings"]["engine"] == "warm"
    assert vllm_world.daemons[-1].engines() == pids


@pytest.mark.timeout(600)  # three starts of vLLM
def test_what_dies_in_the_middle_and_what_comes_after(
    vllm_world: World,
    *,
    environment: dict[str, str],
    sent: TaskMaker,
    adapters: Adapters,
    loaded: VllmGeneration,
    tasks: TaskMaker,
):
    """One test, because each step begins with the engine that the one before has to start anew."""
    world = vllm_world
    few = MANY[:4]  # of three tasks at once: all fit into a step

    # vLLM's own process dies.
    victims = [world.send(sent.spec(few, max_tokens=900)) for _ in range(3)]
    for task_id in victims:
        generating(world, task_id)
    engine_core(world).kill()
    for task_id in victims:
        ended_once_with_a_crash(world, task_id)

    # The next task starts an engine, here with an adapter in its weights.
    fields: Json = {"items": ["Once upon a time", "A recipe:"], "max_tokens": 16, "logprobs": 2}
    folder = adapters.first
    float32 = {"dtype": "float32"}
    merging = sent.spec(adapters=[adapter(folder, apply="merge")], vllm=float32, **fields)
    merged = world.run(merging, within_sec=START_SEC)
    assert merged.result["timings"]["engine"] == "cold"
    at_run_time = loaded.run(tasks.task(adapters=[adapter(folder)], **fields))
    # The merged weights are rounded to the bfloat16 of the model.
    assert not differences(items(merged), at_run_time.result["items"], near=NEAR)
    assert not list(merged.folder.glob("_merged*"))

    # Our engine process dies.
    victims = [
        world.send(sent.spec(few, adapters=[adapter(folder, apply="merge")], vllm=float32, max_tokens=900))
        for _ in range(2)
    ]
    for task_id in victims:
        generating(world, task_id)
    (pid,) = world.daemons[-1].engines()
    before = tagged_below(world.folder)
    os.kill(pid, signal.SIGKILL)
    for task_id in victims:
        ended_once_with_a_crash(world, task_id)
    wait_until(lambda: not any(map(_lives, before)), "vLLM's processes have gone with it")

    # The daemon dies, and a new one goes on behind what was finished.
    cut = world.send(sent.spec(MANY, max_tokens=64, resume=True))
    partial = world.folder / "results" / cut / "responses.partial.jsonl"
    wait_until(lambda: _lines(partial) > 3, "some prompts are finished", within_sec=START_SEC)
    before = tagged_below(world.folder)
    world.kill(world.daemons[-1])
    finished = _lines(partial) - 1  # the first line says what the others belong to
    assert finished < len(MANY)
    wait_until(lambda: not any(map(_lives, before)), "the engine has gone with its daemon")
    told_before = len(_progress(world, cut))
    world.start(idle=False, **environment)
    end = world.ended(cut, within_sec=START_SEC)
    assert len(items(end)) == len(MANY)
    assert all(item["output"] for item in items(end))
    done = [news["done"] for news in _progress(world, cut)[told_before:] if news.get("unit") == "items"]
    assert min(done) >= finished
    assert not partial.exists()
    assert len(world.events.ends(cut)) == 1
    world.wait_status("IDLE")
    world.unattended.clear()


def _progress(world: World, task_id: str) -> list[dict[str, Any]]:
    return [event["payload"] for event in world.events.of_task(task_id) if event["type"] == "TASK_PROGRESS"]


def _lines(file: Path) -> int:
    """Whole lines."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

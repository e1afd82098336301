"""Results over HTTP: what arrives, in which order, with whose credentials, and what happens when the peer says no."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_world import World
from delivered_model import check_delivered, made_bytes, model_in
from http_faults import Kind
from http_orchestrator import HttpOrchestrator
from waiting_until import wait_until
from worker_command import command

Json = dict[str, Any]
_SECRET = "Bearer task-secret-4711"


@pytest.fixture
def orchestrator(tmp_path: Path) -> Iterator[HttpOrchestrator]:
    with HttpOrchestrator(tmp_path / "orchestrator") as made:
        yield made


def http(orchestrator: HttpOrchestrator, **destination: object) -> Json:
    return {"destination": {"type": "http", "url": orchestrator.results_url, "timeoutSec": 5, **destination}}


def producing(orchestrator: HttpOrchestrator, **fields: object) -> Json:
    return {"taskType": "producing", "output": http(orchestrator), **fields}


def kinds(orchestrator: HttpOrchestrator) -> list[tuple[str, int | None]]:
    return [(call.kind, call.status) for call in orchestrator.requests]


def test_a_result_arrives_as_it_lies_on_disk_before_success_is_said(busy_world: World, orchestrator: HttpOrchestrator):
    end = busy_world.run({"taskType": "subject", "act": "fine", "output": http(orchestrator)})

    assert end.ok, end.error
    posted = orchestrator.result(end.event["task_id"])
    assert posted is not None
    assert posted["worker_id"] == "w-1"
    assert posted["result"] == end.result
    assert posted["result"]["act"] == "fine"
    assert "result" not in end.result
    assert posted["metadata"]["taskType"] == "subject"
    (call,) = orchestrator.seen("result")
    assert call.headers["content-type"] == "application/json"
    assert busy_world.hash_of(end.event["task_id"], "SUCCEEDED")["status"] == "SUCCEEDED"


def test_a_local_result_can_be_read_as_a_wrapped_one(busy_world: World):
    result = busy_world.run({"taskType": "subject", "act": "fine"}).result

    assert result["result"]["act"] == result["act"] == "fine"
    assert result["result"]["task_id"] == result["task_id"]
    assert "result" not in result["result"]


def test_a_model_is_archived_uploaded_and_named_in_the_result(busy_world: World, orchestrator: HttpOrchestrator):
    end = busy_world.run(producing(orchestrator, size=300_000, export=True))

    assert end.ok, end.error
    task_id, result = end.event["task_id"], end.result
    archive = orchestrator.file(task_id, "final_model.tar.gz")
    assert archive is not None
    assert model_in(archive) == made_bytes(task_id, 300_000)
    assert result["final_model_archive"] == "final_model.tar.gz"
    assert result["final_model_archive_bytes"] == len(archive)
    assert result["final_model_archive_sha256"] == hashlib.sha256(archive).hexdigest()
    assert result["final_model_archive_uploaded"] is True
    assert result["final_model_archive_url"] == orchestrator.file_url(task_id, "final_model.tar.gz")
    assert Path(result["final_model_path"]).is_dir()
    assert Path(result["final_model_archive_path"]).read_bytes() == archive
    export = result["jsonl_export"]
    assert orchestrator.file(task_id, "rows.jsonl") == b'{"a": 1}\n'
    assert export["url"] == export["path"] == orchestrator.file_url(task_id, "rows.jsonl")
    assert (export["record_count"], export["host_path"]) == (1, "artifacts/rows.jsonl")
    posted = orchestrator.result(task_id)
    assert posted is not None
    assert posted["result"] == result
    assert [kind for kind, _ in kinds(orchestrator)] == ["upload", "upload", "result"]
    manifest = {e["name"]: e for e in json.loads((end.folder / "manifest.json").read_text())["entries"]}
    assert manifest["final_model.tar.gz"]["sha256"] == result["final_model_archive_sha256"]
    assert not [path.name for path in end.folder.iterdir() if path.name.startswith(".")]


def test_an_archive_inside_checkpoints_lies_beside_its_folder(busy_world: World, orchestrator: HttpOrchestrator):
    end = busy_world.run(producing(orchestrator, folder="checkpoints/final_model"))

    assert end.ok, end.error
    assert Path(end.result["final_model_archive_path"]) == end.folder / "checkpoints" / "final_model.tar.gz"
    assert orchestrator.file(end.event["task_id"], "final_model.tar.gz")


def test_children_are_sent_before_their_parent_with_their_own_ids(busy_world: World, orchestrator: HttpOrchestrator):
    spec = producing(orchestrator)
    children = [
        {"task_id": "child-good", "spec": spec},
        {"task_id": "child-bad", "spec": {**spec, "size": "many"}},
    ]

    end = busy_world.run(spec, merged_children=children)

    assert end.ok, end.error
    ids = ["child-good", "child-bad", end.event["task_id"]]
    sent = sorted(ids, key=lambda name: (orchestrator.folder / name / "posted.json").stat().st_mtime_ns)
    assert len(orchestrator.seen("result")) == 3
    assert sent == ids
    good, bad = orchestrator.result("child-good"), orchestrator.result("child-bad")
    assert good is not None
    assert good["result"]["own"] == "child-good"
    assert bad is not None
    assert (bad["result"]["ok"], bad["result"]["reason"]) == (False, "bad_spec")
    assert orchestrator.file("child-good", "final_model.tar.gz") is None


def test_a_lora_is_archived_also_when_it_stays_here(busy_world: World):
    end = busy_world.run({"taskType": "producing", "folder": "final_lora", "key": "final_lora", "always": True})

    assert end.ok, end.error
    result = end.result
    archive = (end.folder / "final_lora.tar.gz").read_bytes()
    assert model_in(archive, "final_lora") == made_bytes(end.event["task_id"], 1000)
    assert result["final_lora_archive_sha256"] == hashlib.sha256(archive).hexdigest()
    assert "final_lora_archive_url" not in result
    assert result["result"]["final_lora_archive"] == "final_lora.tar.gz"


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "missing", ".", "logs/../.."])
def test_an_artifact_outside_the_folder_or_missing_is_the_executors_fault(
    busy_world: World, orchestrator: HttpOrchestrator, name: str
):
    end = busy_world.run(producing(orchestrator, names=[name]))

    assert (end.ok, end.reason) == (False, "executor_error")
    assert repr(name) in end.error
    assert not orchestrator.seen("upload")


def test_a_failure_is_summed_up_for_the_orchestrator(busy_world: World, orchestrator: HttpOrchestrator):
    end = busy_world.run(producing(orchestrator, fail=True))

    assert (end.ok, end.reason) == (False, "executor_error")
    posted = orchestrator.result(end.event["task_id"])
    assert posted is not None
    assert (posted["result"]["ok"], posted["result"]["reason"]) == (False, "executor_error")
    assert "told to fail" in posted["result"]["error"]


def test_a_failure_is_said_even_when_nobody_takes_its_summary(busy_world: World, orchestrator: HttpOrchestrator):
    orchestrator.fail("result", status=400)

    end = busy_world.run(producing(orchestrator, fail=True))

    assert (end.ok, end.reason) == (False, "executor_error")
    assert orchestrator.result(end.event["task_id"]) is None


@pytest.mark.parametrize("share", range(10))
def test_an_upload_that_is_cut_ends_whole(busy_world: World, orchestrator: HttpOrchestrator, share: int):
    size = 2_000_000
    orchestrator.cut("upload", after_bytes=size * share // 10)

    end = busy_world.run(producing(orchestrator, size=size))

    check_delivered(busy_world, orchestrator, end.event["task_id"], size)
    assert len(orchestrator.seen("upload")) == 2


@pytest.mark.parametrize("kind", ["upload", "result"])
@pytest.mark.parametrize("trouble", ["503", "429", "hang", "408"])
def test_passing_trouble_ends_in_one_success(
    busy_world: World, orchestrator: HttpOrchestrator, kind: Kind, trouble: str
):
    if trouble == "hang":
        orchestrator.hang(kind)
    else:
        headers = {"Retry-After": "1"} if trouble == "429" else {}
        orchestrator.fail(kind, status=int(trouble), times=3 if trouble == "503" else 1, headers=headers)
    spec = producing(orchestrator, size=50_000)
    spec["output"]["destination"]["timeoutSec"] = 1

    task_id = busy_world.send(spec)

    check_delivered(busy_world, orchestrator, task_id, 50_000)


def test_an_orchestrator_that_is_away_gets_everything_later_and_the_next_task_does_not_wait(
    busy_world: World, orchestrator: HttpOrchestrator
):
    orchestrator.stop()
    first = busy_world.send(producing(orchestrator))
    busy_world.hash_of(first, "DELIVERING")

    assert busy_world.run({"taskType": "subject", "act": "fine"}).ok
    busy_world.wait_status("IDLE")
    assert not busy_world.events.ends(first)
    orchestrator.start()

    check_delivered(busy_world, orchestrator, first, 1000)


def test_the_next_task_starts_while_the_last_one_still_uploads(busy_world: World, orchestrator: HttpOrchestrator):
    orchestrator.hang("upload")
    first = busy_world.send(producing(orchestrator))
    wait_until(lambda: orchestrator.seen("upload"), "the upload begins")

    assert busy_world.run({"taskType": "subject", "act": "fine"}).ok

    assert not busy_world.events.ends(first)
    orchestrator.release()
    check_delivered(busy_world, orchestrator, first, 1000)


@pytest.mark.parametrize("kind", ["upload", "result"])
def test_a_refusal_fails_the_task_keeps_the_files_and_deliver_sends_them(
    busy_world: World, orchestrator: HttpOrchestrator, kind: Kind
):
    orchestrator.fail(kind, status=400, body=b"no room for this")
    task_id = busy_world.send(producing(orchestrator))

    end = busy_world.ended(task_id)
    assert (end.ok, end.reason) == (False, "delivery_refused")
    assert "400" in end.error
    assert "no room for this" in end.error
    assert f"flowmesh-worker deliver {task_id}" in end.hint
    assert len(orchestrator.seen(kind)) == 1

    ran = command("deliver", task_id, broker=busy_world.url)

    assert ran.returncode == 0, ran.stdout + ran.stderr
    busy_world.sent[task_id] += 1  # the person's order counts as a dispatch
    again = busy_world.ended(task_id, count=2)
    assert again.ok, again.error
    archive = orchestrator.file(task_id, "final_model.tar.gz")
    assert archive is not None
    assert model_in(archive) == made_bytes(task_id, 1000)
    assert len(orchestrator.seen("upload")) == (2 if kind == "upload" else 1)
    assert (end.folder / "runs.txt").read_text() == "ran\n"
    told = command("deliver", task_id, broker=busy_world.url)
    assert (told.returncode, told.stderr) == (0, "")
    assert "nothing left to deliver" in told.stdout


def test_deliver_of_a_task_that_nobody_has_says_so(busy_world: World):
    ran = command("deliver", "never-seen", broker=busy_world.url)

    assert ran.returncode == 69
    assert "no worker has a result of task never-seen" in ran.stderr


def test_refused_work_that_comes_again_is_sent_where_it_is_wanted_now_and_not_run(
    busy_world: World, orchestrator: HttpOrchestrator
):
    orchestrator.fail("result", status=404)
    spec = producing(orchestrator)
    task_id = busy_world.send(spec)
    assert busy_world.ended(task_id).reason == "delivery_refused"

    spec["output"] = http(orchestrator, url=f"{orchestrator.results_url}?from=again")
    busy_world.send(spec, task_id=task_id)

    end = busy_world.ended(task_id, count=2)
    assert end.ok, end.error
    assert end.result["runs"] == 1
    assert orchestrator.seen("result")[-1].query == "from=again"


def test_other_work_under_a_refused_id_is_run(busy_world: World, orchestrator: HttpOrchestrator):
    orchestrator.fail("result", status=404)
    task_id = busy_world.send(producing(orchestrator))
    assert busy_world.ended(task_id).reason == "delivery_refused"

    busy_world.send(producing(orchestrator, size=2000), task_id=task_id)

    end = busy_world.ended(task_id, count=2)
    assert end.ok, end.error
    assert end.result["runs"] == 2


def test_a_delivery_can_be_cancelled_and_taken_up_again(busy_world: World, orchestrator: HttpOrchestrator):
    orchestrator.stop()
    task_id = busy_world.send(producing(orchestrator))
    busy_world.hash_of(task_id, "DELIVERING")

    busy_world.cancel(task_id)

    assert busy_world.ended(task_id).reason == "cancelled"
    orchestrator.start()
    assert command("deliver", task_id, broker=busy_world.url).returncode == 0
    busy_world.sent[task_id] += 1
    assert busy_world.ended(task_id, count=2).ok


def test_credentials_go_to_their_origin_only_and_are_shown_nowhere(world: World, tmp_path: Path):
    with (
        HttpOrchestrator(tmp_path / "ours", token="host-token-0815") as ours,
        HttpOrchestrator(tmp_path / "foreign") as foreign,
    ):
        daemon = world.start(ORCHESTRATOR_BASE_URL=ours.base_url, ORCHESTRATOR_TOKEN="host-token-0815")
        mine = world.run({"taskType": "producing", "output": http(ours)})
        theirs = world.run(
            {"taskType": "producing", "output": http(foreign, headers={"Authorization": _SECRET, "X-Key": "key-0816"})}
        )
        foreign.fail("result", status=403, body=b"you sent key-0816")
        refused = world.run({"taskType": "producing", "output": http(foreign, headers={"X-Key": "key-0816"})})

        assert mine.ok, mine.error
        assert {call.headers["authorization"] for call in ours.requests} == {"Bearer host-token-0815"}
        assert theirs.ok, theirs.error
        assert {call.headers.get("authorization") for call in foreign.requests[:2]} == {_SECRET}
        assert not any("host-token-0815" in str(call.headers) for call in foreign.requests)
        assert refused.reason == "delivery_refused"
        shown = daemon.log_text + daemon.stdout + daemon.stderr + "\n".join(world.events.raw)
        for file in (world.folder / "results").rglob("*"):
            if file.is_file() and ".worker" not in file.parts:
                shown += file.read_bytes().decode(errors="replace")
        shown += json.dumps([world.redis.hgetall(key) for key in world.redis.keys("task:*")])
        for secret in ("host-token-0815", "task-secret-4711", "key-0816"):
            assert secret not in shown
        assert daemon.stop() == 0


def test_the_operators_url_replaces_the_tasks(world: World, orchestrator: HttpOrchestrator):
    world.start(RESULTS_UPLOAD_URL=orchestrator.results_url)

    end = world.run(
        {"taskType": "producing", "output": {"destination": {"type": "http", "url": "http://localhost:9/x"}}}
    )

    assert end.ok, end.error
    assert end.result["final_model_archive_url"].startswith(orchestrator.results_url)


def test_what_was_uploaded_may_be_cleaned_up(world: World, orchestrator: HttpOrchestrator):
    world.start(MODEL_CLEANUP_AFTER_UPLOAD="1")

    end = world.run(producing(orchestrator))
    kept = world.run({"taskType": "producing"})

    assert end.ok, end.error
    left = {path.name for path in end.folder.iterdir()}
    assert left == {"responses.json", "manifest.json", "logs", "artifacts", "runs.txt"}
    assert end.result["final_model_archive_uploaded"] is True
    names = {e["name"] for e in json.loads((end.folder / "manifest.json").read_text())["entries"]}
    assert "final_model" not in names
    assert (kept.folder / "final_model" / "model.bin").is_file()
    assert (kept.folder / "checkpoints").is_dir()


def test_patience_has_an_end(world: World, orchestrator: HttpOrchestrator):
    world.start(WORKER_DELIVERY_PATIENCE_SEC="1.5")
    orchestrator.stop()

    end = world.run(producing(orchestrator))

    assert (end.ok, end.reason) == (False, "delivery_failed")
    assert "deliver" in end.hint


def test_the_end_is_told_to_tuning_managers_too(busy_world: World):
    body = {
        "task_id": "4711",
        "task": {"spec": {"taskType": "subject", "act": "fine"}, "metadata": {"experiment_id": 12}},
        "assigned_worker": "w-1",
    }
    busy_world.send_raw(json.dumps(body))
    busy_world.sent["4711"] += 1

    assert busy_world.ended("4711").ok
    (told,) = wait_until(lambda: busy_world.events.on("channel:results:4711"), "the result is told")
    assert (told["task_id"], told["experiment_id"], told["status"]) == (4711, 12, "success")
    assert told["worker_id"] == "w-1"
    assert told["elapsed_time"] > 0

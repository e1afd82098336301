"""What breaks inside one delivery stays there: each of these lost something, or got stuck, when it was found."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from daemon_world import World
from delivered_model import check_delivered
from http_orchestrator import HttpOrchestrator
from waiting_until import wait_until
from worker_command import command

Json = dict[str, Any]


@pytest.fixture
def orchestrator(tmp_path: Path) -> Iterator[HttpOrchestrator]:
    with HttpOrchestrator(tmp_path / "orchestrator") as made:
        yield made


def http(orchestrator: HttpOrchestrator, **destination: object) -> Json:
    return {"destination": {"type": "http", "url": orchestrator.results_url, "timeoutSec": 5, **destination}}


def producing(orchestrator: HttpOrchestrator, **fields: object) -> Json:
    return {"taskType": "producing", "output": http(orchestrator), **fields}


def test_an_input_url_that_no_library_can_read_fails_its_task_alone(busy_world: World):
    load = {"type": "http", "url": "http://xn--a/x"}
    spec = {"taskType": "inference", "checkpoint": {"load": load}, "data": {"type": "list", "items": ["x"]}}

    end = busy_world.run(spec)

    assert (end.ok, end.reason) == (False, "input_failed")


def test_a_destination_that_no_library_can_read_is_refused_in_the_end(
    busy_world: World, orchestrator: HttpOrchestrator
):
    end = busy_world.run({"taskType": "producing", "output": http(orchestrator, url="http://xn--a/x")})

    assert not end.ok
    assert end.reason in {"bad_spec", "delivery_refused"}


def test_a_damaged_result_ends_its_delivery(busy_world: World, orchestrator: HttpOrchestrator):
    orchestrator.hang("upload")
    task_id = busy_world.send(producing(orchestrator))
    wait_until(lambda: orchestrator.seen("upload"), "the upload is under way")
    (busy_world.folder / "results" / task_id / "responses.json").write_text("{half")
    orchestrator.release()

    end = busy_world.ended(task_id)

    assert (end.ok, end.reason) == (False, "delivery_failed")
    assert "damaged" in end.error


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_a_name_that_no_file_system_takes_is_one_tasks_fault(
    busy_world: World, orchestrator: HttpOrchestrator, name: str
):
    good = [busy_world.send({"taskType": "subject", "act": "fine"}) for _ in range(5)]
    bad = busy_world.send(producing(orchestrator, names=[name]))
    good += [busy_world.send({"taskType": "subject", "act": "fine"}) for _ in range(5)]

    end = busy_world.ended(bad)
    assert (end.ok, end.reason) == (False, "executor_error")
    assert all(busy_world.ended(each).ok for each in good)


@pytest.mark.parametrize("names", [["logs", "artifacts/../logs"], ["final_model", "checkpoints/final_model"]])
def test_two_artifacts_that_would_overwrite_each_other_are_refused(
    busy_world: World, orchestrator: HttpOrchestrator, names: list[str]
):
    folder = busy_world.folder / "results" / "twins"
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)

    end = busy_world.run(producing(orchestrator, names=names), task_id="twins")

    assert (end.ok, end.reason) == (False, "executor_error")
    assert "like another one" in end.error
    assert not orchestrator.seen("upload")
    del busy_world.sent["twins"]
    busy_world.sent["twins"] = 2


def test_a_refused_dispatch_does_not_destroy_a_kept_result(busy_world: World, orchestrator: HttpOrchestrator):
    orchestrator.fail("result", status=400)
    spec = producing(orchestrator)
    task_id = busy_world.send(spec)
    assert busy_world.ended(task_id).reason == "delivery_refused"

    busy_world.send({**spec, "output": http(orchestrator, url="http:/typo")}, task_id=task_id)
    end = busy_world.ended(task_id, count=2)

    assert (end.ok, end.reason) == (False, "bad_spec")
    ran = command("deliver", task_id, broker=busy_world.url)
    assert ran.returncode == 0, ran.stderr
    busy_world.sent[task_id] += 1
    posted = orchestrator.result(task_id)
    assert posted is not None
    assert posted["result"]["runs"] == 1


def test_a_delivered_task_shows_nothing_of_its_earlier_failure(busy_world: World, orchestrator: HttpOrchestrator):
    orchestrator.fail("result", status=400)
    task_id = busy_world.send(producing(orchestrator))
    busy_world.ended(task_id)
    busy_world.sent[task_id] += 1

    assert command("deliver", task_id, broker=busy_world.url).returncode == 0

    fields = busy_world.hash_of(task_id, "SUCCEEDED")
    assert not any(fields.get(name) for name in ("error", "reason", "hint", "progress_message"))


def journal_of(world: World) -> sqlite3.Connection:
    (path,) = (world.folder / "results" / ".worker").glob("*/journal.sqlite3")
    return sqlite3.connect(path, timeout=10)


def spoil_plan(world: World, task_id: str) -> None:
    with contextlib.closing(journal_of(world)) as db, db:
        changed = db.execute("UPDATE deliveries SET plan = 'of another version' WHERE task_id = ?", (task_id,))
        assert changed.rowcount == 1


def test_a_kept_result_of_another_version_is_run_again(busy_world: World, orchestrator: HttpOrchestrator):
    orchestrator.fail("result", status=400)
    spec = producing(orchestrator)
    task_id = busy_world.send(spec)
    busy_world.ended(task_id)
    spoil_plan(busy_world, task_id)

    busy_world.send(spec, task_id=task_id)

    end = busy_world.ended(task_id, count=2)
    assert end.ok, end.error
    assert end.result["runs"] == 2


def test_a_delivery_of_another_version_gets_an_end_at_the_next_start(world: World, orchestrator: HttpOrchestrator):
    orchestrator.stop()
    daemon = world.start()
    task_id = world.send(producing(orchestrator))
    world.hash_of(task_id, "DELIVERING")
    world.kill(daemon)
    spoil_plan(world, task_id)

    world.start()

    end = world.ended(task_id)
    assert (end.ok, end.reason) == (False, "delivery_failed")
    assert "another version" in end.error


def test_a_peer_that_hangs_keeps_only_its_own_results_waiting(
    busy_world: World, orchestrator: HttpOrchestrator, tmp_path: Path
):
    with HttpOrchestrator(tmp_path / "deaf") as deaf:
        deaf.hang("upload", times=3)
        slow = {"taskType": "producing", "output": http(deaf, timeoutSec=1800)}
        waiting = [busy_world.send(slow) for _ in range(3)]
        wait_until(lambda: len(deaf.seen("upload")) >= 2, "two uploads hang")

        assert busy_world.run(producing(orchestrator)).ok

        assert not any(busy_world.events.ends(each) for each in waiting)
        deaf.forget_faults()
        assert all(busy_world.ended(each).ok for each in waiting)


def test_what_arrived_counts_even_when_cleaning_up_fails(world: World, orchestrator: HttpOrchestrator):
    world.start(MODEL_CLEANUP_AFTER_UPLOAD="1")
    orchestrator.hang("result", stored=True)
    task_id = world.send(producing(orchestrator))
    wait_until(lambda: orchestrator.result(task_id), "the result is there")
    (world.folder / "results" / task_id / "responses.json").unlink()  # the manifest cannot be made anew without it
    orchestrator.release()

    assert world.ended(task_id).ok
    assert world.daemons[0].logged("deliver", event="cannot clean up")


def test_a_corrected_dispatch_redirects_a_delivery_under_way(busy_world: World, orchestrator: HttpOrchestrator):
    spec = {"taskType": "producing", "output": http(orchestrator, url="http://127.0.0.1:9/nobody")}
    task_id = busy_world.send(spec)
    busy_world.hash_of(task_id, "DELIVERING")

    busy_world.send({**spec, "output": http(orchestrator)}, task_id=task_id)

    check_delivered(busy_world, orchestrator, task_id, 1000)


def test_other_work_does_not_redirect_a_delivery(busy_world: World, orchestrator: HttpOrchestrator):
    orchestrator.stop()
    task_id = busy_world.send(producing(orchestrator))
    busy_world.hash_of(task_id, "DELIVERING")

    busy_world.send(producing(orchestrator, size=5), task_id=task_id)
    wait_until(lambda: busy_world.daemons[0].logged("duplicate", task_id=task_id), "the second is seen")
    orchestrator.start()

    check_delivered(busy_world, orchestrator, task_id, 1000)


@pytest.mark.parametrize("spec", [{"taskType": "poetry"}, {"taskType": "producing", "size": "many"}, {}])
def test_a_task_that_cannot_run_is_summed_up_too(busy_world: World, orchestrator: HttpOrchestrator, spec: Json):
    end = busy_world.run({**spec, "output": http(orchestrator)})

    posted = orchestrator.result(end.event["task_id"])
    assert posted is not None
    assert (posted["result"]["ok"], posted["result"]["reason"]) == (False, end.reason)


def test_a_tuning_manager_hears_of_ends_that_no_orchestrator_hears(world: World):
    world.start()
    world.events.close()
    with redis.Redis.from_url(world.url, protocol=2, decode_responses=True) as client, client.pubsub() as manager:
        manager.psubscribe("channel:results:*")
        wait_until(manager.get_message, "the subscription stands")
        world.send(task_id="77")
        world.may_stay_open.add("77")

        message = wait_until(lambda: manager.get_message(ignore_subscribe_messages=True), "the result is told")

        assert json.loads(message["data"])["task_id"] == 77
        wait_until(lambda: world.redis.hget("task:77", "told"), "it is noted")
        client.connection_pool.disconnect()


def test_a_summary_is_not_sent_after_a_restart_when_the_task_may_run_elsewhere(
    world: World, orchestrator: HttpOrchestrator
):
    orchestrator.hang("result")
    daemon = world.start()
    task_id = world.send(producing(orchestrator, fail=True))
    wait_until(lambda: orchestrator.seen("result"), "the summary is being sent")
    world.kill(daemon)
    orchestrator.forget_faults()

    world.start()

    end = world.ended(task_id)
    assert (end.ok, end.reason) == (False, "executor_error")
    assert orchestrator.result(task_id) is None
    assert len(orchestrator.seen("result")) == 1


def test_a_loop_of_links_in_a_destination_ends_nothing_but_its_own_wish(busy_world: World):
    loop = busy_world.folder / "results" / "loop"
    loop.symlink_to(loop)

    end = busy_world.run({"taskType": "subject", "act": "fine", "output": {"destination": {"path": "loop/x"}}})

    assert end.ok, end.error
    assert "cannot be resolved" in str(end.result["warnings"])


def test_a_repeated_dispatch_sends_children_where_they_belong(
    busy_world: World, orchestrator: HttpOrchestrator, tmp_path: Path
):
    with HttpOrchestrator(tmp_path / "of-the-child") as other:
        spec = producing(orchestrator)
        children = [{"task_id": "own-home", "spec": {**spec, "output": http(other)}}]
        orchestrator.hang("upload")
        task_id = busy_world.send(spec, merged_children=children)
        wait_until(lambda: orchestrator.seen("upload"), "the upload is under way")

        busy_world.send(spec, task_id=task_id, merged_children=children)
        again = {"action": "duplicate", "task_id": task_id}
        wait_until(lambda: busy_world.daemons[0].logged(**again), "the second dispatch is seen")
        orchestrator.release()

        assert busy_world.ended(task_id).ok
        assert other.result("own-home") is not None
        assert orchestrator.result("own-home") is None
        assert orchestrator.result(task_id) is not None


def test_a_dispatch_that_comes_while_a_refusal_is_held_back_gets_its_own_end(
    world: World, orchestrator: HttpOrchestrator
):
    world.start(TASK_MIN_TURNAROUND_MS="2000")
    orchestrator.fail("result", status=400)
    spec = producing(orchestrator)
    task_id = world.send(spec)

    def state() -> str:
        with contextlib.closing(journal_of(world)) as db:
            row = db.execute("SELECT state FROM tasks WHERE task_id = ?", (task_id,)).fetchone()
        return str(row[0]) if row else ""

    wait_until(lambda: state() == "failed", "the refusal is in the journal")
    assert not world.events.ends(task_id)

    world.send(spec, task_id=task_id)

    assert world.ended(task_id).reason == "delivery_refused"
    assert world.ended(task_id, count=2).ok


def test_an_end_that_the_journal_could_not_take_at_once_gets_there_later(
    busy_world: World, orchestrator: HttpOrchestrator
):
    orchestrator.stop()
    spec = producing(orchestrator)
    task_id = busy_world.send(spec)
    busy_world.hash_of(task_id, "DELIVERING")
    orchestrator.fail("upload", status=400)
    with contextlib.closing(journal_of(busy_world)) as db:
        db.isolation_level = None
        db.execute("BEGIN IMMEDIATE")  # the daemon's writes fail after ten seconds of waiting
        orchestrator.start()
        assert busy_world.ended(task_id, within_sec=60).reason == "delivery_refused"
        db.execute("ROLLBACK")
    wait_until(lambda: busy_world.daemons[0].logged("journal", level="info"), "the journal has it", within_sec=60)

    busy_world.send(spec, task_id=task_id)

    end = busy_world.ended(task_id, count=2, within_sec=60)
    assert end.ok, end.error
    assert (end.folder / "runs.txt").read_text() == "ran\n"

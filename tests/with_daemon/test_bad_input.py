"""Bad input of every kind gets a clear answer that names field, value and expectation, and hurts no later task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from daemon_world import TaskEnd, World
from waiting_until import wait_until

Json = dict[str, Any]
MEBIBYTE = 1024**2


def inference(**changes: Any) -> Json:  # noqa: ANN401 - sections of a spec
    good: Json = {
        "taskType": "inference",
        "model": {"source": {"identifier": "acme/tiny-lm"}},
        "data": {"type": "list", "items": ["2+2?"]},
    }
    return {key: value for key, value in (good | changes).items() if value is not None}


BAD_SPECS = [
    (inference(model=None), ["spec.model.source.identifier", "is missing", "expected a hub name"]),
    (inference(model={"source": {"identifier": "  "}}), ["spec.model.source.identifier", "is missing"]),
    (inference(model="gpt2"), ["spec.model is 'gpt2'", "should be"]),
    (inference(data=None), ["spec.data is missing"]),
    (inference(data={"type": "list", "items": []}), ["spec.data", "'items' is missing or empty", "type 'list'"]),
    (inference(data={"type": "list", "items": [7]}), ["spec.data.items[0]", "7", "expected a string"]),
    (inference(data={"type": "parquet"}), ["spec.data.type is 'parquet'", "'list', 'dataset' or 'graph_template'"]),
    (inference(data={"type": "dataset"}), ["spec.data", "'url' is missing or empty", "type 'dataset'"]),
    (inference(inference={"temperature": "hot"}), ["spec.inference.temperature is 'hot'", "valid number"]),
    (inference(inference={"max_tokens": 0}), ["spec.inference.max_tokens is 0", "greater than or equal to 1"]),
    (inference(inference=[1]), ["spec.inference is [1]", "should be"]),
    (inference(timeoutSec=-1), ["spec.timeoutSec is -1", "greater than 0"]),
    (inference(output={"destination": {"type": "ftp"}}), ["spec.output.destination.type is 'ftp'", "'http'"]),
    ({"taskType": "subject"}, ["spec.act is missing"]),
    ({"taskType": "subject", "act": "dance"}, ["spec.act is 'dance'", "'fine'"]),
    ({"taskType": "subject", "act": "fine", "section": {"rate": []}}, ["spec.section.rate is []", "valid number"]),
    ({}, ["spec.taskType is missing"]),
]
BAD_KINDS = [
    ("nonsense", "unknown_task_type", ["spec.taskType is 'nonsense'"], "this worker accepts: "),
    ("broken-import", "missing_dependency", ["broken_import:Broken", "libbroken.so.7"], "install the distribution"),
    ("missing-module", "missing_dependency", ["no_such_module_anywhere"], "install the distribution"),
    ("missing-class", "missing_dependency", ["loading_subject:Nothing", "no subclass of"], ""),
    ("no-executor", "missing_dependency", ["angry_subject:AngrySpec", "no subclass of"], ""),
    ("angry-key", "executor_error", ["angry-key", "KeyError"], "worker.log"),
    ("angry-check", "executor_error", ["angry-check", "KeyError"], "worker.log"),
]


def check_refusal(world: World, end: TaskEnd, reason: str, words: list[str], hint: str = "") -> None:
    """Refused before anything ran; the same answer in the event, in the hash and on disk."""
    task_id = end.event["task_id"]
    assert not end.ok
    assert end.reason == reason
    for word in words:
        assert word in end.error
    assert hint in end.hint
    assert not any(event["type"] == "TASK_STARTED" for event in world.events.of_task(task_id))
    result = end.result
    assert (result["ok"], result["error"], result["reason"], result["hint"]) == (False, end.error, reason, end.hint)
    assert (end.folder / "logs").is_dir()
    assert (end.folder / "manifest.json").is_file()
    seen = world.hash_of(task_id, "FAILED")
    assert (seen["error"], seen["reason"], seen["hint"]) == (end.error, reason, end.hint)


@pytest.mark.parametrize(("spec", "words"), BAD_SPECS, ids=lambda value: str(value)[:60])
def test_a_wrong_spec_is_refused_by_name(busy_world: World, spec: Json, words: list[str]):
    end = busy_world.run(spec)
    check_refusal(busy_world, end, "bad_spec", words)
    assert end.hint


@pytest.mark.parametrize(("kind", "reason", "words", "hint"), BAD_KINDS, ids=lambda value: str(value)[:30])
def test_a_kind_that_cannot_run_is_refused(busy_world: World, kind: str, reason: str, words: list[str], hint: str):
    check_refusal(busy_world, busy_world.run({"taskType": kind}), reason, words, hint)


def test_a_known_kind_cannot_be_taken_over_by_an_entry_point(busy_world: World):
    end = busy_world.run({"taskType": "echo", "act": "raise"})
    assert end.ok
    assert end.result["echo"]["act"] == "raise"


@pytest.mark.parametrize(
    "task_id", ["../../etc/passwd", "..", ".worker", "a/b", "with space", "-x", "a\u0000b", "x" * 300, "ä"]
)
def test_a_task_id_that_is_no_folder_name_is_refused(busy_world: World, task_id: str):
    outside = {*busy_world.folder.parent.iterdir()}
    end = busy_world.run(task_id=task_id)
    assert not end.ok
    assert end.reason == "bad_spec"
    assert "envelope.task_id is" in end.error
    assert "should match pattern" in end.error
    assert end.event["task_id"] == task_id
    names = {path.name for path in (busy_world.folder / "results").iterdir()}
    assert task_id not in names - {".worker"}
    assert {*busy_world.folder.parent.iterdir()} == outside


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "do it"}, ["envelope.task is 'do it'", "object"]),
        ({"task": {"spec": [1, 2]}}, ["envelope.task.spec is [1, 2]", "should be an object"]),
        ({"task": {}}, ["envelope.task.spec is missing"]),
        ({"merged_children": [{"task_id": "../up"}]}, ["envelope.merged_children[0].task_id is '../up'"]),
        ({"merged_children": 3}, ["envelope.merged_children is 3"]),
        ({"dispatched_at": 17}, ["envelope.dispatched_at is 17", "string"]),
    ],
)
def test_an_envelope_of_wrong_shape_is_answered(busy_world: World, changes: Json, words: list[str]):
    end = busy_world.run(**changes)
    check_refusal(busy_world, end, "bad_spec", words)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_json_does_not_know_is_refused(busy_world: World, number: str):
    task_id = f"number{number}"
    body = f'{{"task_id":"{task_id}","assigned_worker":"w-1","task":{{"spec":{{"taskType":"echo","a":[1,{number}]}}}}}}'
    busy_world.send_raw(body)
    busy_world.sent[task_id] += 1
    end = busy_world.ended(task_id)
    check_refusal(busy_world, end, "bad_spec", ["task.spec.a[1]", "NaN or infinite", "expected a finite number"])


@pytest.mark.parametrize(
    "body",
    [
        b"not json at all", b"", b"{", b"[1,2]", b'"text"', b"null", b"17", b"NaN", b"\xff\xfe\x00", b"{}",
        b'{"task_id":17,"assigned_worker":"w-1","task":{"spec":{}}}',
        b'{"task_id":"  ","assigned_worker":"w-1","task":{"spec":{}}}',
        b'{"assigned_worker":"w-1","task":{"spec":{}}}',
        b'{"task_id":"x","assigned_worker":17,"task":{"spec":{}}}',
        b'{"task_id":"nobodys"}',
        b"[" * 100_000,
    ],
    ids=lambda body: str(body)[:40],
)  # fmt: skip
def test_what_cannot_be_answered_is_logged_and_counted(busy_world: World, body: bytes):
    (daemon,) = busy_world.daemons
    before = len(daemon.logged("malformed"))
    ends = len(busy_world.events.on("tasks.events"))
    busy_world.send_raw(body)
    assert busy_world.run().ok
    if b'"assigned_worker":17' not in body:  # that one is somebody else's
        records = wait_until(lambda: daemon.logged("malformed")[before:], "the message is logged")
        assert records[0]["level"] == "warning"
        assert records[0]["count"] >= 1
    own = [e for e in busy_world.events.on("tasks.events")[ends:] if not str(e["task_id"]).startswith("task-")]
    assert own == []


@pytest.mark.parametrize("body", [b"?", b"[]", b"{}", b'{"type":"PAUSE"}', b'{"type":"CANCEL","task_id":["a"]}'])
def test_control_messages_that_mean_nothing_are_ignored(busy_world: World, body: bytes):
    busy_world.redis.publish("tasks.control", body)
    assert busy_world.run().ok


def test_tasks_of_others_are_none_of_our_business(busy_world: World):
    busy_world.send_raw(json.dumps({"task_id": "others", "assigned_worker": "w-9", "task": {"spec": {}}}))
    assert busy_world.run().ok
    assert not busy_world.events.of_task("others")
    assert not busy_world.redis.exists("task:others")


@pytest.mark.parametrize("path", ["/etc", "../../..", "/outside/of/everything", ".worker/w-1"])
def test_results_do_not_go_outside_the_allowed_folders(busy_world: World, path: str):
    end = busy_world.run({"taskType": "echo", "output": {"destination": {"path": path}}})
    assert end.ok
    assert end.folder == busy_world.folder / "results" / end.event["task_id"]
    (warning,) = end.result["warnings"]
    assert f"output.destination.path {path!r}" in warning


def test_a_key_that_nobody_knows_is_a_warning(busy_world: World):
    end = busy_world.run({"taskType": "subject", "act": "fine", "sections": {}, "timeoutSecs": 5, "training": {}})
    assert end.ok
    assert end.result["warnings"] == [
        "unknown key 'spec.sections' is ignored; did you mean 'spec.section'?",
        "unknown key 'spec.timeoutSecs' is ignored; did you mean 'spec.timeoutSec'?",
    ]


def test_a_type_that_is_switched_off_is_refused(world: World):
    world.start(WORKER_EXECUTOR_MASK="echo")
    end = world.run({"taskType": "subject", "act": "fine"})
    check_refusal(world, end, "executor_disabled", ["'subject'", "WORKER_EXECUTOR_MASK"], "this worker accepts: echo")
    assert world.run().ok


def big_envelope(task_id: str, size: int) -> str:
    spec = {"taskType": "echo", "filler": "x" * size}
    return json.dumps({"task_id": task_id, "assigned_worker": "w-1", "task": {"spec": spec}})


def test_an_envelope_of_40_mb_is_refused_where_the_broker_lets_it_through(world: World):
    daemon = world.start()
    world.redis.config_set("client-output-buffer-limit", "pubsub 0 0 0")
    world.send_raw(big_envelope("big", 40 * MEBIBYTE))
    world.sent["big"] += 1
    end = world.ended("big")
    check_refusal(world, end, "bad_spec", [str(32 * MEBIBYTE), "WORKER_MAX_ENVELOPE_BYTES"])
    assert world.run().ok
    assert not daemon.logged("reconnect")


def test_an_envelope_of_40_mb_under_the_brokers_default_limits(world: World):
    """Whether a server drops a subscriber over such a message depends on how fast it can be sent."""
    daemon = world.start()
    world.may_stay_open.add("big")
    world.send_raw(big_envelope("big", 40 * MEBIBYTE))
    world.sent["big"] += 1
    wait_until(lambda: daemon.logged("resubscribe") or world.events.ends("big"), "the message is refused, or we are")
    assert world.run().ok


def test_a_subscriber_that_the_broker_drops_comes_back(world: World):
    daemon = world.start()
    (client,) = [each["id"] for each in world.redis.client_list(_type="pubsub") if each["sub"] == "2"]
    world.redis.client_kill_filter(_id=client)
    wait_until(lambda: daemon.logged("resubscribe"), "the daemon has subscribed again")
    wait_until(lambda: world.redis.hget("worker:w-1", "gaps") == "1", "the gap is counted where operators look")
    assert world.run().ok


def test_an_envelope_of_30_mb_is_accepted(world: World):
    world.start()
    world.redis.config_set("client-output-buffer-limit", "pubsub 0 0 0")
    world.send_raw(big_envelope("big", 30 * MEBIBYTE))
    world.sent["big"] += 1
    end = world.ended("big")
    assert end.ok
    assert len(end.result["echo"]["filler"]) == 30 * MEBIBYTE


def test_results_that_cannot_be_written_are_a_clear_failure(world: World):
    world.start()
    (world.folder / "results" / "blocked").write_text("a file where the folder should be")
    end = world.run(task_id="blocked")
    assert (end.ok, end.reason) == (False, "result_write")
    assert str(Path(world.folder / "results" / "blocked")) in end.error
    assert "RESULTS_DIR" in end.hint
    assert world.run().ok

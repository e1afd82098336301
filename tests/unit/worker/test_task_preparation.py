"""What can be checked without loading anything heavy is checked here, and answered with reason and hint."""

from __future__ import annotations

from pathlib import Path

import pytest
from choosing_subjects import FAST, KIND, PLAIN, use_catalog
from structlog.testing import capture_logs

from executors.contract import JsonObject
from orchestrator_client.messages import TaskEnvelope
from orchestrator_client.transfers.http_link import HttpLink
from worker.destinations import http_policy
from worker.settings import Settings, SettingsError
from worker.task_preparation import RejectedError, TaskPreparation


def preparation(tmp_path: Path, *, gpus: int = 0, **settings: object) -> TaskPreparation:
    chosen = Settings.model_validate({"redis_url": "redis://x", "results_dir": tmp_path, **settings})
    return TaskPreparation(chosen, HttpLink(http_policy(chosen)), gpus=gpus)


def envelope(spec: JsonObject, **more: object) -> TaskEnvelope:
    return TaskEnvelope.model_validate({"task_id": "t1", "task": {"spec": spec}, **more})


def rejection(prepare: TaskPreparation, spec: JsonObject, **more: object) -> tuple[str, str, str]:
    with pytest.raises(RejectedError) as caught:
        prepare.prepare(envelope(spec, **more))
    failure = caught.value.failure
    return failure.reason, failure.message, failure.hint


def test_a_task_is_prepared_with_folder_key_and_limits(tmp_path: Path):
    prepared = preparation(tmp_path, worker_task_timeout_sec=50).prepare(
        envelope({"taskType": "Echo", "timeoutSec": 7, "output": {"destination": {"path": "x"}, "artifacts": ["a"]}})
    )

    assert prepared.entry.kind == "echo"
    assert prepared.engine_key == "echo:EchoTask"
    assert prepared.folder.path == tmp_path / "x" / "t1"
    assert prepared.folder.required == ("a",)
    assert prepared.timeout_sec == 7
    assert prepared.no_progress_sec == 1800


@pytest.mark.parametrize(
    ("spec", "reason", "words"),
    [
        ({}, "bad_spec", "spec.taskType is missing"),
        ({"taskType": "poetry"}, "unknown_task_type", "'poetry'"),
        ({"taskType": "echo", "timeoutSec": "soon"}, "bad_spec", "spec.timeoutSec is 'soon'"),
        ({"taskType": "echo", "timeoutSec": 0}, "bad_spec", "spec.timeoutSec is 0"),
        ({"taskType": "echo", "output": {"destination": {"type": "ftp"}}}, "bad_spec", "spec.output.destination.type"),
    ],
)
def test_a_wrong_spec_is_refused_by_name_and_value(tmp_path: Path, spec: JsonObject, reason: str, words: str):
    found, message, hint = rejection(preparation(tmp_path), spec)

    assert found == reason
    assert words in message
    assert hint


def test_a_masked_kind_is_refused_and_says_by_what(tmp_path: Path):
    reason, message, hint = rejection(preparation(tmp_path, worker_executor_mask=("inference",)), {"taskType": "echo"})

    assert reason == "executor_disabled"
    assert "WORKER_EXECUTOR_MASK" in message
    assert hint == "this worker accepts: inference"


def test_a_kind_whose_libraries_are_missing_says_how_to_install_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("executors.catalog.missing_libraries", lambda _: ["torch"])

    reason, message, hint = rejection(preparation(tmp_path), {"taskType": "inference"})

    assert reason == "missing_dependency"
    assert "torch" in message
    assert "--extra inference" in hint


def test_the_engine_of_one_of_several_executors_has_its_name_in_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    use_catalog(monkeypatch, FAST, PLAIN)
    spec: JsonObject = {"taskType": KIND, "wants_gpu": True}

    here = preparation(tmp_path).prepare(envelope(spec))
    there = preparation(tmp_path, gpus=1).prepare(envelope(spec))

    assert (here.entry, here.engine_key) == (PLAIN, "subject.plain:Plain")
    assert here.order.why_this_executor == "plain, not fast: there is no GPU here"
    assert (there.entry, there.engine_key) == (FAST, "subject.fast:Fast")
    assert there.order.why_this_executor == "fast: first choice for subject"


def test_the_parents_executor_runs_its_children_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_catalog(monkeypatch, FAST, PLAIN)
    children = [
        {"task_id": "unsuitable", "spec": {"taskType": KIND, "refused_by": {"fast": "spec.x is 1"}}},
        {"task_id": "invalid", "spec": {"taskType": KIND, "fault": "maybe"}},
    ]

    prepared = preparation(tmp_path).prepare(envelope({"taskType": KIND}, merged_children=children))

    assert prepared.entry == FAST
    assert [child.task_id for child in prepared.order.children] == ["unsuitable"]
    assert prepared.failed_children["invalid"].failure.reason == "bad_spec"


def test_an_executor_that_raises_when_it_is_asked_breaks_the_preparation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    use_catalog(monkeypatch, FAST, PLAIN)

    with pytest.raises(RuntimeError, match="asked in vain"):
        preparation(tmp_path).prepare(envelope({"taskType": KIND, "fault": True}))


def test_an_only_executor_says_nothing_of_the_choice(tmp_path: Path):
    assert preparation(tmp_path).prepare(envelope({"taskType": "echo"})).order.why_this_executor == ""


def test_unknown_names_in_the_mask_are_warned_of_with_the_known_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_catalog(monkeypatch, FAST, PLAIN)
    with capture_logs() as logs:
        preparation(tmp_path, worker_executor_mask=("plain", "poem")).check_mask()

    assert [(entry["name"], entry["known"]) for entry in logs] == [("poem", "fast, plain, subject")]


def test_a_mask_that_leaves_nothing_is_refused(tmp_path: Path):
    with pytest.raises(SettingsError, match="WORKER_EXECUTOR_MASK='poem' leaves no task type; known are: dpo, echo,"):
        preparation(tmp_path, worker_executor_mask=("poem",)).check_mask()


def test_merged_children_get_their_own_folders_and_a_bad_one_fails_alone(tmp_path: Path):
    children = [
        {"task_id": "good", "spec": {"taskType": "echo", "output": {"destination": {"path": "kids"}}}},
        {"task_id": "bad", "spec": {"taskType": "echo", "timeoutSec": "x"}},
        {"task_id": "bare"},
    ]

    prepared = preparation(tmp_path).prepare(envelope({"taskType": "echo"}, merged_children=children))

    assert [child.task_id for child in prepared.order.children] == ["good"]
    assert prepared.child_folders["good"].path == tmp_path / "kids" / "good"
    assert prepared.failed_children["bad"].failure.message.startswith("merged_children[bad].spec.timeoutSec is 'x'")
    assert "missing" in prepared.failed_children["bare"].failure.message


def test_children_inside_the_task_are_found_too(tmp_path: Path):
    task = {"spec": {"taskType": "echo"}, "merge_children": [{"task_id": "c1", "spec": {"taskType": "echo"}}]}

    prepared = preparation(tmp_path).prepare(TaskEnvelope.model_validate({"task_id": "t1", "task": task}))

    assert [child.task_id for child in prepared.order.children] == ["c1"]


@pytest.mark.parametrize("child_id", ["t1", "twice"])
def test_an_id_that_occurs_twice_is_refused(tmp_path: Path, child_id: str):
    children = [{"task_id": name, "spec": {"taskType": "echo"}} for name in ("twice", child_id)]

    reason, message, _ = rejection(preparation(tmp_path), {"taskType": "echo"}, merged_children=children)

    assert reason == "bad_spec"
    assert child_id in message


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [(1, "acme/gpu-model"), (0, "acme/cpu-model")],
)
def test_a_task_without_a_model_gets_the_workers_default(tmp_path: Path, gpus: int, expected: str):
    prepare = preparation(tmp_path, gpus=gpus, vllm_model="acme/gpu-model", hf_model="acme/cpu-model")

    prepared = prepare.prepare(envelope({"taskType": "inference", "data": {"type": "list", "items": ["x"]}}))

    assert prepared.order.spec["model"] == {"source": {"identifier": expected}}
    assert expected in prepared.engine_key


def test_a_task_with_a_checkpoint_gets_no_default_model(tmp_path: Path):
    prepare = preparation(tmp_path, hf_model="acme/cpu-model")
    spec: JsonObject = {
        "taskType": "inference",
        "data": {"type": "list", "items": ["x"]},
        "checkpoint": {"load": {"url": "http://a/m.tar.gz"}},
    }

    prepared = prepare.prepare(envelope(spec))

    assert "model" not in prepared.order.spec
    assert prepared.inputs[0].url == "http://a/m.tar.gz"


def http_spec(**destination: object) -> JsonObject:
    output: JsonObject = {"destination": {"type": "http", **destination}}  # type: ignore[dict-item]  # what a test gives
    return {"taskType": "echo", "output": output, "x": 1}


@pytest.mark.parametrize(
    ("destination", "settings", "words"),
    [
        ({}, {}, "url is missing"),
        ({"url": "ftp://a/b"}, {}, "no http:// or https://"),
        ({"url": "http://a/b", "method": "DELETE"}, {}, "method is 'DELETE'"),
        ({"url": "http://a/b"}, {"worker_allowed_hosts": ("b.example",)}, "WORKER_ALLOWED_HOSTS"),
        ({"url": "http://a/b", "headers": {"X-A": "1\r\nX-B: 2"}}, {}, "'X-A'"),
    ],
)
def test_a_destination_that_cannot_be_reached_is_refused_before_the_work(
    tmp_path: Path, destination: dict[str, object], settings: dict[str, object], words: str
):
    reason, message, _ = rejection(preparation(tmp_path, **settings), http_spec(**destination))

    assert reason == "bad_spec"
    assert "spec.output.destination" in message
    assert words in message


@pytest.mark.parametrize(
    ("destination", "settings"),
    [
        ({"url": "http://a/b"}, {}),
        ({}, {"results_upload_url": "https://up.example/r"}),
        ({"url": "http://localhost:8000/r"}, {"results_upload_url": "https://up.example/r"}),
        ({}, {"orchestrator_base_url": "http://orch.example:8000"}),
    ],
)
def test_a_destination_may_come_from_the_task_or_from_the_operator(
    tmp_path: Path, destination: dict[str, object], settings: dict[str, object]
):
    prepared = preparation(tmp_path, **settings).prepare(envelope(http_spec(**destination, path="/ignored")))

    assert prepared.folder.destination is not None
    assert prepared.folder.path == tmp_path / "t1"


def test_the_work_is_the_same_wherever_its_result_goes(tmp_path: Path):
    prepare = preparation(tmp_path)
    works = [prepare.prepare(envelope(http_spec(url=url))).work for url in ("http://a/", "http://b/")]
    changed = prepare.prepare(envelope({**http_spec(url="http://a/"), "x": 2})).work
    children = [{"task_id": "c", "spec": {"taskType": "echo"}}]
    merged = prepare.prepare(envelope(http_spec(url="http://a/"), merged_children=children)).work

    assert works[0] == works[1]
    assert len({works[0], changed, merged}) == 3
    assert prepare.prepare(envelope({"taskType": "echo"})).work == ""


def test_a_child_that_cannot_run_is_answered_where_the_parent_is(tmp_path: Path):
    children = [{"task_id": "bad", "spec": {"taskType": "echo", "timeoutSec": "x"}}]

    prepared = preparation(tmp_path).prepare(envelope(http_spec(url="http://a/b"), merged_children=children))

    assert prepared.failed_children["bad"].folder.destination == prepared.folder.destination

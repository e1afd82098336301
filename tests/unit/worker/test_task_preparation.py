"""What can be checked without loading anything heavy is checked here, and answered with reason and hint."""

from __future__ import annotations

from pathlib import Path

import pytest

from executors.contract import JsonObject
from orchestrator_client.messages import TaskEnvelope
from worker.settings import Settings
from worker.task_preparation import RejectedError, TaskPreparation


def preparation(tmp_path: Path, *, has_gpu: bool = False, **settings: object) -> TaskPreparation:
    return TaskPreparation(
        Settings.model_validate({"redis_url": "redis://x", "results_dir": tmp_path, **settings}), has_gpu=has_gpu
    )


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
    ("has_gpu", "expected"),
    [(True, "acme/gpu-model"), (False, "acme/cpu-model")],
)
def test_a_task_without_a_model_gets_the_workers_default(tmp_path: Path, has_gpu: bool, expected: str):  # noqa: FBT001 - a parameter of the test
    prepare = preparation(tmp_path, has_gpu=has_gpu, vllm_model="acme/gpu-model", hf_model="acme/cpu-model")

    prepared = prepare.prepare(envelope({"taskType": "inference", "data": {"type": "list", "items": ["x"]}}))

    assert prepared.order.spec["model"] == {"source": {"identifier": expected}}
    assert expected in prepared.engine_key

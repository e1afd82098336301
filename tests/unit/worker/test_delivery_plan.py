"""What is said and written of a delivery."""

from __future__ import annotations

from pathlib import Path

from executors.contract import Failure
from executors.task_spec import Destination
from orchestrator_client.messages import TaskEvent
from worker.delivery_plan import DeliveryJob, DeliveryPlan, Package, PackageState, Posting, result_keys, work_digest
from worker.task_ending import job_of, stored

FOLDER = Path("/r/t1")
STATE = PackageState(name="final_model.tar.gz", size_bytes=5, sha256="ab")


def plan() -> DeliveryPlan:
    destination = Destination.model_validate({"type": "http", "url": "http://a/", "headers": {"X": "y"}, "odd": 1})
    event = TaskEvent(type="TASK_SUCCEEDED", task_id="t1", worker_id="w", payload={"taskType": "sft", "engine": "warm"})
    return DeliveryPlan(
        task_id="t1",
        dispatch="d1",
        kind="sft",
        postings=(Posting(task_id="t1", folder=FOLDER, required=("a",), destination=destination),),
        packages=(Package(task_id="t1", path="checkpoints/final_model", key="final_model", kind="folder"),),
        event=event.encode().decode(),
        fields={"status": "SUCCEEDED", "finished_at": "then"},
    )


def test_a_plan_comes_back_from_the_journal_as_it_was():
    job = DeliveryJob(plan(), since=5.0)

    again = job_of(stored(job))

    assert (again.plan, again.progress, again.since) == (job.plan, job.progress, 5.0)


def test_a_failed_delivery_says_so_with_what_was_known():
    failure = Failure(reason="delivery_refused", message="no", hint="deliver")

    event, fields = plan().failed_event(failure, "no")

    assert (event.type, event.task_id, event.worker_id, event.error) == ("TASK_FAILED", "t1", "w", "no")
    assert event.payload["reason"] == "delivery_refused"
    assert event.payload["taskType"] == "sft"
    assert (fields["status"], fields["reason"], fields["hint"]) == ("FAILED", "delivery_refused", "deliver")
    assert fields["finished_at"] != "then"


def test_a_folder_that_stays_here_has_no_url():
    package = plan().packages[0]

    local = result_keys(package, STATE, FOLDER, None)
    sent = result_keys(package, STATE.model_copy(update={"url": "http://a/f"}), FOLDER, None)

    assert local == {
        "final_model_path": "/r/t1/checkpoints/final_model",
        "final_model_archive": "final_model.tar.gz",
        "final_model_archive_path": "/r/t1/checkpoints/final_model.tar.gz",
        "final_model_archive_bytes": 5,
        "final_model_archive_sha256": "ab",
    }
    assert sent == local | {"final_model_archive_url": "http://a/f", "final_model_archive_uploaded": True}


def test_a_file_extends_what_the_executor_said_of_it():
    package = Package(task_id="t1", path="rows.jsonl", key="jsonl_export", kind="file")
    state = PackageState(name="rows.jsonl", size_bytes=5, sha256="ab", url="http://a/rows.jsonl")

    found = result_keys(package, state, FOLDER, {"record_count": 3, "path": "rows.jsonl"})["jsonl_export"]

    assert isinstance(found, dict)
    assert found["record_count"] == 3
    assert found["url"] == found["path"] == found["download_url"] == "http://a/rows.jsonl"
    assert found["host_path"] == "artifacts/rows.jsonl"


def test_the_digest_of_the_work_leaves_out_where_results_go():
    spec = {"a": 1, "output": {"x": 1}}
    assert work_digest({**spec}, {}) == work_digest({"output": {}, "a": 1}, {})
    assert work_digest({**spec}, {}) != work_digest({"a": 2}, {})
    assert work_digest({**spec}, {"c": {"a": 1}}) != work_digest({**spec}, {})

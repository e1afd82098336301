"""The executors of training as the engine process runs them: real ranks, alone and together."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from recording_report import RecordingReport
from training_models import RunMaker

from executors.contract import EnginePolicy, ExecutorTask, TaskOutput
from executors.errors import TaskCancelledError
from executors.failure_report import ReportedFailureError
from executors.training.ranks.rank_process import _find_gpu
from executors.training.training_task import SftTraining, TrainingTask

SENTENCES = ["the sky is blue", "grass is green", "snow is white", "coal is black"]

Run = Callable[..., TaskOutput]


@pytest.fixture
def run(tmp_path: Path, tiny_chat_dir: Path) -> Run:
    """Run an SFT task in a folder of its own, or in one that is named."""

    def run(
        out_dir: str = "out",
        *,
        report: RecordingReport | None = None,
        data: dict[str, Any] | None = None,
        executor: TrainingTask[Any] | None = None,
        **training: object,
    ) -> TaskOutput:
        chosen = executor or SftTraining()
        folder = tmp_path / out_dir
        (folder / "artifacts").mkdir(parents=True, exist_ok=True)
        options = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "max_seq_length": 64, **training}
        sent = {
            "model": {"source": {"identifier": str(tiny_chat_dir)}},
            "data": data or {"prompts": SENTENCES},
            "training": options,
        }
        task = ExecutorTask(
            task_id="t-1",
            spec=chosen.spec_type.model_validate(sent),
            children=(),
            out_dir=folder,
            policy=EnginePolicy(allowed_roots=(tmp_path, tiny_chat_dir)),
            report=report or RecordingReport(),
            sent_spec=sent,
        )
        return chosen.run(task)

    return run


def test_a_training_gives_the_keys_of_the_contract(run: Run, tmp_path: Path):
    report = RecordingReport()

    output = run(report=report)

    result = output.result
    assert result["training_successful"] is True
    assert result["error_message"] is None
    assert result["dataset_size"] == 4
    assert result["output_dir"] == str(tmp_path / "out")
    assert result["checkpoints_dir"] == str(tmp_path / "out" / "checkpoints")
    assert (result["resume_from_path"], result["resumed_from_step"]) == (None, None)
    assert result["train_metrics"]["steps"] == 4
    assert result["train_metrics"]["final_loss"] > 0
    assert result["devices"] == {"ranks": 1, "gpus": [], "why": "CPU, 1 process: this worker has no GPU to use"}
    assert {"torch", "trl"} <= set(result["versions"])
    assert [(each.path, each.key, each.archive_always) for each in output.artifacts] == [
        ("final_model", "final_model", False)
    ]
    assert (tmp_path / "out" / "final_model" / "model.safetensors").exists()
    assert report.told[-1] == (4, 4)
    assert report.metrics[-1]["loss"] > 0
    assert "rank 0 of 1, pid" in (tmp_path / "out" / "logs" / "rank0.log").read_text()
    assert not (tmp_path / "out" / "_scratch").exists()


def test_the_same_task_goes_on_where_it_was_cut_off(run: Run):
    report = RecordingReport(stop_when=lambda metrics: metrics["done"] >= 5)
    with pytest.raises(TaskCancelledError):
        run(report=report, max_steps=40)

    output = run(max_steps=40)

    assert output.result["resumed_from_step"] >= 2
    assert Path(str(output.result["resume_from_path"])).name.startswith("checkpoint-")
    assert output.result["train_metrics"]["steps"] == 40


class KillsTheSecondRank(RecordingReport):
    """Kills rank 1 at the first sign of progress."""

    def __init__(self, logs: Path) -> None:
        super().__init__()
        self._log = logs / "rank1.log"

    def progress(self, done: float, total: float | None = None, **more: Any) -> None:  # noqa: ANN401 - passed on
        if not self.told:
            os.kill(int(re.findall(r"rank 1 of 2, pid (\d+)", self._log.read_text())[0]), signal.SIGKILL)
        super().progress(done, total, **more)


def test_of_two_groups_of_two_ranks_one_is_killed_and_the_other_ends_well(run: Run, tmp_path: Path):
    """Each has its own rendezvous; only the first rank writes and reports."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    outputs: list[TaskOutput] = []
    report = RecordingReport()
    other = threading.Thread(target=lambda: outputs.append(run("whole", report=report, nproc_per_node=2)))
    other.start()

    with pytest.raises(ReportedFailureError) as caught:
        run("hit", report=KillsTheSecondRank(tmp_path / "hit" / "logs"), nproc_per_node=2, max_steps=5000)
    other.join()

    assert caught.value.failure.reason == "engine_crash"
    assert "rank 1 ended by SIGKILL" in caught.value.failure.message
    assert outputs[0].result["devices"]["ranks"] == 2
    assert outputs[0].result["train_metrics"]["steps"] == 4
    assert report.told[-1] == (4, 4)
    logs = tmp_path / "whole" / "logs"
    assert {file.name for file in logs.iterdir()} == {"rank0.log", "rank1.log", "torchrun.log"}
    assert {child.pid for child in psutil.Process().children(recursive=True)} == before


def test_nothing_is_written_or_removed_behind_links(run: Run, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "checkpoint-7").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    for name in ("checkpoints", "_scratch"):
        (tmp_path / "out" / name).symlink_to(elsewhere)

    run(max_steps=2)

    assert [path.name for path in elsewhere.iterdir()] == ["checkpoint-7"]
    assert (tmp_path / "out" / "checkpoints" / "checkpoint-2").is_dir()


def test_bad_data_is_told_without_a_log(run: Run, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"wrong": "column"}\n')

    with pytest.raises(ReportedFailureError) as caught:
        run(data={"dataset_name": str(rows), "text_field": "text"})

    assert caught.value.failure.reason in {"bad_data", "bad_spec"}
    assert "wrong" in caught.value.failure.message
    assert caught.value.failure.log_tail == ()


def test_a_full_disk_below_the_log_is_told_as_what_it_is(run: Run, tmp_path: Path):
    (tmp_path / "out" / "logs").mkdir(parents=True)
    (tmp_path / "out" / "logs" / "rank0.log").symlink_to("/dev/full")

    with pytest.raises(ReportedFailureError) as caught:
        run()

    assert (caught.value.failure.reason, caught.value.failure.retryable) == ("disk_full", True)


def test_a_gpu_of_the_plan_that_is_not_there_is_a_fault(make_run: RunMaker):
    job = make_run("sft", data={"prompts": SENTENCES}).job.model_copy(update={"use_cpu": False, "ranks": 1000})

    with pytest.raises(ReportedFailureError, match="of the 1000 GPUs") as caught:
        _find_gpu(job)

    assert (caught.value.failure.reason, caught.value.failure.retryable) == ("gpu_fault", True)

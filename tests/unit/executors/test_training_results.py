"""What the result of a training says, and what it says when memory runs out."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fake_rank
import pytest
from recording_report import RecordingReport

from executors.catalog import entries, executor_class, missing_libraries
from executors.contract import EnginePolicy, ExecutorTask
from executors.errors import BadSpecError
from executors.failure_report import ReportedFailureError
from executors.training import training_task
from executors.training.device_plan import DevicePlan
from executors.training.ranks.rank_command import rank_command
from executors.training.spec.trainer_specs import SPEC_TYPES
from executors.training.training_job import ResumePoint, TrainingJob, TrainingOutcome
from executors.training.training_results import library_versions, output_of, train_metrics
from executors.training.training_task import SftTraining, TrainingTask

SENT = {"model": {"source": {"identifier": "tiny"}}, "data": {"prompts": ["a"]}}
PLAN = DevicePlan(2, ("GPU-aa", "GPU-bb"), "2 GPUs")


@dataclass
class State:
    """What is read of a trainer's state."""

    global_step: int = 6
    epoch: float | None = 1.5
    log_history: list[dict[str, Any]] = field(default_factory=list)
    num_input_tokens_seen: int = 0


def job_in(folder: Path) -> TrainingJob:
    return TrainingJob(
        kind="sft",
        task_id="t-1",
        sent_spec=SENT,
        out_dir=folder,
        policy=EnginePolicy(),
        batch_size=4,
        gradient_accumulation_steps=2,
        ranks=2,
        use_cpu=False,
    )


def test_the_metrics_are_those_that_were_logged_last():
    logged = [
        {"loss": 3.0, "num_tokens": 10, "epoch": 0.5},
        {"loss": 1.0, "num_tokens": 20.0, "mean_token_accuracy": 0.75},
        {"loss": math.nan},
        {"train_loss": 2.0, "train_runtime": 3.0},
    ]

    assert train_metrics(State(log_history=logged)) == {
        "steps": 6,
        "epochs": 1.5,
        "final_loss": 1.0,
        "final_accuracy": 0.75,
        "mean_loss": 2.0,
        "tokens": 20,
    }


@pytest.mark.parametrize(
    ("logged", "metrics"),
    [
        ({"rewards/margins": 0.5, "loss": 0.25}, {"final_reward_margin": 0.5, "final_loss": 0.25}),
        ({"objective/scores": 1.0, "episode": 8}, {"final_reward": 1.0, "episodes": 8}),
        ({"reward": 2.0}, {"final_reward": 2.0}),
        ({}, {}),
    ],
)
def test_each_kind_has_its_own_metrics(logged: dict[str, float], metrics: dict[str, float]):
    assert train_metrics(State(epoch=None, log_history=[logged])) == {"steps": 6, **metrics}


def test_versions_are_those_of_what_is_installed():
    assert {"python", "torch", "trl"} <= library_versions().keys()


def test_the_result_has_the_keys_of_the_contract(tmp_path: Path):
    resumed = ResumePoint(path=tmp_path / "checkpoints" / "checkpoint-2", step=2)
    outcome = TrainingOutcome(
        dataset_size=9,
        model_name="tiny",
        metrics={"steps": 6, "final_loss": math.nan},
        saved="checkpoints/final_lora",
        versions={"torch": "2"},
        seed=42,
        resumed_from=resumed,
        warnings=["b", "a"],
    )

    output = output_of(job_in(tmp_path), PLAN, outcome, seconds=1.23456, warnings=["a"])

    assert output.result == {
        "training_successful": True,
        "training_time_seconds": 1.235,
        "error_message": None,
        "model_name": "tiny",
        "dataset_size": 9,
        "output_dir": str(tmp_path),
        "checkpoints_dir": str(tmp_path / "checkpoints"),
        "resume_from_path": str(resumed.path),
        "resumed_from_step": 2,
        "train_metrics": {"steps": 6},
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "versions": {"torch": "2"},
        "seed": 42,
        "devices": {"ranks": 2, "gpus": ["GPU-aa", "GPU-bb"], "why": "2 GPUs"},
    }
    assert isinstance(output.result["train_metrics"]["steps"], int), "counts are whole numbers in JSON too"
    assert output.warnings == ["a", "b"]
    (artifact,) = output.artifacts
    assert (artifact.path, artifact.key, artifact.archive_always) == ("checkpoints/final_lora", "final_lora", True)


def test_what_is_not_saved_is_no_artifact(tmp_path: Path):
    outcome = TrainingOutcome(dataset_size=1, model_name="tiny", seed=1)

    output = output_of(job_in(tmp_path), PLAN, outcome, seconds=1, warnings=[])

    assert output.artifacts == ()
    assert output.result["resume_from_path"] is None


def test_one_process_is_started_directly_and_waits_for_no_other():
    command = rank_command(DevicePlan(1, (), "CPU"), Path("/s"), cores=8)

    assert command[0] == "env"
    assert "CUDA_VISIBLE_DEVICES=" in command
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        assert ("-u", name) in itertools.pairwise(command)
    assert not [word for word in command if word.startswith("OMP_NUM_THREADS")]
    assert command[-3:] == ["executors.training.ranks.rank_process", "/s", "0"]


def test_several_processes_share_the_cores_and_have_a_rendezvous_of_their_own():
    first, second = (rank_command(PLAN, Path("/s"), cores=8) for _ in range(2))

    assert {"CUDA_VISIBLE_DEVICES=GPU-aa,GPU-bb", "OMP_NUM_THREADS=4", "127.0.0.1:0"} <= set(first)
    assert first[first.index("--rdzv-id") + 1] != second[second.index("--rdzv-id") + 1]


def test_one_process_can_be_a_group():
    command = rank_command(DevicePlan(1, ("GPU-aa",), "DeepSpeed", grouped=True), Path("/s"), cores=8)

    assert {"torch.distributed.run", "CUDA_VISIBLE_DEVICES=GPU-aa", "OMP_NUM_THREADS=8"} <= set(command)
    assert command[command.index("--nproc-per-node") + 1] == "1"


def test_six_kinds_share_one_sort_of_engine():
    keys = set()
    for kind, spec_type in SPEC_TYPES.items():
        (entry,) = entries()[kind]
        assert entry.extra == "training"
        assert not missing_libraries(entry)
        executor = executor_class(entry)
        assert executor.spec_type is spec_type
        assert executor.exclusive
        keys.add(executor.engine_key(spec_type.model_construct()))
    assert keys == {"training"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run an SFT task whose only rank plays a scene."""

    def run(scene: str, report: RecordingReport | None = None, **training: object) -> Any:  # noqa: ANN401 - a result is JSON
        def command(plan: DevicePlan, address: Path, *, cores: int) -> Sequence[str]:
            del plan, cores
            return [sys.executable, fake_rank.__file__, str(address), "0", scene]

        monkeypatch.setattr(training_task, "rank_command", command)
        sent = {**SENT, "training": training}
        executor: TrainingTask[Any] = SftTraining()
        task = ExecutorTask(
            task_id="t-1",
            spec=executor.spec_type.model_validate(sent),
            children=(),
            out_dir=tmp_path,
            policy=EnginePolicy(),
            report=report or RecordingReport(),
            sent_spec={**sent, "output": {"destination": {"headers": {"Authorization": "secret"}}}},
        )
        return executor.run(task)

    return run


def test_a_lack_of_memory_names_what_decided_it_and_what_to_lower(run: Callable[..., Any]):
    with pytest.raises(ReportedFailureError) as caught:
        run("greedy", batch_size=8, max_seq_length=128)

    failure = caught.value.failure
    assert (failure.reason, failure.retryable) == ("gpu_oom", False)
    assert "training.batch_size 8, gradient_accumulation_steps 1 and max_seq_length 128" in failure.message
    assert "3.0 GiB allocated at most, 3.5 GiB reserved, of 4.0 GiB" in failure.message
    for word in ("batch_size", "max_seq_length", "lora_sft", "oom_retry"):
        assert word in failure.hint
    assert "gradient_checkpointing" not in failure.hint  # it is on


def test_on_request_half_the_batch_is_tried_once(run: Callable[..., Any]):
    report = RecordingReport()

    output = run("greedy", report, batch_size=4, gradient_accumulation_steps=3, oom_retry=True)

    assert (output.result["batch_size"], output.result["gradient_accumulation_steps"]) == (2, 6)
    assert output.result["train_metrics"] == {"steps": 6}
    assert "batch_size 2 and gradient_accumulation_steps 6" in output.warnings[-1]
    assert [line for line in report.logged if line.startswith("warning") and "4.0 GiB" in line]


def test_there_is_no_third_try(run: Callable[..., Any]):
    with pytest.raises(ReportedFailureError, match=r"training.batch_size 4, gradient_accumulation_steps 2 "):
        run("greedy", batch_size=8, oom_retry=True)


def test_a_spec_that_does_not_suit_half_the_batch_fails_for_want_of_memory(run: Callable[..., Any]):
    with pytest.raises(ReportedFailureError, match=r"batch_size 8.*not possible: num_generations is 8") as caught:
        run("greedy_and_picky", batch_size=8, oom_retry=True)

    assert caught.value.failure.reason == "gpu_oom"


def test_ranks_do_not_learn_where_results_go(run: Callable[..., Any], tmp_path: Path):
    run("notes_its_job")

    assert "secret" not in (tmp_path / "logs" / "rank0.log").read_text()
    assert '"task_id": "t-1"' in (tmp_path / "logs" / "rank0.log").read_text()


def test_half_a_model_is_not_left_behind(run: Callable[..., Any], tmp_path: Path):
    partials = [tmp_path / ".final_model.partial", tmp_path / "checkpoints" / ".final_lora.partial"]

    with pytest.raises(ReportedFailureError, match="ended by SIGKILL"):
        run("dies_while_saving")

    assert not [path for path in partials if path.exists()]
    assert (tmp_path / "checkpoints").is_dir()


def test_devices_are_checked_before_anything_starts(run: Callable[..., Any], tmp_path: Path):
    with pytest.raises(BadSpecError, match="nproc_per_node is 64"):
        run("done", nproc_per_node=64)

    assert not (tmp_path / "logs").exists()

"""Runs that go on from a checkpoint, of their own or of another task: what is counted, saved, and refused."""

from __future__ import annotations

from typing import Any

import pytest
from training_models import RunMaker, Trained, stop_after, train

from executors.errors import BadSpecError
from executors.training.out_of_memory import smaller_job
from executors.training.training_job import ResumePoint

TEXTS = [f"{number} comes after {number - 1}" + " and so on" * (number % 3) for number in range(1, 12)]
DATA = {"prompts": TEXTS}
PAIRS = [{"prompt": f"{number} is ", "chosen": "a number", "rejected": "a name"} for number in range(6)]
OPTIONS = {"max_steps": 6, "save_steps": 3, "batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3}


@pytest.fixture
def first(make_run: RunMaker) -> Trained:
    """Six steps, with checkpoints of the third and the sixth."""
    return train(make_run("sft", data=DATA, training=OPTIONS))


def point_of(trained: Trained, step: int) -> ResumePoint:
    return ResumePoint(path=trained.run.job.checkpoints_dir / f"checkpoint-{step}", step=step)


def logged(trained: Trained, name: str) -> list[float]:
    return [entry[name] for entry in trained.built.trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    ("kind", "data"),
    [("sft", DATA), ("lora_sft", DATA), ("dpo", {"preferences": PAIRS}), ("reward", {"preferences": PAIRS})],
)
def test_a_resumed_run_counts_all_tokens_and_equals_the_whole_one(make_run: RunMaker, kind: str, data: dict[str, Any]):
    sections: dict[str, Any] = {"data": data, "training": {**OPTIONS, "gradient_accumulation_steps": 2}}
    if kind == "lora_sft":
        sections["lora"] = {"dropout": 0.3}
    whole = train(make_run(kind, **sections))
    resumed = train(make_run(kind, resume=point_of(whole, 3), **sections))
    assert logged(resumed, "num_tokens") == logged(whole, "num_tokens")
    assert logged(resumed, "learning_rate") == logged(whole, "learning_rate")
    assert resumed.losses == whole.losses
    speeds = [told["tokens_per_sec"] for told in resumed.run.tell.metrics if "tokens_per_sec" in told]
    assert speeds, "the tokens before the checkpoint are not of this run's time"


def test_the_task_says_how_often_is_saved_and_logged_not_the_checkpoint(make_run: RunMaker, first: Trained):
    options = {**OPTIONS, "max_steps": 12, "save_steps": 2, "logging_steps": 4, "save_total_limit": 9}
    further = train(make_run("sft", data=DATA, training=options, resume=point_of(first, 3)))
    saved = {folder.name for folder in further.run.job.checkpoints_dir.glob("checkpoint-*")}
    assert saved == {f"checkpoint-{step}" for step in (4, 6, 8, 10, 12)}
    state = further.built.trainer.state
    assert [entry["step"] for entry in state.log_history if "loss" in entry] == [1, 2, 3, 4, 6, 8, 10, 12]


def test_a_checkpoint_beyond_the_last_step_trains_nothing_and_says_so(make_run: RunMaker, first: Trained):
    again = train(make_run("sft", data=DATA, training={**OPTIONS, "max_steps": 4}, resume=point_of(first, 6)))
    assert again.warnings == ["nothing was trained: the checkpoint is of step 6, and the task asks for 4 steps"]
    same = train(make_run("sft", data=DATA, training=OPTIONS, resume=point_of(first, 6)))
    assert same.warnings == []
    assert same.steps == again.steps == 6


@pytest.mark.parametrize(("kind", "lora"), [("sft", {}), ("lora_sft", {"r": 8})])
def test_a_checkpoint_of_another_form_is_refused(make_run: RunMaker, first: Trained, kind: str, lora: dict[str, int]):
    """An adapter of another rank; whole weights for an adapter, and an adapter for whole weights."""
    adapter = train(make_run("lora_sft", data=DATA, training=OPTIONS, lora={"r": 4}))
    options = {**OPTIONS, "max_steps": 9}
    sections = {"data": DATA, "training": options} | ({"lora": lora} if lora else {})
    for foreign in (adapter, first) if lora else (adapter,):
        with pytest.raises(BadSpecError, match=r"resume_from_path is .*checkpoint-3', which does not fit this task"):
            train(make_run(kind, resume=point_of(foreign, 3), **sections))


@pytest.mark.parametrize(("batch", "parts"), [(4, 2), (3, 3)])
def test_less_memory_leaves_the_steps_as_they_are(make_run: RunMaker, batch: int, parts: int):
    """A second try goes on from the first one's checkpoint, and ends where that would have ended."""
    options = {**OPTIONS, "max_steps": None, "num_train_epochs": 2, "save_steps": 2, "batch_size": batch}
    sections: dict[str, Any] = {"data": DATA, "training": options}
    whole = train(make_run("sft", **sections))
    cut_off = make_run("sft", **sections)
    train(cut_off, stop_after(3))
    smaller = smaller_job(cut_off.job)
    assert smaller is not None
    assert (smaller.batch_size, smaller.gradient_accumulation_steps) == (batch // parts, parts)
    again = make_run("sft", cut_off.job.out_dir, **sections)
    point = ResumePoint(path=cut_off.job.checkpoints_dir / "checkpoint-2", step=2)
    again.job = smaller.model_copy(update={"resume": point})
    resumed = train(again)
    assert resumed.steps == whole.steps
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-4)

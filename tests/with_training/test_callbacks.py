"""What happens beside the steps: progress, files, marks on checkpoints, and the end of a training that diverges."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_models import RecordingRankReport, RunMaker, stop_after

from executors.errors import DivergedError
from executors.failure_report import verdict_on
from executors.training.monitoring.loss_curve import CURVE_FILE, METRICS_FILE
from executors.training.monitoring.training_callbacks import callbacks_for, train_to_end
from executors.training.saving.run_checkpoints import last_complete, prepare_resume
from executors.training.training_job import ResumePoint
from executors.training.training_run import BuiltTrainer, TrainingRun

IDS = tuple(range(2, 18))


def build(run: TrainingRun, *, rows: int = 8, **changes: Any) -> BuiltTrainer:  # noqa: ANN401 - keywords of a heavy type
    """A plain trainer of the tiny model, with our callbacks."""
    import datasets
    import torch
    import transformers

    where = run.spec.model.source.identifier
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(where)
    options = run.spec.training
    arguments = {
        "output_dir": str(run.job.checkpoints_dir),
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "max_steps": options.max_steps or -1,
        "num_train_epochs": options.num_train_epochs,
        "logging_steps": options.logging_steps,
        "save_steps": options.save_steps,
        "save_strategy": options.save_strategy,
        "save_total_limit": options.save_total_limit,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    data = datasets.Dataset.from_list([{"input_ids": IDS, "labels": IDS}] * rows)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**{**arguments, **changes}),
        train_dataset=data,
        processing_class=tokenizer,
    )
    for callback in callbacks_for(run):
        trainer.add_callback(callback)
    return BuiltTrainer(trainer=trainer, tokenizer=tokenizer, adapter=False, folder="final_model")


def train(run: TrainingRun, **changes: Any) -> BuiltTrainer:  # noqa: ANN401 - keywords of a heavy type
    built = build(run, **changes)
    train_to_end(run, built)
    return built


def told(run: TrainingRun) -> RecordingRankReport:
    assert isinstance(run.tell, RecordingRankReport)
    return run.tell


def metrics_of(run: TrainingRun) -> list[dict[str, float]]:
    lines = (run.job.out_dir / "artifacts" / METRICS_FILE).read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def resumed(run: TrainingRun, make_run: RunMaker) -> TrainingRun:
    """The same run once more, as a launcher starts it after an end."""
    job = run.job
    decision = prepare_resume(job.out_dir, job.identity, run.spec, job.policy)
    sections = {"training": job.sent_spec["training"]}
    return make_run("sft", job.out_dir, data={"prompts": ["a"]}, resume=decision.point, **sections)


@pytest.fixture
def new_run(make_run: RunMaker) -> Callable[..., TrainingRun]:
    def new(**training: object) -> TrainingRun:
        options = {"max_steps": 6, "save_steps": 2, "logging_steps": 3, **training}
        return make_run("sft", data={"prompts": ["a"]}, training=options)

    return new


NewRun = Callable[..., TrainingRun]


def test_a_run_reports_its_steps_and_leaves_metrics_and_a_curve(new_run: NewRun):
    run = new_run()
    train(run)
    steps = told(run).steps
    assert steps[0] == (0, 6)
    assert steps[-1] == (6, 6)
    assert steps == sorted(steps)
    last = told(run).metrics[-1]
    assert {"loss", "learning_rate", "grad_norm", "epoch", "eta_sec"} <= set(last)
    assert last["eta_sec"] == 0
    logged = metrics_of(run)
    assert [line["step"] for line in logged if "loss" in line] == [2, 3, 4, 6]  # a save has its metrics logged first
    assert (run.artifacts_dir / CURVE_FILE).read_bytes().startswith(b"\x89PNG")
    assert not told(run).warnings


def test_a_long_step_is_heard_of_before_its_end(new_run: NewRun, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("executors.training.monitoring.training_callbacks._SECONDS_OF_SILENCE", 0.0)
    run = new_run(max_steps=1)
    train(run, gradient_accumulation_steps=3)
    assert told(run).steps[:3] == [(0, 1)] * 3  # the beginning, and two of the three batches


def test_the_last_step_is_logged_also_without_a_save(new_run: NewRun):
    run = new_run(save_strategy="no", max_steps=5)
    train(run)
    assert [line["step"] for line in metrics_of(run) if "loss" in line] == [3, 5]
    assert not list(run.job.checkpoints_dir.glob("checkpoint-*"))


def cut_a_file(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model.safetensors", 100)


def do_nothing(_checkpoint: Path) -> None:
    return


@pytest.mark.parametrize(
    ("damage", "start"),
    [(cut_a_file, 2), (do_nothing, 4)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_run_that_was_killed_goes_on_from_its_last_whole_checkpoint(
    new_run: NewRun, make_run: RunMaker, damage: Callable[[Path], None], start: int
):
    whole = new_run()
    wanted = train(whole)
    run = new_run()
    built = build(run)
    built.trainer.add_callback(stop_after(5))
    train_to_end(run, built)
    shutil.rmtree(run.job.checkpoints_dir / "checkpoint-5", ignore_errors=True)
    damage(run.job.checkpoints_dir / "checkpoint-4")
    with (run.artifacts_dir / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "lo')

    again = resumed(run, make_run)
    assert again.job.resume is not None
    assert again.job.resume.step == start
    ended = train(again)

    assert ended.trainer.state.global_step == 6
    assert told(again).steps[0] == (start, 6)
    assert told(again).steps[-1] == (6, 6)
    expected, found = metrics_of(whole), metrics_of(again)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for name, weight in wanted.trainer.model.state_dict().items():
        assert weight.equal(ended.trainer.model.state_dict()[name]), name


def test_a_checkpoint_of_the_last_step_leaves_nothing_to_train(new_run: NewRun, make_run: RunMaker):
    run = new_run(max_steps=3)  # in the middle of an epoch of four steps
    wanted = train(run)
    again = resumed(run, make_run)
    assert again.job.resume == ResumePoint(path=run.job.checkpoints_dir / "checkpoint-3", step=3)
    ended = train(again)
    assert ended.trainer.state.global_step == 3
    assert told(again).steps[-1] == (3, 3)
    for name, weight in wanted.trainer.model.state_dict().items():
        assert weight.equal(ended.trainer.model.state_dict()[name]), name


def weights_in(checkpoint: Path) -> list[Any]:
    from safetensors.torch import load_file

    return list(load_file(checkpoint / "model.safetensors").values())


def poison(built: BuiltTrainer, *, after: int, value: float = math.nan) -> None:
    """From some step on the loss is no number."""
    trainer: Any = built.trainer
    compute_loss = trainer.compute_loss

    def poisoned(*arguments: object, **options: object) -> object:
        loss = compute_loss(*arguments, **options)
        return loss * value if trainer.state.global_step >= after else loss

    trainer.compute_loss = poisoned


@pytest.mark.parametrize("logging_steps", [1, 100])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run(new_run: NewRun, logging_steps: int, value: float):
    run = new_run(max_steps=10, save_steps=3, logging_steps=logging_steps)
    built = build(run)
    poison(built, after=4, value=value)
    with pytest.raises(DivergedError, match=r"diverged at step [56] of 10: (loss|grad_norm) is (nan|inf)") as caught:
        train_to_end(run, built)
    kept = last_complete(run.job.checkpoints_dir, run.job.identity)
    assert kept is not None
    assert kept.step == 3
    found = "the last good checkpoint is" if logging_steps == 1 else "no finite loss was seen after it"
    assert found in caught.value.message
    assert str(kept.path) in caught.value.message
    assert "learning rate" in caught.value.message
    assert verdict_on(caught.value).failure.reason == "diverged"
    assert all(weight.isfinite().all() for weight in weights_in(kept.path))
    assert all(math.isfinite(number) for line in metrics_of(run) for number in line.values())
    assert [path.name for path in run.job.checkpoints_dir.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_learning_rate_beyond_all_bounds_ends_the_run(new_run: NewRun):
    run = new_run(learning_rate=1e30, logging_steps=1, max_steps=20, save_steps=1)
    with pytest.raises(DivergedError):
        train(run, max_grad_norm=0)
    for checkpoint in run.job.checkpoints_dir.glob("checkpoint-*"):
        assert all(weight.isfinite().all() for weight in weights_in(checkpoint))


def test_weights_that_are_no_numbers_are_not_saved(new_run: NewRun):
    import torch

    run = new_run()
    built = build(run)
    with torch.no_grad():
        built.trainer.model.model.layers[0].mlp.up_proj.weight.fill_(math.nan)
    poison(built, after=0, value=1.0)
    with pytest.raises(DivergedError, match="no checkpoint had been written"):
        train_to_end(run, built)
    assert not list(run.job.checkpoints_dir.glob("checkpoint-*"))


def test_a_full_disk_in_the_middle_of_a_checkpoint_leaves_the_one_before_whole(new_run: NewRun):
    run = new_run()
    halfway = run.job.checkpoints_dir / "checkpoint-4"
    halfway.mkdir(parents=True)
    (halfway / "optimizer.pt").symlink_to("/dev/full")
    with pytest.raises(RuntimeError) as caught:
        train(run)
    failure = verdict_on(caught.value).failure
    assert (failure.reason, failure.retryable) == ("disk_full", True)
    kept = last_complete(run.job.checkpoints_dir, run.job.identity)
    assert kept is not None
    assert kept.step == 2
    assert (halfway / "model.safetensors").exists()
    decision = prepare_resume(run.job.out_dir, run.job.identity, run.spec, run.job.policy)
    assert decision.point == kept
    assert not halfway.exists()


@pytest.mark.parametrize(
    "text",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",
        "Error while serializing: I/O error: Disk quota exceeded (os error 122)",
    ],
)
def test_a_full_disk_is_known_by_what_safetensors_says(text: str):
    from safetensors import SafetensorError

    assert verdict_on(SafetensorError(text)).failure.reason == "disk_full"


def test_an_error_that_quotes_its_data_stays_readable():
    message = verdict_on(ValueError("x" * 10**7)).failure.message
    assert message.startswith("ValueError: xxx")
    assert len(message) < 30_000


def test_tensorboard_gets_every_log(new_run: NewRun):
    from tensorboard.backend.event_processing.event_accumulator import (  # noqa: PLC0415 - comes with an extra
        EventAccumulator,
    )

    run = new_run(report_to="tensorboard")
    train(run)
    events = EventAccumulator(str(run.artifacts_dir / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 3, 4, 6]
    assert not told(run).warnings


def test_trackio_gets_every_log_in_a_database_of_the_task(new_run: NewRun):
    run = new_run(report_to=["trackio"])
    train(run)
    assert not told(run).warnings
    (database,) = (run.artifacts_dir / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        steps = {step for (step,) in connection.execute("SELECT step FROM metrics")}
    assert steps == {2, 3, 4, 6}


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_a_tracker_that_is_not_installed_costs_a_warning(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, tracker: str
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "trackio" else find_spec(name))
    run = new_run(report_to=[tracker], save_strategy="no")
    built = train(run)
    assert built.trainer.state.global_step == 6
    (warning,) = told(run).warnings
    assert tracker in warning
    assert "extra 'tracking'" in warning


def test_a_tracker_that_breaks_costs_one_warning(new_run: NewRun, monkeypatch: pytest.MonkeyPatch):
    def break_down(*_arguments: object) -> None:
        raise ConnectionError("the network is down")

    monkeypatch.setattr("executors.training.monitoring.trackers.TensorBoard.log", break_down)
    run = new_run(report_to=["tensorboard"])
    built = train(run)
    assert built.trainer.state.global_step == 6
    (warning,) = told(run).warnings
    assert "the network is down" in warning


def test_a_curve_that_cannot_be_drawn_costs_a_warning(new_run: NewRun, monkeypatch: pytest.MonkeyPatch):
    def break_down(*_arguments: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr("executors.training.monitoring.loss_curve._draw", break_down)
    run = new_run(save_strategy="no")
    assert train(run).trainer.state.global_step == 6
    assert told(run).warnings == ["artifacts/training.png could not be drawn: RuntimeError: no fonts"]

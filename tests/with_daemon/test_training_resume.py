"""Trainings that are cut off at a random step: by SIGKILL, by a stop, by a cancel; what goes on, and from where."""

from __future__ import annotations

import random
import secrets
import signal
import time
from pathlib import Path
from typing import Final

import psutil
import pytest
from daemon_process import DaemonProcess, tagged_below
from daemon_world import Json, World
from training_lives import (
    alive,
    check_resumed,
    folder_of,
    last_step,
    rank_of,
    reach,
    start_trainer,
    trainers_in,
    weights_of,
    whole_checkpoints,
)
from training_models import make_tiny_llama
from training_tasks import LETTERS, TRAINING_SEC, training_task
from waiting_until import wait_until

STEPS: Final = 24
SAVE_STEPS: Final = 4
CANCEL_SEC: Final = 10.0
LONG_TEXTS: Final = [f"{number} bottles of water stand on the wall. " * 7 for number in range(512)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def dice() -> random.Random:
    """Chooses the steps; its seed is shown when a test fails."""
    seed = secrets.randbits(32)
    print(f"steps were chosen by random.Random({seed})")  # noqa: T201 - to do it again
    return random.Random(seed)  # noqa: S311 - no secret


def sft(tiny: Path, **training: object) -> Json:
    """Steps that take a moment each, since their rows fill the model's context."""
    options: Json = {"max_steps": STEPS, "save_steps": SAVE_STEPS, "save_total_limit": 4, "batch_size": 8}
    return training_task(
        "sft", tiny, training={**options, "max_seq_length": 256, **training}, data={"prompts": LONG_TEXTS}
    )


def test_after_the_engines_death_the_same_dispatch_ends_at_the_weights_of_an_unbroken_run(
    world: World, tiny: Path, dice: random.Random
):
    import torch

    daemon = start_trainer(world, tiny)
    task_id = world.send(sft(tiny))
    folder = folder_of(world, task_id)
    reach(folder, dice.randrange(SAVE_STEPS + 1, 16), STEPS)
    rank, (engine,) = rank_of(folder), daemon.engines()

    psutil.Process(engine).kill()

    end = world.ended(task_id)
    assert not alive(rank), "the rank outlives its engine"
    assert not tagged_below(world.folder)
    assert (end.reason, end.event["payload"]["retryable"]) == ("engine_crash", True)
    assert "the engine process was ended by SIGKILL" in end.error
    cut_at, (whole, *_) = last_step(folder), whole_checkpoints(folder)
    assert cut_at - SAVE_STEPS - 1 <= whole <= cut_at

    world.send(sft(tiny), task_id=task_id)
    resumed = world.ended(task_id, count=2, within_sec=TRAINING_SEC)
    unbroken = world.run(sft(tiny), within_sec=TRAINING_SEC)

    check_resumed(resumed, whole, STEPS)
    assert unbroken.result["resumed_from_step"] is None
    expected = weights_of(unbroken)
    for name, weight in weights_of(resumed).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6, msg=name)


def test_damaged_checkpoints_and_those_of_another_spec_are_not_taken(world: World, tiny: Path, dice: random.Random):
    daemon = start_trainer(world, tiny)
    task_id = world.send(sft(tiny))
    folder = folder_of(world, task_id)
    reach(folder, dice.randrange(3 * SAVE_STEPS + 1, 18), STEPS)
    engines = daemon.engines()

    rank_of(folder).kill()

    end = world.ended(task_id)
    assert (end.reason, end.event["payload"]["retryable"]) == ("engine_crash", True)
    assert "rank 0 ended by SIGKILL" in end.error
    assert any("'loss'" in line for line in end.result["log_tail"])
    assert daemon.engines() == engines, "the engine did not survive its rank"

    last, unmarked, whole, *_ = whole_checkpoints(folder)
    cut_off = folder / "checkpoints" / f"checkpoint-{last}" / "model.safetensors"
    with cut_off.open("r+b") as file:
        file.truncate(cut_off.stat().st_size // 2)
    (folder / "checkpoints" / f"checkpoint-{unmarked}" / "complete.json").unlink()
    world.send(sft(tiny), task_id=task_id)
    wait_for_news(world, task_id, f"continues after step {whole}")
    note = task_log(daemon, f"continues from checkpoint-{whole}, the last whole checkpoint of this task")
    assert f"removed checkpoint-{unmarked}, checkpoint-{last} (cut off, or of another run)" in note
    world.cancel(task_id)
    assert world.ended(task_id, count=2).reason == "cancelled"

    # All rows in one step, for which a CPU needs some seconds.
    world.send(sft(tiny, batch_size=128, gradient_accumulation_steps=4), task_id=task_id)
    wait_for_news(world, task_id, "training begins", count=2)
    assert f"checkpoint-{whole}" in task_log(daemon, "of another run")
    assert not list((folder / "checkpoints").glob("checkpoint-*"))
    rank = rank_of(folder)
    spent = rank.cpu_times().user
    wait_until(lambda: rank.cpu_times().user > spent + 0.3, "it computes its first step")
    began = time.monotonic()
    world.cancel(task_id)
    end = world.ended(task_id, count=3)
    assert time.monotonic() - began < CANCEL_SEC
    assert end.reason == "cancelled"
    assert last_step(folder) == 0, "it was not in the middle of its first step"
    assert not alive(rank)
    assert daemon.engines() == engines
    assert not trainers_in(tagged_below(world.folder))
    assert world.run().ok


def wait_for_news(world: World, task_id: str, message: str, *, count: int = 1) -> None:
    """Wait for the progress message with which a training goes into its first step."""
    wait_until(
        lambda: [event["payload"].get("message") for event in world.events.of_task(task_id)].count(message) >= count,
        f"{task_id} says {message!r}",
        within_sec=TRAINING_SEC,
    )


def task_log(daemon: DaemonProcess, words: str) -> str:
    """The last line with these words that a task has sent to the daemon's log."""
    lines = [record["event"] for record in daemon.logged("task_log")]
    found = [line for line in lines if words in line]
    assert found, f"no {words!r} in {lines}"
    return str(found[-1])


def test_after_the_daemons_death_a_training_goes_on_by_itself(world: World, tiny: Path, dice: random.Random):
    daemon = start_trainer(world, tiny)
    task_id = world.send(sft(tiny))
    folder = folder_of(world, task_id)
    reach(folder, dice.randrange(SAVE_STEPS + 1, 13), STEPS)
    first_life = tagged_below(world.folder)
    assert {rank_of(folder).pid, *daemon.engines()} <= {process.pid for process in first_life}

    world.kill(daemon)

    wait_until(lambda: not any(map(alive, first_life)), "all of it is gone", within_sec=10)
    assert not tagged_below(world.folder)
    whole, *_ = whole_checkpoints(folder)
    patient = start_trainer(world, tiny, idle=False)
    reach(folder, last_step(folder) + 1, STEPS)
    patient.signal(signal.SIGTERM)  # it waits for what ends within the grace
    assert patient.wait(TRAINING_SEC) == 0
    world.unattended.clear()
    check_resumed(world.ended(task_id), whole, STEPS)
    assert len(world.events.ends(task_id)) == 1


def test_a_stop_in_a_hurry_gives_a_training_back_and_ppo_resumes(world: World, tiny: Path, dice: random.Random):
    steps, save_steps, batch = 12, 2, 8
    spec = training_task(
        "ppo",
        tiny,
        training={"max_steps": steps, "save_steps": save_steps, "batch_size": batch},
        generation={"max_new_tokens": 16, "temperature": 1.0},
        reward_functions=[LETTERS],
    )
    daemon = start_trainer(world, tiny, SHUTDOWN_GRACE_SEC="0.3")
    task_id = world.send(spec)
    reach(folder_of(world, task_id), dice.randrange(save_steps + 1, 8), steps)

    assert daemon.stop() == 0

    end = world.ended(task_id)
    assert (end.reason, end.event["payload"]["retryable"]) == ("worker_shutdown", True)
    assert not tagged_below(world.folder)
    whole, *_ = whole_checkpoints(end.folder)
    start_trainer(world, tiny)
    world.send(spec, task_id=task_id)
    resumed = world.ended(task_id, count=2, within_sec=TRAINING_SEC)
    check_resumed(resumed, whole, steps)
    assert resumed.result["train_metrics"]["episodes"] == steps * batch

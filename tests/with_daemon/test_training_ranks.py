"""Two ranks on the CPU, over gloo, against one with the doubled batch; two such groups at once, one of them killed."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import psutil
import pytest
from daemon_process import tagged_below
from daemon_world import Json, World
from training_lives import (
    alive,
    check_resumed,
    folder_of,
    rank_of,
    reach,
    start_trainer,
    steps_of,
    trainers_in,
    weights_of,
    whole_checkpoints,
)
from training_models import make_tiny_llama
from training_tasks import TRAINING_SEC, logged, training_task

STEPS: Final = 16
SAVE_STEPS: Final = 4
BATCH: Final = 4
TEXTS: Final = [f"{number} bottles of water stand on the wall. " * (number % 5 + 2) for number in range(64)]
LOSS_TOLERANCE: Final = 1e-5
WEIGHT_TOLERANCE: Final = 1e-4
"""Sums in another order differ in the last digits: by some 1e-6 here."""


def sft(tiny: Path, *, ranks: int) -> Json:
    """Four steps are an epoch, so that the rows of each step are the same however many ranks share them."""
    options = {"max_steps": STEPS, "save_steps": SAVE_STEPS, "max_seq_length": 256, "learning_rate": 1e-3}
    shared = {"nproc_per_node": ranks, "batch_size": 2 * BATCH // ranks, "gradient_accumulation_steps": 2}
    return training_task("sft", tiny, training={**options, **shared}, data={"prompts": TEXTS})


def test_two_ranks_learn_what_one_learns_from_the_doubled_batch(world: World, tmp_path_factory: pytest.TempPathFactory):
    import torch

    tiny = make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")
    for worker_id in ("w-1", "w-2"):
        start_trainer(world, tiny, worker_id)
    left_alone, killed = (world.send(sft(tiny, ranks=2), to=worker_id) for worker_id in ("w-1", "w-2"))
    folder = folder_of(world, killed)
    reach(folder, SAVE_STEPS + 1, STEPS)
    ranks = [rank_of(folder, rank) for rank in (0, 1)]
    (engine,) = world.daemons[1].engines()

    ranks[1].kill()

    end = world.ended(killed)
    assert (end.reason, end.event["payload"]["retryable"]) == ("engine_crash", True)
    assert "rank 1 ended by SIGKILL" in end.error
    assert not any(map(alive, ranks))
    assert world.daemons[1].engines() == [engine]
    assert not trainers_in(psutil.Process(engine).children(recursive=True))
    whole, *_ = whole_checkpoints(folder)

    world.send(sft(tiny, ranks=2), task_id=killed, to="w-2")
    two = world.ended(left_alone, within_sec=TRAINING_SEC)
    one = world.run(sft(tiny, ranks=1), within_sec=TRAINING_SEC)
    resumed = world.ended(killed, count=2, within_sec=TRAINING_SEC)

    assert two.ok, two.error
    assert (two.result["devices"]["ranks"], one.result["devices"]["ranks"]) == (2, 1)
    assert steps_of(two) == [*range(1, STEPS + 1)]
    assert {file.name for file in (two.folder / "logs").glob("rank*")} == {"rank0.log", "rank1.log"}
    assert names_below(two.folder) - names_below(one.folder) == {"logs/rank1.log", "logs/torchrun.log"} | {
        f"checkpoints/checkpoint-{step}/rng_state_{rank}.pth" for step in (12, 16) for rank in (0, 1)
    }
    check_resumed(resumed, whole, STEPS)
    expected = weights_of(one)
    for run in (two, resumed):
        assert run.result["dataset_size"] == one.result["dataset_size"] == len(TEXTS)
        assert run.result["train_metrics"]["tokens"] == one.result["train_metrics"]["tokens"]
        assert logged(run, "loss") == pytest.approx(logged(one, "loss"), abs=LOSS_TOLERANCE)
        for name, weight in weights_of(run).items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=WEIGHT_TOLERANCE, msg=name)
    assert not trainers_in(tagged_below(world.folder))


def names_below(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}

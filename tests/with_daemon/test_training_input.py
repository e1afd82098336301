"""Trainings that cannot go well: each gets its reason and a text that says what to do, and hurts no later task."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from daemon_world import Json, TaskEnd, World
from training_models import answer, load_saved, make_tiny_llama
from training_tasks import PAIRS, SENTENCES, TRAINING_SEC, training_task

NOWHERE: Final = "acme/no-such-model"
"""Nobody looks for the model of a task whose spec is wrong."""

WRONG_SPECS: Final[list[tuple[Json, list[str]]]] = [
    (training_task("sft", NOWHERE, training={"fp16": True, "bf16": True}), ["fp16 and bf16 are both true"]),
    (
        training_task("sft", NOWHERE, training={"deepspeed": {"zero_optimization": {"stage": 2}}, "fsdp": True}),
        ["deepspeed and fsdp are both given"],
    ),
    (training_task("sft", NOWHERE, data={}), ["names no rows to train on", "jsonl", "dataset_name", "prompts"]),
    (
        training_task("grpo", NOWHERE, data=None),
        ["spec.data is {}: names no rows", "dataset_name, prompts"],
    ),
    (training_task("dpo", NOWHERE, data={"prompts": ["a"]}), ["names no rows to train on", "preferences"]),
    (
        training_task("dpo", NOWHERE, data={"preferences": [*PAIRS, {"prompt": "a", "chosen": "b"}]}),
        ["spec.data.preferences[4].rejected is missing"],
    ),
    (training_task("dpo", NOWHERE, training={"packing": True}), ["packing is true, but dpo cannot pack"]),
    (training_task("ppo", NOWHERE, reward_functions=[]), ["neither reward_model nor reward_functions"]),
    (
        training_task("ppo", NOWHERE, training={"batch_size": 4, "num_mini_batches": 3}),
        ["num_mini_batches is 3", "does not divide", "= 4"],
    ),
    (training_task("grpo", NOWHERE, generation={"temperature": 0}), ["spec.generation.temperature is 0", "greater"]),
    (training_task("lora_sft", NOWHERE, lora={"target_modules": []}), ["spec.lora.target_modules is []", "at least 1"]),
    (training_task("sft", NOWHERE, training={"learning_rate": 0}), ["spec.training.learning_rate is 0", "greater"]),
    (training_task("sft", NOWHERE, training={"report_to": "wandb"}), ["report_to", "'wandb'", "tensorboard"]),
    (training_task("sft", ""), ["spec.model.source.identifier", "is missing", "expected a hub name"]),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def shared_trainer(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"))
    made.start(WORKER_ALLOWED_ROOTS=str(tiny.parent), OMP_NUM_THREADS="1")  # more is slower here
    yield made
    made.close()


@pytest.fixture
def trainer(shared_trainer: World) -> Iterator[World]:
    """The module's daemon; after each test it must still be the same process and run the next task."""
    (daemon,) = shared_trainer.daemons
    yield shared_trainer
    assert shared_trainer.run().ok
    assert daemon.running


def refused(end: TaskEnd, reason: str, *words: str) -> None:
    """The task failed as it should, and the same is said in the event and on disk."""
    assert not end.ok
    assert end.reason == reason, end.error
    for word in words:
        assert word in end.error
    assert end.hint
    result = end.result
    assert (result["ok"], result["error"], result["reason"], result["hint"]) == (False, end.error, reason, end.hint)
    assert "Traceback" not in end.error
    assert not [path.name for path in end.folder.glob("final_*")]


def never_trained(end: TaskEnd) -> None:
    """No weights were loaded for it."""
    log = (end.folder / "logs" / "rank0.log").read_text()
    assert "Loading weights" not in log
    assert not (end.folder / "artifacts" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("spec", "words"), WRONG_SPECS, ids=lambda value: str(value)[:60])
def test_a_wrong_spec_is_refused_before_anything_starts(trainer: World, spec: Json, words: list[str]):
    end = trainer.run(spec)

    refused(end, "bad_spec", *words)
    assert not any(event["type"] == "TASK_STARTED" for event in trainer.events.of_task(end.event["task_id"]))


def test_what_the_worker_does_not_have_is_refused_before_a_rank_starts(trainer: World, tiny: Path):
    cases: list[tuple[Json, list[str]]] = [
        ({"nproc_per_node": 64}, ["nproc_per_node is 64"]),
        ({"resume_from_path": "no/such/checkpoint"}, ["resume_from_path", "no/such/checkpoint"]),
        ({"resume_from_path": "/etc"}, ["resume_from_path", "/etc", "outside"]),
        ({"resume_from_path": str(tiny)}, ["resume_from_path", "no trainer_state.json"]),
    ]
    for training, words in cases:
        end = trainer.run(training_task("sft", tiny, training=training))
        refused(end, "bad_spec", *words)
        assert not (end.folder / "logs" / "rank0.log").exists()


def test_a_missing_column_is_named_with_those_there_are(trainer: World, tiny: Path):
    rows = tiny.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"q{n}", "answer": f"a{n}"}) + "\n" for n in range(4)))

    end = trainer.run(
        training_task("sft", NOWHERE, data={"dataset_name": str(rows), "text_field": "content"}),
        within_sec=TRAINING_SEC,
    )

    refused(end, "bad_data", "text_field wants the column 'content'", "rows.jsonl", "question, answer")
    never_trained(end)


def test_target_modules_that_match_nothing_are_refused(trainer: World, tiny: Path):
    spec = training_task("lora_sft", tiny, lora={"target_modules": ["c_attn"]})

    end = trainer.run(spec, within_sec=TRAINING_SEC)

    refused(end, "bad_spec", "spec.lora.target_modules is ['c_attn']", "q_proj", "down_proj")
    never_trained(end)


def test_a_run_that_diverges_stops_and_names_the_last_good_checkpoint(trainer: World, tiny: Path):
    # The first step of the warm-up has a learning rate of nothing, the second one beyond all bounds.
    pace: dict[str, Any] = {"learning_rate": 1e30, "warmup_steps": 10, "max_steps": 40, "save_steps": 1}

    end = trainer.run(training_task("sft", tiny, training=pace), within_sec=TRAINING_SEC)

    refused(
        end, "diverged", "the training diverged at step", "of 40", "learning rate", "no finite loss was seen after it"
    )
    assert "training.learning_rate" in end.hint
    good = end.folder / "checkpoints" / "checkpoint-1"
    assert f"the last good checkpoint is {good}; checkpoint-2 is newer" in end.error
    model, tokenizer = load_saved(good)
    untrained, _ = load_saved(tiny)
    assert answer(model, tokenizer, SENTENCES[0]) == answer(untrained, tokenizer, SENTENCES[0])
    assert (end.folder / "artifacts" / "training.png").is_file()


def test_what_has_no_effect_is_a_warning(trainer: World, tiny: Path):
    training: dict[str, Any] = {"batch_size": 64, "visible_devices": "0,1", "target_kl": 0.1, "lerning_rate": 1}

    end = trainer.run(training_task("sft", tiny, training=training, lora={"r": 4}), within_sec=TRAINING_SEC)

    assert end.ok, end.error
    assert end.result["dataset_size"] == 4
    warnings = "\n".join(end.result["warnings"])
    for words in ("batch", "visible_devices", "target_kl has no effect", "spec.lora has no effect in sft"):
        assert words in warnings
    assert (
        "unknown key 'spec.training.lerning_rate' is ignored; did you mean 'spec.training.learning_rate'?"
        in (end.result["warnings"])
    )

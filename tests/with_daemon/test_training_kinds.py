"""Each kind of training through the daemon: the examples, with a tiny model, do what they are for."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from daemon_process import REPO
from daemon_world import Json, TaskEnd, World
from training_models import answer, load_saved, make_tiny_llama
from training_tasks import TRAINING_SEC, logged, metrics_of

from worker.commands.task_files import load_task

KEYS: Final = {
    "task_id", "training_successful", "training_time_seconds", "error_message", "model_name", "dataset_size",
    "output_dir", "checkpoints_dir", "resume_from_path", "resumed_from_step", "train_metrics", "versions", "seed",
    "devices", "warnings",
}  # fmt: skip
"""Of each training's result, whatever its kind."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[World]:
    """One daemon for the module, which may read the tiny model."""
    made = World(tmp_path_factory.mktemp("world"))
    made.start(WORKER_ALLOWED_ROOTS=str(tiny.parent), OMP_NUM_THREADS="1")  # more is slower here
    yield made
    made.close()


def example(name: str, model: Path, **training: object) -> Json:
    """An example's spec with a model that fits a test; a random one needs another pace too."""
    spec: Any = load_task(str(REPO / "examples" / f"{name}.yaml"))["spec"]
    assert spec["model"] == {"source": {"identifier": "HuggingFaceTB/SmolLM2-135M-Instruct"}}
    spec["model"]["source"]["identifier"] = str(model)
    spec["training"] |= training
    return spec | {"enforce_cpu": True}


def train(world: World, spec: Json, folder: str) -> TaskEnd:
    """Run a training and check what all kinds leave: result, files, news.

    Args:
        world: with one daemon.
        spec: of a training from its beginning to `max_steps`.
        folder: where the model is expected, in the task's folder.
    """
    end = world.run(spec, within_sec=TRAINING_SEC)
    assert end.ok, end.error
    task_id, steps = end.event["task_id"], spec["training"]["max_steps"]
    check_result(end, spec, folder)
    check_files(end, steps, folder)

    news = [event["payload"] for event in world.events.of_task(task_id) if event["type"] == "TASK_PROGRESS"]
    assert {each["total"] for each in news} == {steps}
    assert [each["done"] for each in news] == sorted(each["done"] for each in news)
    assert (news[-1]["done"], news[-1]["unit"], news[-1]["taskType"]) == (steps, "steps", spec["taskType"])
    assert {"loss", "learning_rate", "eta_sec"} <= news[-1]["metrics"].keys()
    seen = world.hash_of(task_id, "SUCCEEDED")
    assert (seen["progress_done"], seen["progress_total"], seen["task_type"]) == (
        str(steps),
        str(steps),
        spec["taskType"],
    )
    return end


def check_result(end: TaskEnd, spec: Json, folder: str) -> None:
    result, name = end.result, Path(folder).name
    assert result.keys() >= KEYS
    assert (result["task_id"], result["training_successful"]) == (end.event["task_id"], True)
    assert result["training_time_seconds"] > 0
    assert (result["error_message"], result["resume_from_path"], result["resumed_from_step"]) == (None, None, None)
    assert result["model_name"] == spec["model"]["source"]["identifier"]
    (rows,) = (rows for rows in spec["data"].values() if isinstance(rows, list))
    assert result["dataset_size"] == len(rows)
    assert (result["output_dir"], result["checkpoints_dir"]) == (str(end.folder), str(end.folder / "checkpoints"))
    assert result[f"{name}_path"] == str(end.folder / folder)
    assert result["seed"] == 42
    assert {"trl", "torch", "transformers", "peft", "datasets"} <= result["versions"].keys()
    assert (result["devices"]["ranks"], result["devices"]["gpus"]) == (1, [])
    assert result["train_metrics"]["steps"] == spec["training"]["max_steps"]
    assert result["train_metrics"]["epochs"] > 0
    assert result["warnings"] == []


def check_files(end: TaskEnd, steps: int, folder: str) -> None:
    from PIL import Image  # noqa: PLC0415 - comes with an extra

    model = end.folder / folder
    assert {"README.md", "tokenizer.json", "chat_template.jinja"} <= {file.name for file in model.iterdir()}
    card = (model / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: ")
    assert f"| steps | {steps} |" in card
    assert [line["step"] for line in metrics_of(end.folder) if "train_runtime" not in line] == [*range(1, steps + 1)]
    with Image.open(end.folder / "artifacts" / "training.png") as curve:
        assert curve.format == "PNG"
        assert min(curve.size) > 200
        curve.load()
        assert len(set(curve.convert("L").tobytes())) > 1, "nothing is drawn"
    assert "rank 0 of 1" in (end.folder / "logs" / "rank0.log").read_text()
    entries = {each["name"]: each for each in json.loads((end.folder / "manifest.json").read_text())["entries"]}
    assert {entries[name]["status"] for name in ("responses.json", "logs", "artifacts", "checkpoints")} == {"present"}
    assert Path(folder).parts[0] in entries
    assert not (end.folder / "_scratch").exists()


def conversation(spec: Json, tokenizer: Any, place: int = 0) -> tuple[str, str]:  # noqa: ANN401 - a heavy type
    """A question of an example as the model gets it, and the answer that it is taught."""
    asked, taught = spec["data"]["messages"][place]
    return tokenizer.apply_chat_template([asked], tokenize=False, add_generation_prompt=True), taught["content"]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_sft_lowers_the_loss_and_its_model_knows_the_answers(trainer: World, tiny: Path):
    spec = example("sft", tiny, learning_rate=5e-3)

    end = train(trainer, spec, "final_model")

    losses = logged(end, "loss")
    assert losses[0] > 3
    assert losses[-1] < 0.1
    assert end.result["train_metrics"]["final_loss"] == pytest.approx(losses[-1])
    assert end.result["train_metrics"]["tokens"] > 0
    model, tokenizer = load_saved(end.folder / "final_model")
    untrained, _ = load_saved(tiny)
    for place in range(4):
        asked, taught = conversation(spec, tokenizer, place)
        assert answer(model, tokenizer, asked) == taught
        assert answer(untrained, tokenizer, asked) != taught
    assert "final_model_archive" not in end.result
    kept = sorted(folder.name for folder in (end.folder / "checkpoints").glob("checkpoint-*"))
    assert kept == ["checkpoint-20", "checkpoint-40"]


def test_lora_sft_leaves_the_base_as_it_is_and_its_adapter_knows_the_answers(trainer: World, tiny: Path):
    import peft

    before = digests(tiny)
    spec = example("lora-sft", tiny, learning_rate=1e-2)

    end = train(trainer, spec, "final_lora")

    assert digests(tiny) == before
    losses = logged(end, "loss")
    assert losses[0] > 3
    assert losses[-1] < 0.1
    adapter = end.folder / "final_lora"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny)
    assert not (adapter / "model.safetensors").exists()
    base, tokenizer = load_saved(tiny)
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    asked, taught = conversation(spec, tokenizer)
    assert answer(model, tokenizer, asked) == taught
    with model.disable_adapter():
        assert answer(model, tokenizer, asked) != taught

    assert end.result["final_lora_archive"] == "final_lora.tar.gz"
    with tarfile.open(end.result["final_lora_archive_path"]) as archive:
        packed = {Path(name).name for name in archive.getnames() if name != "final_lora"}
        assert {Path(name).parts[0] for name in archive.getnames()} == {"final_lora"}
    assert packed == {file.name for file in adapter.iterdir()}


def test_dpo_raises_the_margin_of_the_chosen_answers(trainer: World, tiny: Path):
    end = train(trainer, example("dpo", tiny, learning_rate=1e-3), "checkpoints/final_model")

    margins = logged(end, "rewards/margins")
    assert margins[0] == pytest.approx(0, abs=1e-4)  # the model is still its own reference
    assert margins[-1] > 1
    assert end.result["train_metrics"]["final_reward_margin"] == pytest.approx(margins[-1])
    load_saved(end.folder / "checkpoints" / "final_model")


def test_ppo_raises_the_mean_reward(trainer: World, tiny: Path):
    pace = {"learning_rate": 3e-3, "gradient_accumulation_steps": 4, "num_mini_batches": 4, "kl_coef": 0.001}
    spec = example("ppo", tiny, max_steps=10, **pace, trl={"lr_scheduler_type": "constant"})
    spec["generation"]["max_new_tokens"] = 8

    end = train(trainer, spec, "checkpoints/final_model")

    rewards = logged(end, "objective/scores")
    assert mean(rewards[-3:]) > rewards[0] + 0.6
    assert end.result["train_metrics"]["final_reward"] == pytest.approx(rewards[-1])
    load_saved(end.folder / "checkpoints" / "final_model")


def test_a_reward_model_is_trained_and_rates_in_ppo(trainer: World, tiny: Path):
    import transformers

    end = train(trainer, example("reward", tiny, learning_rate=1e-3), "final_model")

    assert logged(end, "accuracy")[-1] == 1
    assert logged(end, "margin")[-1] > logged(end, "margin")[0] + 1
    folder = end.folder / "final_model"
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert classifier.config.num_labels == 1
    assert "pipeline_tag: text-classification" in (folder / "README.md").read_text()

    spec = example("ppo", tiny, max_steps=2, save_steps=2)
    del spec["reward_functions"]
    rated = train(trainer, spec | {"reward_model": {"identifier": str(folder)}}, "checkpoints/final_model")

    assert len(set(logged(rated, "objective/scores"))) == 2


def test_grpo_weighs_two_rewards(trainer: World, tiny: Path):
    end = train(trainer, example("grpo", tiny, learning_rate=1e-3), "final_model")

    lengths, repetitions = (logged(end, f"rewards/{name}/mean") for name in ("length", "repetition_penalty"))
    sums = [length + 0.5 * repetition for length, repetition in zip(lengths, repetitions, strict=True)]
    assert logged(end, "reward") == pytest.approx(sums, abs=1e-5)
    load_saved(end.folder / "final_model")

"""What a training leaves: a folder that libraries load, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from training_models import RunMaker

from executors.model_spec import CHECKPOINT
from executors.training.saving.final_model import save_final
from executors.training.training_run import BuiltTrainer, TrainingRun


def built_trainer(run: TrainingRun, where: Path, *, lora: bool = False, folder: str = "") -> BuiltTrainer:
    """A trainer that has not trained; its model is changed a little, as training does."""
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(where)
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    if lora:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.01)
    arguments = transformers.TrainingArguments(
        output_dir=str(run.job.checkpoints_dir), report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(model=model, args=arguments, processing_class=tokenizer)
    trainer.state.global_step = 12
    chosen = folder or ("final_lora" if lora else "final_model")
    return BuiltTrainer(trainer=trainer, tokenizer=tokenizer, adapter=lora, folder=chosen)


def head_of(card: Path) -> dict[str, Any]:
    """The YAML head of a model card."""
    _, head, _ = card.read_text().split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def same_weights(one: Any, other: Any) -> bool:  # noqa: ANN401 - heavy types
    weights = other.state_dict()
    return all(weight.equal(weights[name]) for name, weight in one.state_dict().items())


@pytest.fixture
def new_run(make_run: RunMaker) -> Callable[..., TrainingRun]:
    def new(kind: str = "sft", **sections: Any) -> TrainingRun:  # noqa: ANN401 - parts of a spec
        return make_run(kind, **{"data": {"prompts": ["a"]}, **sections})

    return new


NewRun = Callable[..., TrainingRun]


@pytest.mark.parametrize("folder", ["final_model", "checkpoints/final_model"])
def test_a_model_is_saved_with_tokenizer_and_card(new_run: NewRun, tiny_chat_dir: Path, folder: str):
    import transformers

    run = new_run()
    built = built_trainer(run, tiny_chat_dir, folder=folder)
    assert save_final(run, built) == folder
    saved = run.job.out_dir / folder
    model = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert same_weights(model, built.trainer.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    assert tokenizer.chat_template == built.tokenizer.chat_template
    names = {path.name for path in saved.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith(".bin")]
    assert [path.name for path in saved.parent.iterdir() if path.name.startswith(".")] == []


def test_an_adapter_names_its_base_as_the_task_does(new_run: NewRun, tiny_chat_dir: Path):
    import peft
    import transformers

    run = new_run("lora_sft", model="acme/tiny-chat")
    built = built_trainer(run, tiny_chat_dir, lora=True)
    save_final(run, built)
    saved = run.job.out_dir / "final_lora"
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "acme/tiny-chat"
    assert head_of(saved / "README.md")["base_model"] == "acme/tiny-chat"
    assert str(tiny_chat_dir) not in "".join(file.read_text(errors="replace") for file in saved.iterdir())
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_chat_dir)
    loaded = peft.PeftModel.from_pretrained(base, str(saved))
    assert same_weights(loaded, built.trainer.model)


def test_an_adapter_of_a_fetched_checkpoint_keeps_that_as_its_base(new_run: NewRun, tiny_chat_dir: Path):
    run = new_run("lora_sft", model="acme/tiny-chat", inputs={CHECKPOINT: tiny_chat_dir})
    save_final(run, built_trainer(run, tiny_chat_dir, lora=True))
    config = json.loads((run.job.out_dir / "final_lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_chat_dir)


def test_the_card_tells_what_was_done(new_run: NewRun, tiny_chat_dir: Path):
    run = new_run(
        model="acme/tiny-chat",
        data={"dataset_name": "acme/poems", "split": "train[:1%]"},
        training={"learning_rate": 3e-4, "seed": 7},
    )
    save_final(run, built_trainer(run, tiny_chat_dir))
    card = run.job.out_dir / "final_model" / "README.md"
    head = head_of(card)
    assert head["library_name"] == "transformers"
    assert head["base_model"] == "acme/tiny-chat"
    assert head["datasets"] == ["acme/poems"]
    assert "sft" in head["tags"]
    text = card.read_text()
    for part in ("acme/poems", "train[:1%]", "0.0003", "| seed | 7 |", "| steps | 12 |", "transformers", "license"):
        assert part in text


def test_hostile_names_cannot_break_the_card(new_run: NewRun, tiny_chat_dir: Path):
    run = new_run(
        model={"source": {"identifier": "x\n---\n# `heading`: |"}},
        data={"dataset_name": "a|b\n---\ntags: [evil]", "split": "tr`ain"},
    )
    save_final(run, built_trainer(run, tiny_chat_dir))
    card = run.job.out_dir / "final_model" / "README.md"
    assert head_of(card)["tags"] == ["sft", "trl"]
    assert "base_model" not in head_of(card)
    assert "\n# `heading`" not in card.read_text()


def test_names_of_modules_cannot_put_markup_into_the_card(new_run: NewRun, tiny_chat_dir: Path):
    run = new_run("lora_sft", lora={"target_modules": ["q_proj", "<img src=x>|\x1b[31m\u202e\n# red"]})
    save_final(run, built_trainer(run, tiny_chat_dir, lora=True))
    card = (run.job.out_dir / "final_lora" / "README.md").read_text()
    assert "q_proj, &lt;img src=x>\\|[31m # red |\n" in card


def test_an_address_with_a_secret_is_not_in_the_card(new_run: NewRun, tiny_chat_dir: Path, tmp_path: Path):
    file = tmp_path / "data.jsonl"
    run = new_run(data={"jsonl": {"url": "https://user:secret@host/data?token=secret"}}, inputs={"data.jsonl": file})
    save_final(run, built_trainer(run, tiny_chat_dir))
    assert "secret" not in (run.job.out_dir / "final_model" / "README.md").read_text()


def test_what_an_earlier_run_left_is_replaced(new_run: NewRun, tiny_chat_dir: Path):
    run = new_run()
    for name in ("final_model", ".final_model.partial", ".final_model.old"):
        (run.job.out_dir / name).mkdir()
        (run.job.out_dir / name / "stale.safetensors").write_bytes(b"old")
    save_final(run, built_trainer(run, tiny_chat_dir))
    assert not (run.job.out_dir / "final_model" / "stale.safetensors").exists()
    assert not list(run.job.out_dir.glob(".final_model*"))


@pytest.mark.parametrize("leads_somewhere", [True, False])
def test_a_link_in_the_place_of_the_model_is_replaced_not_followed(
    new_run: NewRun, tiny_chat_dir: Path, tmp_path: Path, *, leads_somewhere: bool
):
    run = new_run()
    elsewhere = tmp_path / "elsewhere"
    if leads_somewhere:
        elsewhere.mkdir()
        (elsewhere / "precious").write_text("kept")
    for name in ("final_model", ".final_model.partial", ".final_model.old"):
        (run.job.out_dir / name).symlink_to(elsewhere)
    save_final(run, built_trainer(run, tiny_chat_dir))
    assert (run.job.out_dir / "final_model" / "model.safetensors").is_file()
    assert not any(path.is_symlink() for path in run.job.out_dir.iterdir())
    assert not leads_somewhere or [path.name for path in elsewhere.iterdir()] == ["precious"]


def test_nothing_is_saved_if_the_task_wants_nothing(new_run: NewRun, tiny_chat_dir: Path):
    run = new_run(training={"save_model": False})
    assert save_final(run, built_trainer(run, tiny_chat_dir)) == ""
    assert not (run.job.out_dir / "final_model").exists()


def test_a_full_disk_leaves_the_earlier_model_and_no_half_one(
    new_run: NewRun, tiny_chat_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    run = new_run()
    first = built_trainer(run, tiny_chat_dir)
    save_final(run, first)
    before = (run.job.out_dir / "final_model" / "model.safetensors").read_bytes()

    def no_room(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="No space"):
        save_final(run, built_trainer(run, tiny_chat_dir))
    assert (run.job.out_dir / "final_model" / "model.safetensors").read_bytes() == before
    assert not list(run.job.out_dir.glob(".final_model*"))


def test_the_parts_of_fsdp_are_put_together(new_run: NewRun, tiny_chat_dir: Path):
    run = new_run()
    built = built_trainer(run, tiny_chat_dir)
    asked: list[str] = []
    plugin = SimpleNamespace(set_state_dict_type=asked.append)
    built.trainer.accelerator = SimpleNamespace(  # type: ignore[attr-defined]
        state=SimpleNamespace(fsdp_plugin=plugin), unwrap_model=lambda model, **_: model
    )
    save_final(run, built)
    assert asked == ["FULL_STATE_DICT"]
    assert (run.job.out_dir / "final_model" / "model.safetensors").is_file()

"""DPO on a tiny model: it learns which answer is preferred, and compares with the base model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_models import Trained, build, train

from executors.errors import BadDataError, BadSpecError
from executors.training.training_job import ResumePoint
from executors.training.training_run import TrainingRun

RunMaker = Callable[..., TrainingRun]

PAIRS = [
    {"prompt": "The sky is ", "chosen": "blue", "rejected": "green"},
    {"prompt": "The grass is ", "chosen": "green", "rejected": "blue"},
    {"prompt": "Snow is ", "chosen": "white", "rejected": "black"},
    {"prompt": "Coal is ", "chosen": "black", "rejected": "white"},
]

FAST = {
    "learning_rate": 1e-3,
    "max_steps": 12,
    "batch_size": 4,
    "logging_steps": 1,
    "save_steps": 6,
    "max_seq_length": 64,
    "gradient_checkpointing": False,
    "beta": 0.5,
}


def messages(text: str, role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


CONVERSATIONS = [
    {
        "prompt": messages(pair["prompt"], "user"),
        "chosen": messages(pair["chosen"], "assistant"),
        "rejected": messages(pair["rejected"], "assistant"),
    }
    for pair in PAIRS
]


def margins(trained: Trained) -> list[float]:
    return [log["rewards/margins"] for log in trained.built.trainer.state.log_history if "rewards/margins" in log]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_margin_rises_and_the_model_is_saved(make_run: RunMaker, tiny_chat_dir: Path):
    before = digests(tiny_chat_dir)
    trained = train(make_run("dpo", data={"preferences": PAIRS}, training=FAST))

    found = margins(trained)
    assert found[0] == pytest.approx(0, abs=1e-4)  # the reference is the model itself at first
    assert found[-1] > 0.5
    assert trained.losses[-1] < 0.6 < trained.losses[0]
    assert trained.built.trainer.beta == 0.5
    assert trained.folder == trained.run.job.out_dir / "checkpoints" / "final_model"
    assert digests(tiny_chat_dir) == before

    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(trained.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained.folder)
    assert model.config.vocab_size == len(tokenizer)


def test_the_reference_stays_as_the_base_was(make_run: RunMaker, tiny_chat_dir: Path):
    import torch
    import transformers

    trained = train(make_run("dpo", data={"preferences": PAIRS}, training=FAST | {"max_steps": 3}))
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_chat_dir).state_dict()
    reference = trained.built.trainer.ref_model.state_dict()
    assert all(torch.equal(base[name], reference[name]) for name in base)
    assert not all(torch.equal(base[name], tensor) for name, tensor in trained.built.trainer.model.state_dict().items())


def test_with_lora_the_base_model_is_the_reference(make_run: RunMaker, tiny_chat_dir: Path):
    import torch
    import transformers
    from peft import PeftModel

    trained = train(
        make_run(
            "dpo",
            data={"preferences": CONVERSATIONS},
            training=FAST | {"learning_rate": 1e-2, "gradient_checkpointing": True},
            lora={"r": 4},
        )
    )
    assert margins(trained)[0] == pytest.approx(0, abs=1e-4)
    assert margins(trained)[-1] > 0.3
    assert trained.built.trainer.ref_model is None
    assert trained.folder == trained.run.job.out_dir / "checkpoints" / "final_lora"

    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_chat_dir)
    under_it = trained.built.trainer.model.get_base_model().state_dict()
    assert all(
        torch.equal(base.state_dict()[name], under_it[_below_lora(name, under_it)]) for name in base.state_dict()
    )
    assert PeftModel.from_pretrained(base, trained.folder).active_adapter == "default"
    assert json.loads((trained.folder / "adapter_config.json").read_text())["r"] == 4


def test_an_adapter_is_trained_on_and_compared_with_a_copy_of_itself(make_run: RunMaker):
    fast = FAST | {"learning_rate": 1e-2, "max_steps": 4, "save_steps": 2}
    first = train(make_run("dpo", data={"preferences": PAIRS}, training=fast, lora={"r": 4}))
    assert first.folder is not None
    further: dict[str, Any] = {
        "data": {"preferences": PAIRS},
        "training": fast,
        "lora": {"r": 4},
        "checkpoint": {"load": {"path": str(first.folder)}},
        "inputs": {"checkpoint.load": first.folder},
    }
    second = train(make_run("dpo", **further))
    assert margins(second)[0] == pytest.approx(0, abs=1e-4)
    assert margins(second)[-1] > 0.05
    assert second.folder is not None
    assert {path.name for path in second.folder.iterdir()} == {path.name for path in first.folder.iterdir()}

    point = ResumePoint(path=second.run.job.checkpoints_dir / "checkpoint-2", step=2)
    resumed = train(make_run("dpo", **further, resume=point))
    assert resumed.steps == 4
    assert margins(resumed)[-1] == pytest.approx(margins(second)[-1], rel=1e-3)


def _below_lora(name: str, tensors: dict[str, object]) -> str:
    """The name of a base weight in a model whose layers LoRA has wrapped."""
    return name if name in tensors else name.replace(".weight", ".base_layer.weight")


def test_one_seed_gives_one_result(make_run: RunMaker):
    first, second = (train(make_run("dpo", data={"preferences": PAIRS}, training=FAST)) for _ in range(2))
    assert margins(first) == margins(second)


def test_a_resumed_run_ends_where_the_whole_one_does(make_run: RunMaker):
    whole = train(make_run("dpo", data={"preferences": PAIRS}, training=FAST))
    checkpoint = whole.run.job.checkpoints_dir / "checkpoint-6"
    resumed = train(
        make_run(
            "dpo",
            data={"preferences": PAIRS},
            training=FAST,
            resume=ResumePoint(path=checkpoint, step=6),
        )
    )
    assert resumed.steps == whole.steps == 12
    assert margins(resumed)[-1] == pytest.approx(margins(whole)[-1], rel=1e-3)


def test_prompts_that_are_too_long_are_left_out(make_run: RunMaker):
    long = {"prompt": "word " * 100, "chosen": "a", "rejected": "b"}
    run = make_run("dpo", data={"preferences": [*PAIRS, long]}, training=FAST)
    built = build(run)
    assert len(built.trainer.train_dataset) == len(PAIRS)
    assert any("1 of 5 pairs are left out" in text for text in run.tell.warnings)

    with pytest.raises(BadDataError, match=r"none of the 1 pairs fits.*training\.max_seq_length \(64 tokens\)"):
        build(make_run("dpo", data={"preferences": [long]}, training=FAST))


def test_conversations_need_a_chat_template(make_run: RunMaker, tiny_base_dir: Path):
    with pytest.raises(BadSpecError, match="no chat template"):
        build(make_run("dpo", model=tiny_base_dir, data={"preferences": CONVERSATIONS}, training=FAST))

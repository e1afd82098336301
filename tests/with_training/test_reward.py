"""Training of reward models: the preferred answer gets the higher score."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_models import Trained, build, train

from executors.errors import BadDataError
from executors.training.trainers.base_models import load_classifier, load_tokenizer, lora_config
from executors.training.trainers.ppo_training import _value_model
from executors.training.training_job import ResumePoint
from executors.training.training_run import TrainingRun

RunMaker = Callable[..., TrainingRun]

PAIRS = [
    {"prompt": "The sky is ", "chosen": "blue, which is kind", "rejected": "awful"},
    {"prompt": "Snow is ", "chosen": "white and kind", "rejected": "an awful thing, they say"},
    {"prompt": "Coal is ", "chosen": "black, so be kind", "rejected": "awful to see"},
    {"prompt": "Grass is ", "chosen": "kind", "rejected": "green and awful"},
]

FAST = {
    "learning_rate": 1e-3,
    "max_steps": 20,
    "batch_size": 4,
    "logging_steps": 1,
    "save_steps": 10,
    "max_seq_length": 64,
    "gradient_checkpointing": False,
}


def logged(trained: Trained, name: str) -> list[float]:
    return [log[name] for log in trained.built.trainer.state.log_history if name in log]


def scores(model: Any, tokenizer: Any, texts: list[str]) -> list[float]:  # noqa: ANN401 - heavy types
    import torch

    with torch.no_grad():
        found: list[float] = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0].tolist()
    return found


def test_it_ranks_the_chosen_answer_above_the_rejected(make_run: RunMaker):
    import transformers

    trained = train(make_run("reward", data={"preferences": PAIRS}, training=FAST))
    assert trained.losses[-1] < 0.2 < trained.losses[0]
    assert logged(trained, "accuracy")[-1] == 1
    assert trained.folder == trained.run.job.out_dir / "final_model"

    model = transformers.AutoModelForSequenceClassification.from_pretrained(trained.folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained.folder)
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id
    chosen, rejected = (
        scores(model, tokenizer, [pair["prompt"] + pair[kind] + tokenizer.eos_token for pair in PAIRS])
        for kind in ("chosen", "rejected")
    )
    assert all(better > worse + 0.5 for better, worse in zip(chosen, rejected, strict=True))


def test_the_score_of_a_text_does_not_depend_on_its_batch(make_run: RunMaker):
    """Which it would if the model did not know the padding."""
    import transformers

    trained = train(make_run("reward", data={"preferences": PAIRS}, training=FAST | {"max_steps": 3}))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(trained.folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained.folder)
    (alone,) = scores(model, tokenizer, ["kind"])
    beside = scores(model, tokenizer, ["kind", "a much longer text that is not kind at all"])
    assert beside[0] == pytest.approx(alone, abs=1e-4)


def test_conversations_without_a_prompt_of_their_own(make_run: RunMaker):
    def talk(pair: dict[str, str], answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[answer]}]

    preferences = [{kind: talk(pair, kind) for kind in ("chosen", "rejected")} for pair in PAIRS]
    trained = train(make_run("reward", data={"preferences": preferences}, training=FAST))
    assert logged(trained, "accuracy")[-1] == 1


def test_with_lora_the_adapter_holds_the_score_head(make_run: RunMaker, tiny_chat_dir: Path):
    import transformers
    from peft import PeftModel

    run = make_run(
        "reward",
        data={"preferences": PAIRS},
        training=FAST | {"learning_rate": 1e-2, "gradient_checkpointing": True},
        lora={"r": 4},
    )
    trained = train(run)
    assert trained.losses[-1] < 0.4
    assert trained.folder == run.job.out_dir / "final_lora"

    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_chat_dir, num_labels=1)
    base.config.pad_token_id = trained.built.tokenizer.pad_token_id
    model = PeftModel.from_pretrained(base, trained.folder).eval()
    good, bad = scores(model, trained.built.tokenizer, ["Snow is white and kind<end>", "Snow is awful<end>"])
    assert good > bad


def test_a_resumed_run_ends_where_the_whole_one_does(make_run: RunMaker):
    whole = train(make_run("reward", data={"preferences": PAIRS}, training=FAST))
    point = ResumePoint(path=whole.run.job.checkpoints_dir / "checkpoint-10", step=10)
    resumed = train(make_run("reward", data={"preferences": PAIRS}, training=FAST, resume=point))
    assert resumed.steps == whole.steps == 20
    assert resumed.losses[-1] == pytest.approx(whole.losses[-1], rel=1e-2, abs=1e-4)


def test_pairs_that_are_too_long_are_left_out(make_run: RunMaker):
    long = {"prompt": "word ", "chosen": "a " * 100, "rejected": "b"}
    run = make_run("reward", data={"preferences": [*PAIRS, long]}, training=FAST)
    assert len(build(run).trainer.train_dataset) == len(PAIRS)
    assert any("1 of 5 pairs are left out" in text for text in run.tell.warnings)

    with pytest.raises(BadDataError, match="none of the 1 pairs fits"):
        build(make_run("reward", data={"preferences": [long]}, training=FAST))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_heads_over_frozen_16_bit_weights_are_trained_in_32_bits(make_run: RunMaker, precision: str, dtype: str):
    """As on a GPU: a small learning rate would be lost in 16 bits, and fp16 gradients cannot be unscaled."""
    import peft
    import torch

    run = make_run("reward", data={"preferences": PAIRS}, training={precision: True}, lora={})
    run.job = run.job.model_copy(update={"use_cpu": False})
    tokenizer = load_tokenizer(run)
    loaded = load_classifier(run, tokenizer)
    config = lora_config(run, loaded)
    for model in (peft.get_peft_model(loaded, config), _value_model(run, tokenizer, config)):
        weights = dict(model.named_parameters())
        trained = {name: weight.dtype for name, weight in weights.items() if weight.requires_grad}
        assert any("score" in name for name in trained)
        assert any("lora_" in name for name in trained)
        assert set(trained.values()) == {torch.float32}
        assert getattr(torch, dtype) in {weight.dtype for weight in weights.values()}
        assert model(**tokenizer(["a text"], return_tensors="pt")).logits.dtype == torch.float32

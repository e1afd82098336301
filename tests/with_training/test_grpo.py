"""GRPO on a tiny model: the mean reward of what it writes rises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from training_models import Trained, build, make_tiny_llama, train

from executors.errors import BadDataError, BadSpecError
from executors.training.training_job import ResumePoint
from executors.training.training_run import TrainingRun

RunMaker = Callable[..., TrainingRun]

PROMPTS = ["Write a word: ", "Say something: ", "A text: ", "Tell me: "]
VOWELS = {"name": "character_share", "characters": "aeiou"}

FAST = {
    "learning_rate": 3e-3,
    "max_steps": 20,
    "batch_size": 16,
    "num_generations": 8,
    "logging_steps": 1,
    "save_steps": 10,
}


def grpo(make_run: RunMaker, *, training: dict[str, object] | None = None, **sections: object) -> TrainingRun:
    return make_run(
        "grpo",
        **{
            "data": {"prompts": PROMPTS},
            "generation": {"max_new_tokens": 12, "temperature": 1.0},
            "reward_functions": [VOWELS],
            "training": FAST | (training or {}),
            **sections,
        },
    )


def rewards(trained: Trained) -> list[float]:
    return [log["reward"] for log in trained.built.trainer.state.log_history if "reward" in log]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_the_mean_reward_rises(make_run: RunMaker):
    import transformers

    trained = train(grpo(make_run, training={"learning_rate": 1e-2, "max_steps": 40, "batch_size": 32}))
    found = rewards(trained)
    assert len(found) == 40
    assert mean(found[-5:]) > mean(found[:5]) + 0.3
    log = trained.built.trainer.state.log_history[0]
    assert log["rewards/character_share/mean"] == pytest.approx(log["reward"])

    assert trained.folder == trained.run.job.out_dir / "final_model"
    transformers.AutoModelForCausalLM.from_pretrained(trained.folder)


def test_lora_on_conversations_with_a_reference(make_run: RunMaker):
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    trained = train(
        grpo(
            make_run,
            data={"prompts": conversations},
            lora={"r": 8},
            training={"beta": 0.01, "learning_rate": 2e-2, "max_steps": 15, "gradient_checkpointing": True},
        )
    )
    found = rewards(trained)
    assert mean(found[-4:]) > mean(found[:4]) + 0.05
    assert "kl" in trained.built.trainer.state.log_history[0]
    assert trained.folder == trained.run.job.out_dir / "final_lora"


def test_with_beta_the_reference_is_the_base(make_run: RunMaker, tiny_chat_dir: Path):
    import torch
    import transformers

    trained = train(grpo(make_run, training={"beta": 0.1, "max_steps": 2}))
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_chat_dir).state_dict()
    reference = trained.built.trainer.ref_model
    assert all(torch.equal(base[name], tensor) for name, tensor in reference.state_dict().items())
    assert reference.dtype == trained.built.trainer.model.dtype


def test_the_reference_is_what_the_checkpoint_brings(make_run: RunMaker, tmp_path: Path):
    """Also where it is a lone file, which borrows the configuration of another model."""
    import torch
    import transformers

    other = make_tiny_llama(tmp_path / "other", seed=9)
    lone = tmp_path / "lone" / "model.safetensors"
    lone.parent.mkdir()
    lone.write_bytes((other / "model.safetensors").read_bytes())
    built = build(
        grpo(
            make_run,
            checkpoint={"load": {"path": str(lone)}},
            inputs={"checkpoint.load": lone},
            training={"beta": 0.1},
        )
    )
    expected = transformers.AutoModelForCausalLM.from_pretrained(other).state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in built.trainer.ref_model.state_dict().items())


def test_columns_reach_the_functions_and_weights_count(make_run: RunMaker, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    lines = [f'{{"query": "{prompt}", "answer": "a", "images": "none", "completions": 1}}\n' for prompt in PROMPTS]
    rows.write_text("".join(lines))
    functions = [VOWELS, {"name": "exact_match", "weight": 3}, {"name": "length", "target": 5, "weight": 0.5}]
    trained = train(
        grpo(
            make_run,
            data={"jsonl_path": str(rows)},
            inputs={"data.jsonl": rows},
            reward_functions=functions,
            training={"max_steps": 2},
        )
    )
    log = trained.built.trainer.state.log_history[0]
    parts = [log[f"rewards/{name}/mean"] for name in ("character_share", "exact_match", "length")]
    assert log["reward"] == pytest.approx(parts[0] + 3 * parts[1] + 0.5 * parts[2], abs=1e-5)


def test_a_reward_model_of_ours_judges(make_run: RunMaker):
    pairs = [{"prompt": "A ", "chosen": "a e i o u a", "rejected": "x t z"}] * 4
    reward = train(
        make_run(
            "reward",
            data={"preferences": pairs},
            training={"max_steps": 5, "learning_rate": 1e-3, "gradient_checkpointing": False},
        )
    )
    trained = train(
        grpo(
            make_run,
            reward_functions=[],
            reward_model={"identifier": str(reward.folder), "scale": 0.5},
            training={"max_steps": 2},
        )
    )
    log = trained.built.trainer.state.log_history[0]
    assert log["reward"] == pytest.approx(log["rewards/reward_model/mean"])


def test_one_seed_gives_one_result(make_run: RunMaker):
    first, second = (train(grpo(make_run, training={"max_steps": 3})) for _ in range(2))
    assert rewards(first) == rewards(second)


def test_a_resumed_run_ends_at_the_same_step(make_run: RunMaker):
    whole = train(grpo(make_run, training={"max_steps": 6, "save_steps": 3}))
    point = ResumePoint(path=whole.run.job.checkpoints_dir / "checkpoint-3", step=3)
    resumed = train(grpo(make_run, training={"max_steps": 6, "save_steps": 3}, resume=point))
    assert resumed.steps == whole.steps == 6
    assert len(rewards(resumed)) == 6


def test_too_few_prompts_for_one_step(make_run: RunMaker):
    with pytest.raises(BadDataError, match=r"data has 1 prompts.*one step takes 2: 16 completions, 8 of each prompt"):
        build(grpo(make_run, data={"prompts": ["one"]}))


def test_prompts_that_are_too_long_are_left_out(make_run: RunMaker):
    run = grpo(make_run, data={"prompts": [*PROMPTS, "word " * 100]}, training={"max_seq_length": 64})
    assert len(build(run).trainer.train_dataset) == len(PROMPTS)
    assert any("1 of 5 prompts are left out" in text for text in run.tell.warnings)


def test_answers_that_leave_no_room_for_a_prompt(make_run: RunMaker):
    with pytest.raises(
        BadSpecError, match=r"generation\.max_new_tokens is 256, but the model's context has 256 tokens"
    ):
        build(grpo(make_run, generation={"max_new_tokens": 256}))


def test_a_stop_text_has_no_effect(make_run: RunMaker):
    run = grpo(make_run, generation={"max_new_tokens": 8, "stop": "x"})
    build(run)
    assert any("generation.stop has no effect" in text for text in run.tell.warnings)


def test_conversations_need_a_chat_template(make_run: RunMaker, tiny_base_dir: Path):
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    with pytest.raises(BadSpecError, match="no chat template"):
        build(grpo(make_run, model=tiny_base_dir, data={"prompts": prompts}))


def test_a_missing_column_is_found_before_the_weights_load(make_run: RunMaker):
    with pytest.raises(BadDataError, match="reads the column gold, which the data lacks"):
        build(grpo(make_run, model="no/such-model", reward_functions=[{"name": "exact_match", "column": "gold"}]))

"""PPO on a tiny model: the mean reward rises, and a run that was stopped goes on as if it had not been."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from training_models import CONTEXT, Trained, build, make_tiny_llama, train

from executors.errors import BadDataError, BadSpecError
from executors.training.trainers.ppo_batches import PromptRows, SeededBatches
from executors.training.training_job import ResumePoint
from executors.training.training_run import TrainingRun

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState

RunMaker = Callable[..., TrainingRun]

PROMPTS = [f"{word} {number}" for word in ("one", "two", "three", "four") for number in range(4)]
LETTERS = {"name": "character_share", "characters": string.ascii_letters}


def ppo(make_run: RunMaker, *, training: dict[str, object] | None = None, **sections: object) -> TrainingRun:
    return make_run(
        "ppo",
        **{
            "data": {"prompts": PROMPTS},
            "generation": {"max_new_tokens": 8, "temperature": 1.0},
            "reward_functions": [LETTERS],
            "training": {"learning_rate": 1e-3, "max_steps": 4, "batch_size": 8, "save_steps": 2} | (training or {}),
            **sections,
        },
    )


def rewards(trained: Trained) -> list[float]:
    return [log["objective/scores"] for log in trained.built.trainer.state.log_history]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def weights_of(trained: Trained) -> dict[str, Any]:
    return dict(trained.built.trainer.policy_model.state_dict())


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(bool((first[name] == second[name]).all()) for name in first)


def checkpoint_of(trained: Trained, step: int) -> ResumePoint:
    return ResumePoint(path=trained.run.job.checkpoints_dir / f"checkpoint-{step}", step=step)


def test_the_mean_reward_rises(make_run: RunMaker):
    import transformers

    fast = {
        "learning_rate": 3e-3,
        "max_steps": 12,
        "batch_size": 64,
        "num_mini_batches": 4,
        "kl_coef": 0.001,
        "trl": {"lr_scheduler_type": "constant"},
    }
    many = [f"{prompt} {number}" for prompt in PROMPTS for number in range(4)]
    trained = train(ppo(make_run, data={"prompts": many}, training=fast))
    found = rewards(trained)
    assert len(found) == 12
    assert found[0] < 0.3
    assert mean(found[-3:]) > 0.7

    assert trained.folder == trained.run.job.out_dir / "checkpoints" / "final_model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained.folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(trained.folder)
    assert same(dict(model.state_dict()), weights_of(trained))
    assert tokenizer.chat_template
    assert model.generation_config.suppress_tokens is None, "what only the training needs was saved"


def test_a_resumed_run_equals_one_that_was_not_stopped(make_run: RunMaker):
    whole = train(ppo(make_run))
    again = train(ppo(make_run))
    assert rewards(again) == rewards(whole), "two runs with one seed differ"
    assert same(weights_of(again), weights_of(whole))

    resumed = train(ppo(make_run, resume=checkpoint_of(whole, 2)))
    state = resumed.built.trainer.state
    assert resumed.steps == whole.steps == 4
    assert state.max_steps == 4
    assert [log["episode"] for log in state.log_history] == [8, 16, 24, 32]
    tokens = [log["num_tokens"] for log in whole.built.trainer.state.log_history]
    assert tokens == sorted(tokens)
    assert 32 * 4 < tokens[-1] < 32 * (CONTEXT + 8)
    assert [log["num_tokens"] for log in state.log_history] == tokens
    assert rewards(resumed) == rewards(whole)
    assert same(weights_of(resumed), weights_of(whole))
    assert resumed.run.tell.steps[0] == (2, 4)
    assert rewards(train(ppo(make_run, training={"seed": 7}))) != rewards(whole)


def test_it_stops_when_a_callback_asks_for_it(make_run: RunMaker):
    import transformers

    class Stopper(transformers.TrainerCallback):
        def on_step_end(
            self, args: object, state: TrainerState, control: TrainerControl, **_: object
        ) -> TrainerControl:
            del args
            control.should_training_stop = state.global_step == 2
            return control

    stopped = train(ppo(make_run), Stopper())
    assert stopped.steps == 2
    assert stopped.folder is not None


def test_old_checkpoints_go(make_run: RunMaker):
    trained = train(ppo(make_run, training={"save_steps": 1, "save_total_limit": 2}))
    folders = sorted(folder.name for folder in trained.run.job.checkpoints_dir.glob("checkpoint-*"))
    assert folders == ["checkpoint-3", "checkpoint-4"]


def test_a_checkpoint_at_each_epochs_end(make_run: RunMaker):
    training = {"save_strategy": "epoch", "max_steps": None, "num_train_epochs": 2, "ppo_epochs": 2}
    trained = train(ppo(make_run, training=training))
    folders = sorted(folder.name for folder in trained.run.job.checkpoints_dir.glob("checkpoint-*"))
    assert folders == ["checkpoint-2", "checkpoint-4"]


def test_lora_leaves_the_model_as_it_is_and_resumes(make_run: RunMaker, tiny_chat_dir: Path):
    import peft
    import transformers
    from safetensors.torch import load_file

    sections: dict[str, Any] = {"lora": {"r": 4, "dropout": 0}, "training": {"gradient_checkpointing": True}}
    whole = train(ppo(make_run, **sections))
    before = load_file(tiny_chat_dir / "model.safetensors")
    now = whole.built.trainer.policy_model.state_dict()
    plain = {name.removeprefix("base_model.model.").replace(".base_layer.", "."): now[name] for name in now}
    assert all(bool((plain[name] == before[name]).all()) for name in before)
    value_model = whole.built.trainer.value_model
    trained = [name for name, weight in value_model.named_parameters() if weight.requires_grad]
    assert trained
    assert all("lora_" in name or name == "score.weight" for name in trained)

    assert whole.folder == whole.run.job.out_dir / "checkpoints" / "final_lora"
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_chat_dir)
    assert peft.PeftModel.from_pretrained(base, whole.folder).peft_config["default"].r == 4

    resumed = train(ppo(make_run, **sections, resume=checkpoint_of(whole, 2)))
    assert same(weights_of(resumed), weights_of(whole))


def test_an_adapter_is_trained_further(make_run: RunMaker):
    first = train(ppo(make_run, lora={"r": 4}))
    assert first.folder is not None
    load = {"load": {"path": str(first.folder)}}
    second = train(ppo(make_run, checkpoint=load, inputs={"checkpoint.load": first.folder}, lora={}))
    before, after = weights_of(first), weights_of(second)
    assert before.keys() == after.keys()
    changed = {name for name in before if not bool((before[name] == after[name]).all())}
    assert changed
    assert all("lora_" in name for name in changed)


def test_one_row_in_a_batch_gives_numbers(make_run: RunMaker):
    trained = train(ppo(make_run, training={"batch_size": 1, "max_steps": 6}, generation={"max_new_tokens": 2}))
    assert trained.steps == 6
    with pytest.raises(BadSpecError, match="max_new_tokens is 1 with one row"):
        build(ppo(make_run, training={"batch_size": 1}, generation={"max_new_tokens": 1}))


def test_conversations_and_a_stop_token(make_run: RunMaker):
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    run = ppo(
        make_run,
        data={"prompts": conversations},
        generation={"max_new_tokens": 8, "stop": "e"},
        training={"max_steps": None, "steps": 2, "gradient_accumulation_steps": 2, "num_mini_batches": 2},
    )
    trained = train(run)
    assert trained.steps == 1, "steps times the batch of one device are 16 episodes, which one update takes"
    trainer = trained.built.trainer
    assert trainer.stop_token_id == trained.built.tokenizer.convert_tokens_to_ids("e")
    assert trainer.accelerator.gradient_accumulation_steps == 1


def test_a_column_reaches_the_reward_function(make_run: RunMaker, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"query": "{prompt}", "answer": "a"}}\n' for prompt in PROMPTS))
    section = {"jsonl": {"path": str(file), "query_field": "query"}}
    inputs = {"data.jsonl": file}
    match = {"name": "exact_match", "column": "answer", "weight": 2.0}
    trained = train(ppo(make_run, data=section, inputs=inputs, reward_functions=[match], training={"max_steps": 1}))
    assert trained.built.trainer.dataloader.current.columns == {"answer": ["a"] * 8}
    wrong = [{**match, "column": "solution"}]
    with pytest.raises(BadDataError, match="solution"):
        build(ppo(make_run, data=section, inputs=inputs, reward_functions=wrong))


def test_bad_input_is_refused_before_weights_load(make_run: RunMaker, tmp_path: Path):
    broken = make_tiny_llama(tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    with pytest.raises(BadSpecError, match=r"stop is 'zzz'.*3 tokens.*expected one token"):
        build(ppo(make_run, model=broken, generation={"stop": "zzz"}))
    with pytest.raises(BadSpecError, match="max_new_tokens is 256, and the model's context is 256"):
        build(ppo(make_run, model=broken, generation={"max_new_tokens": 256}))
    with pytest.raises(BadSpecError, match=r"reward_functions\[0\].*'nice'"):
        build(ppo(make_run, model=broken, reward_functions=["nice"]))
    with pytest.raises(BadSpecError, match="whiten_rewards"):
        build(ppo(make_run, model=broken, training={"batch_size": 4, "trl": {"whiten_rewards": True}}))


def test_small_data_sets_clip_the_batch(make_run: RunMaker):
    trained = train(ppo(make_run, data={"prompts": PROMPTS[:3]}, training={"num_mini_batches": 4, "max_steps": 2}))
    assert trained.built.trainer.args.batch_size == 3
    assert any("lowered to 3" in warning for warning in trained.warnings)
    assert any("num_mini_batches is 1, not 4" in warning for warning in trained.warnings)


def test_long_prompts_lose_their_beginning(make_run: RunMaker):
    run = ppo(make_run, data={"prompts": ["x" * 40 + "end"] * 8}, training={"max_seq_length": 5, "max_steps": 1})
    built = build(run)
    (batch,) = (next(iter(built.trainer.dataloader)),)
    assert built.tokenizer.decode(batch["input_ids"][0]) == "xxend"
    assert any("8 of 8 prompts are longer than 5 tokens" in warning for warning in run.tell.warnings)


def test_a_foreign_checkpoint_is_refused(make_run: RunMaker, tmp_path: Path):
    empty = tmp_path / "checkpoint-2"
    empty.mkdir()
    with pytest.raises(BadSpecError, match=r"lacks value_model\.safetensors"):
        build(ppo(make_run)).trainer.train(resume_from_checkpoint=str(empty))
    whole = train(ppo(make_run, training={"max_steps": 2}))
    with pytest.raises(BadSpecError, match=r"does not fit this task: .* not an adapter"):
        build(ppo(make_run, lora={"r": 4})).trainer.train(resume_from_checkpoint=str(checkpoint_of(whole, 2).path))


def batches(rows: int, size: int, *, part: tuple[int, int] = (0, 1), seed: int = 1) -> SeededBatches:
    tokens = [[number] * (number + 1) for number in range(rows)]
    return SeededBatches(PromptRows(["p"] * rows, tokens), size=size, seed=seed, pad_id=99, part=part)


def test_batches_take_each_row_once_in_an_epoch_and_can_start_anywhere():
    supply = batches(5, 2)
    order = [place for number in range(5) for place in supply.places(number)]
    assert sorted(order[:5]) == sorted(order[5:]) == [0, 1, 2, 3, 4]
    assert order[:5] != order[5:]
    assert [place for number in range(5) for place in batches(5, 2, seed=2).places(number)] != order

    supply.first = 3
    batch = next(iter(supply))["input_ids"]
    assert batch.shape == (2, supply.width)
    assert [row[-1] for row in batch.tolist()] == order[6:8]
    assert [row.count(99) for row in batch.tolist()] == [supply.width - place - 1 for place in order[6:8]]


def test_ranks_share_a_batch():
    together = [batches(8, 4).places(number) for number in range(2)]
    halves = [batches(8, 2, part=(rank, 2)) for rank in range(2)]
    assert [halves[0].places(number) + halves[1].places(number) for number in range(2)] == together

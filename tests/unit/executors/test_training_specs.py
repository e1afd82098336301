from pathlib import Path

import pytest
from pydantic import ValidationError

from executors.contract import EnginePolicy
from executors.model_spec import CHECKPOINT
from executors.task_spec import unknown_keys
from executors.training.spec.trainer_specs import (
    SPEC_TYPES,
    DpoSpec,
    GrpoSpec,
    LoraSftSpec,
    PpoSpec,
    RewardSpec,
    SftSpec,
    TrainingSpec,
    spec_warnings,
)
from executors.training.spec.training_data_spec import JSONL

MODEL = {"source": {"identifier": "acme/tiny-lm"}}
NOTHING_ALLOWED = EnginePolicy()


def spec_of(kind: str, **sections: object) -> TrainingSpec:
    rewards = {"reward_functions": ["length"]} if kind in {"ppo", "grpo"} else {}
    given = {"taskType": kind, "model": MODEL, "data": {"dataset_name": "acme/rows"}, **rewards, **sections}
    return SPEC_TYPES[kind].model_validate(given)


def problem_with(kind: str, **sections: object) -> tuple[tuple[int | str, ...], str]:
    """Place and text of the one thing that is wrong."""
    with pytest.raises(ValidationError) as caught:
        spec_of(kind, **sections)
    [error] = caught.value.errors()
    return error["loc"], error["msg"]


def warnings_of(kind: str, **sections: object) -> list[str]:
    return spec_warnings(spec_of(kind, **sections), NOTHING_ALLOWED)


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("sft", (5e-5, 2, 100, True, 1024)),
        ("lora_sft", (2e-4, 2, 100, False, 1024)),
        ("dpo", (5e-7, 4, 500, True, 1024)),
        ("ppo", (1.41e-5, 1, 100, False, 512)),
        ("grpo", (1e-6, 8, 100, False, 1024)),
        ("reward", (1e-5, 4, 100, True, 1024)),
    ],
)
def test_defaults_of_each_kind(kind: str, own: tuple[float, int, int, bool, int]):
    spec = spec_of(kind)
    options = spec.training
    assert own == (
        options.learning_rate,
        options.batch_size,
        options.save_steps,
        options.gradient_checkpointing,
        options.max_seq_length,
    )
    assert (options.num_train_epochs, options.max_steps, options.gradient_accumulation_steps) == (1.0, None, 1)
    assert (options.warmup_steps, options.logging_steps, options.save_strategy) == (0, 10, "steps")
    assert [options.fp16, options.bf16, options.packing, options.oom_retry] == [False] * 4
    assert (options.save_model, options.save_total_limit, options.seed) == (True, 2, 42)
    assert (options.resume, options.resume_from_path, options.report_to, options.trl) == ("auto", None, (), {})
    assert (options.auto_deepspeed, options.deepspeed_stage, options.primary_gpu) == (True, 2, 0)
    assert (options.allow_multi_gpu, options.nproc_per_node, options.visible_devices) == (None, None, ())
    assert spec.kind == kind
    assert unknown_keys(spec) == []
    assert spec_warnings(spec, NOTHING_ALLOWED) == []


def test_defaults_of_data_and_lora():
    text = spec_of("sft").data
    assert (text.split, text.seed, text.shuffle, text.max_samples) == ("train", 42, False, None)
    spec = spec_of("lora_sft")
    assert isinstance(spec, LoraSftSpec)
    assert (spec.data.text_field, spec.data.separator, spec.data.messages_column) == ("text", "\n\n", "messages")
    assert (spec.lora.r, spec.lora.alpha, spec.lora.dropout, spec.lora.bias) == (16, 32, 0.05, "none")
    assert spec.lora.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (spec.lora.task_type, spec.lora.use_rslora, spec.lora.load_in_4bit) == ("CAUSAL_LM", False, False)
    preferences = spec_of("dpo").data
    assert preferences.model_dump(include={"prompt_column", "chosen_column", "rejected_column"}) == {
        "prompt_column": "prompt",
        "chosen_column": "chosen",
        "rejected_column": "rejected",
    }


def test_defaults_of_ppo():
    spec = spec_of("ppo", reward_model={"identifier": "acme/judge"})
    assert isinstance(spec, PpoSpec)
    options = spec.training
    assert (options.ppo_epochs, options.kl_coef, options.num_mini_batches, options.steps) == (4, 0.05, 1, None)
    assert (spec.response_length, spec.temperature, spec.generation.stop) == (64, 0.7, None)
    assert spec.reward_model is not None
    assert (spec.reward_model.type, spec.reward_model.scale, spec.reward_model.max_length) == ("classification", 1, 512)


@pytest.mark.parametrize("kind", ["sft", "lora_sft", "dpo", "ppo", "grpo", "reward"])
def test_one_word_more_for_the_batch_and_the_checkpoints(kind: str):
    spec = spec_of(kind, training={"per_device_train_batch_size": 16, "batch_size": 3, "save_freq": 7})
    assert (spec.training.batch_size, spec.training.save_steps) == (16, 7)
    assert unknown_keys(spec) == []


@pytest.mark.parametrize(
    ("given", "trackers"),
    [("none", ()), ([], ()), (None, ()), ("TensorBoard", ("tensorboard",)), (["trackio", "none"], ("trackio",))],
)
def test_trackers(given: object, trackers: tuple[str, ...]):
    assert spec_of("sft", training={"report_to": given}).training.report_to == trackers


def test_an_unknown_tracker():
    loc, text = problem_with("sft", training={"report_to": "wandb"})
    assert loc == ("training", "report_to", 0)
    assert "'tensorboard' or 'trackio'" in text


def test_the_temperature_of_the_generation_section_comes_first():
    spec = spec_of("ppo", training={"temperature": 0.3})
    assert isinstance(spec, PpoSpec)
    assert spec.temperature == 0.3
    both = spec_of("grpo", training={"temperature": 0.3}, generation={"temperature": 1.5, "max_new_tokens": 9})
    assert isinstance(both, GrpoSpec)
    assert (both.temperature, both.response_length) == (1.5, 9)


def test_steps_of_ppo_count_batches_of_episodes():
    spec = spec_of("ppo", training={"steps": 10, "batch_size": 4})
    assert isinstance(spec, PpoSpec)
    assert spec.training.total_episodes(spec.training.batch_size) == 40
    plain = spec_of("ppo")
    assert isinstance(plain, PpoSpec)
    assert plain.training.total_episodes(4) is None


@pytest.mark.parametrize(
    ("data", "source", "rows"),
    [
        ({"jsonl": {"path": "a.jsonl"}, "dataset_name": "acme/rows", "prompts": ["a"]}, "jsonl", "jsonl"),
        ({"jsonl_path": "a.jsonl", "dataset_name": "acme/rows"}, "jsonl_path", "jsonl"),
        ({"dataset_name": "acme/rows", "prompts": ["a"]}, "dataset_name", "dataset"),
        ({"prompts": ["a"]}, "prompts", "inline"),
        ({"messages": [[{"role": "user", "content": "a"}]], "prompts": ["a"]}, "messages", "inline"),
    ],
)
def test_one_source_of_rows_counts(data: dict[str, object], source: str, rows: str):
    spec = spec_of("sft", data=data)
    assert spec.data.sources[0] == source
    assert spec.data.rows == rows
    [warning] = warnings_of("sft", data=data) or [""]
    assert (f"the rows come from spec.data.{source}" in warning) == (len(spec.data.sources) > 1)


@pytest.mark.parametrize(
    ("kind", "inline"),
    [
        ("sft", "messages, prompts"),
        ("lora_sft", "messages, prompts"),
        ("dpo", "preferences"),
        ("reward", "preferences"),
        ("ppo", "prompts"),
        ("grpo", "prompts"),
    ],
)
@pytest.mark.parametrize(
    "data", [None, {}, {"prompts": [], "dataset_name": " ", "preferences": [], "url": "acme/rows"}]
)
def test_no_rows_are_never_made_up(kind: str, inline: str, data: dict[str, object] | None):
    loc, text = problem_with(kind, data=data)
    assert loc == ("data",)
    assert text == f"names no rows to train on; expected one of jsonl, jsonl_path, dataset_name, {inline}"


def test_inputs_are_the_checkpoint_and_the_jsonl_file():
    both = spec_of(
        "ppo",
        checkpoint={"load": {"taskId": "t-1"}},
        data={"jsonl": {"download_url": "https://host/a.jsonl", "headers": {"X": "1"}, "query_field": "q"}},
    )
    checkpoint, file = both.inputs()
    assert (checkpoint.name, checkpoint.kind, checkpoint.task_id) == (CHECKPOINT, "checkpoint", "t-1")
    assert (file.name, file.kind, file.url, file.headers) == (JSONL, "file", "https://host/a.jsonl", {"X": "1"})
    [path] = spec_of("sft", data={"jsonl_path": "rows/a.jsonl"}).inputs()
    assert (path.name, path.paths) == (JSONL, ("rows/a.jsonl",))
    assert spec_of("sft").inputs() == ()


def test_keys_of_jsonl_lines_may_stand_in_the_section_or_in_data():
    spec = spec_of(
        "sft",
        data={
            "jsonl": {"path": "a", "prompt_field": "q"},
            "prompt_field": "x",
            "response_field": "a",
            "separator": "|",
        },
    )
    assert isinstance(spec, SftSpec)
    assert spec.data.jsonl_columns == (None, "q", "a", None, "|")
    named = spec_of("sft", data={"jsonl": "a.jsonl", "text_field": "body"})
    assert isinstance(named, SftSpec)
    assert named.data.jsonl_columns == ("body", None, None, None, "\n\n")
    columns = spec_of("sft", data={"jsonl": "a.jsonl", "prompt_column": "q", "response_column": "a"})
    assert isinstance(columns, SftSpec)
    assert columns.data.jsonl_columns == (None, "q", "a", None, "\n\n")
    pairs = spec_of("dpo", data={"jsonl": {"path": "a", "chosen_field": "good"}, "rejected_field": "bad"})
    assert isinstance(pairs, DpoSpec)
    assert pairs.data.jsonl_columns == ("prompt", "good", "bad")
    queries = spec_of("ppo", data={"jsonl": "a", "prompt_column": "unused", "response_field": "r"})
    assert isinstance(queries, PpoSpec)
    assert queries.data.jsonl_columns == ("query", "r")


def test_a_list_of_messages_is_one_conversation():
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    one, two = spec_of("sft", data={"messages": talk}), spec_of("sft", data={"messages": [talk, talk]})
    assert isinstance(one, SftSpec)
    assert isinstance(two, SftSpec)
    assert [message.content for message in one.data.messages[0]] == ["a", "b"]
    assert len(two.data.messages) == 2


def test_a_preference_needs_both_answers():
    loc, text = problem_with("dpo", data={"preferences": [{"prompt": "a", "chosen": "b"}]})
    assert loc == ("data", "preferences", 0, "rejected")
    assert text == "Field required"


def test_only_reward_models_need_no_prompt():
    pairs = {"preferences": [{"chosen": "b", "rejected": "c"}]}
    spec = spec_of("reward", data=pairs)
    assert isinstance(spec, RewardSpec)
    assert spec.data.preferences[0].prompt is None
    assert "data.preferences[0] has no 'prompt'" in problem_with("dpo", data=pairs)[1]


def test_leftovers_of_a_base_spec_are_no_errors():
    spec = spec_of(
        "lora_sft",
        model={**MODEL, "vllm": {"dtype": 3}, "transformers": 1, "config": {"fp16": "yes"}},
        inference={"temperature": "hot"},
        data={"type": "list", "items": ["a"], "url": "x", "column": "y", "prompts": ["a"]},
        generation={"max_new_tokens": -1},
        reward_model={},
    )
    assert unknown_keys(spec) == []
    assert spec_warnings(spec, NOTHING_ALLOWED) == []


def test_unknown_keys_are_named_with_the_nearest():
    spec = spec_of("sft", training={"learnin_rate": 1e-3}, data={"prompts": ["a"], "max_sample": 3})
    assert unknown_keys(spec) == [
        "unknown key 'spec.training.learnin_rate' is ignored; did you mean 'spec.training.learning_rate'?",
        "unknown key 'spec.data.max_sample' is ignored; did you mean 'spec.data.max_samples'?",
    ]


def test_options_of_a_reward_function_are_its_own():
    spec = spec_of("grpo", reward_functions=["length", {"name": "contains", "weight": 0.5, "words": ["a"]}])
    assert isinstance(spec, GrpoSpec)
    assert [(each.name, each.weight, each.options) for each in spec.reward_functions] == [
        ("length", 1.0, {}),
        ("contains", 0.5, {"words": ["a"]}),
    ]
    assert unknown_keys(spec) == []


@pytest.mark.parametrize(
    ("kind", "sections", "words"),
    [
        ("sft", {"training": {"fp16": True, "bf16": True}}, ("fp16", "bf16")),
        ("sft", {"training": {"deepspeed": {"a": 1}, "fsdp": "full_shard"}}, ("deepspeed", "fsdp")),
        ("sft", {"training": {"allow_multi_gpu": False, "nproc_per_node": 2}}, ("allow_multi_gpu", "nproc_per_node")),
        ("dpo", {"training": {"packing": True}}, ("packing", "dpo", "lora_sft")),
        ("ppo", {"training": {"batch_size": 3, "num_mini_batches": 2}}, ("num_mini_batches", "batch_size")),
        ("ppo", {"training": {"steps": 3, "max_steps": 2}}, ("steps (3)", "max_steps (2)")),
        ("ppo", {"reward_functions": []}, ("reward_model", "reward_functions")),
        ("sft", {"model": {"source": {"identifier": "a/b", "gguf_file": "q4.gguf"}}}, ("gguf_file", "safetensors")),
        ("grpo", {"training": {"num_generations": 1}}, ("greater than or equal to 2",)),
        ("ppo", {"training": {"kl_coef": 0}}, ("greater than 0",)),
        ("ppo", {"generation": {"temperature": 0}}, ("greater than 0",)),
        ("ppo", {"reward_model": {"type": "sentiment"}}, ("Field required",)),
        ("ppo", {"reward_model": {"identifier": "a/b", "max_length": 513}}, ("less than or equal to 512",)),
        ("dpo", {"training": {"beta": 0}}, ("greater than 0",)),
        ("sft", {"training": {"save_total_limit": 1}}, ("greater than or equal to 2",)),
        ("sft", {"training": {"num_train_epochs": 1e308}}, ("less than or equal to",)),
        ("sft", {"training": {"warmup_steps": 10**400}}, ("less than or equal to",)),
        ("dpo", {"training": {"batch_size": 10**30}}, ("less than or equal to",)),
        ("ppo", {"training": {"steps": 10**30}}, ("less than or equal to",)),
        ("sft", {"training": {"learning_rate": float("inf")}}, ("finite",)),
        ("sft", {"training": {"resume": "maybe"}}, ("'auto' or 'never'",)),
        ("lora_sft", {"lora": {"target_modules": []}}, ("at least 1",)),
    ],
)
def test_what_excludes_each_other_is_named(kind: str, sections: dict[str, object], words: tuple[str, ...]):
    _, text = problem_with(kind, **sections)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("kind", "sections", "words"),
    [
        ("sft", {"lora": {"r": 4}}, ("spec.lora has no effect in sft", "lora_sft")),
        ("lora_sft", {"lora": {"task_type": "SEQ_CLS"}}, ("spec.lora.task_type 'SEQ_CLS'", "CAUSAL_LM")),
        ("ppo", {"training": {"target_kl": 6}}, ("spec.training.target_kl has no effect",)),
        ("dpo", {"training": {"early_stopping": True}}, ("spec.training.early_stopping has no effect",)),
        ("dpo", {"training": {"log_with": "wandb"}}, ("spec.training.log_with", "report_to")),
        ("ppo", {"training": {"optimize_cuda_cache": True}}, ("optimize_cuda_cache", "torch_empty_cache_steps")),
        ("ppo", {"training": {"tracker_project_name": "p"}}, ("tracker_project_name",)),
        ("ppo", {"training": {"beta": 0.2}}, ("spec.training.beta has no effect in ppo", "kl_coef")),
        ("sft", {"training": {"beta": 0.2}}, ("spec.training.beta has no effect in sft",)),
        ("ppo", {"training": {"mini_batch_size": 1}}, ("mini_batch_size", "num_mini_batches")),
        ("ppo", {"training": {"save_safetensors": False}}, ("save_safetensors",)),
        ("ppo", {"generation": {"do_sample": False}}, ("spec.generation.do_sample",)),
        (
            "ppo",
            {"generation": {"temperature": 1}, "training": {"temperature": 0.5}},
            ("spec.training.temperature has no effect", "1.0"),
        ),
        ("sft", {"model": {**MODEL, "adapters": [{"path": "a"}]}}, ("spec.model.adapters", "checkpoint.load")),
        (
            "ppo",
            {"reward_model": {"identifier": "a/b", "negative_label": "bad"}},
            ("spec.reward_model.negative_label", "sentiment"),
        ),
        ("sft", {"data": {"dataset_name": "a/b", "trust_remote_code": True}}, ("trust_remote_code has no effect",)),
        (
            "ppo",
            {"reward_model": {"identifier": "a/b", "trust_remote_code": True}},
            ("trust_remote_code has no effect",),
        ),
    ],
)
def test_what_has_no_effect_is_said(kind: str, sections: dict[str, object], words: tuple[str, ...]):
    [warning] = warnings_of(kind, **sections)
    assert all(word in warning for word in words), warning


@pytest.mark.parametrize(
    ("kind", "training"),
    [("dpo", {"beta": 0.3}), ("grpo", {"beta": 0.1}), ("ppo", {"early_stopping": False, "optimize_cuda_cache": False})],
)
def test_what_has_its_effect_is_not_warned_of(kind: str, training: dict[str, object]):
    assert warnings_of(kind, training=training) == []


def test_remote_code_is_honoured_where_the_worker_allows_it():
    spec = spec_of("sft", model={"source": {"identifier": "a/b", "trust_remote_code": True}})
    allowed = EnginePolicy(allow_remote_code=True, allowed_roots=(Path("/"),))
    assert spec.trusts_remote_code
    assert spec_warnings(spec, allowed) == []


@pytest.mark.parametrize(
    ("kind", "lora", "uses"),
    [
        ("sft", {"r": 4}, False),
        ("lora_sft", None, True),
        ("dpo", None, False),
        ("dpo", {}, True),
        ("ppo", {"r": 4}, True),
        ("reward", {"r": 4}, True),
    ],
)
def test_who_trains_an_adapter(kind: str, lora: dict[str, object] | None, *, uses: bool):
    assert spec_of(kind, lora=lora).uses_lora == uses


@pytest.mark.parametrize(
    ("given", "devices"), [("0, 2", ("0", "2")), ([1, "GPU-a"], ("1", "GPU-a")), (3, ("3",)), ([], ())]
)
def test_visible_devices(given: object, devices: tuple[str, ...]):
    assert spec_of("sft", training={"visible_devices": given}).training.visible_devices == devices

import importlib
import importlib.util
import json
import os
import warnings
from pathlib import Path

import pytest
from training_models import RecordingRankReport, RunMaker

from executors.errors import BadSpecError, MissingLibraryError
from executors.training.trainers.sharding import sharding_arguments, zero_configuration
from executors.training.trainers.trl_arguments import trl_arguments
from executors.training.training_run import TrainingRun

TEXTS = {"prompts": ["a text"]}
PAIRS = {"preferences": [{"prompt": "a", "chosen": "b", "rejected": "c"}]}


def config_of(kind: str) -> type:
    """TRL's configuration class of a kind of training."""
    names = {"sft": "SFT", "lora_sft": "SFT", "dpo": "DPO", "reward": "Reward", "ppo": "PPO", "grpo": "GRPO"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL warns of everything below `experimental`
        module = importlib.import_module("trl.experimental.ppo" if kind == "ppo" else "trl")
    found = getattr(module, f"{names[kind]}Config")
    assert isinstance(found, type)
    return found


def with_gpus(run: TrainingRun, ranks: int = 1) -> TrainingRun:
    """The run as a rank on a GPU would get it; nothing here touches the GPU."""
    run.job = run.job.model_copy(update={"use_cpu": False, "ranks": ranks})
    return run


def sft_error(make_run: RunMaker, **training: object) -> str:
    with pytest.raises(BadSpecError) as caught:
        trl_arguments(make_run("sft", data=TEXTS, training=training), config_of("sft"), max_length=1024, packing=False)
    return caught.value.message


def installed(monkeypatch: pytest.MonkeyPatch, **there: bool) -> None:
    """Pretend that libraries are installed, or that they are not."""
    find = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> object:
        return (find("json") if there[name] else None) if name in there else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_options_reach_trl(make_run: RunMaker):
    run = make_run(
        "sft",
        data=TEXTS,
        training={
            "num_train_epochs": 2.5,
            "batch_size": 3,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "warmup_steps": 4,
            "logging_steps": 5,
            "save_steps": 6,
            "save_total_limit": 3,
            "bf16": True,
            "gradient_checkpointing": False,
            "seed": 7,
            "ddp_find_unused_parameters": False,
        },
    )
    arguments = trl_arguments(run, config_of("sft"), max_length=99)
    assert arguments.output_dir == str(run.job.out_dir / "checkpoints")
    assert (arguments.num_train_epochs, arguments.max_steps) == (2.5, -1)
    assert arguments.ddp_timeout == 24 * 3600  # a save may take longer than the half hour of the library
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (3, 2)
    assert (arguments.learning_rate, arguments.warmup_steps, arguments.logging_steps) == (1e-3, 4, 5)
    assert (arguments.save_strategy, arguments.save_steps, arguments.save_total_limit) == ("steps", 6, 3)
    assert (arguments.fp16, arguments.bf16, arguments.gradient_checkpointing) == (False, True, False)
    assert (arguments.seed, arguments.data_seed, arguments.ddp_find_unused_parameters) == (7, 7, False)
    assert (arguments.use_cpu, arguments.report_to, arguments.disable_tqdm) == (True, [], True)
    assert (arguments.logging_first_step, arguments.logging_nan_inf_filter) == (True, False)
    assert arguments.max_length == 99


@pytest.mark.parametrize("kind", ["sft", "lora_sft", "dpo", "reward", "ppo", "grpo"])
def test_each_kind_without_options(make_run: RunMaker, kind: str):
    data = PAIRS if kind in {"dpo", "reward"} else TEXTS
    rewards = {"reward_functions": ["length"]} if kind in {"ppo", "grpo"} else {}
    arguments = trl_arguments(make_run(kind, data=data, **rewards), config_of(kind))
    # TRL would take bf16 by itself
    assert (arguments.bf16, arguments.fp16, arguments.use_cpu) == (False, False, True)
    assert arguments.push_to_hub is False


def test_the_jobs_batch_counts_not_the_specs(make_run: RunMaker):
    run = make_run("sft", data=TEXTS, training={"batch_size": 8})
    run.job = run.job.model_copy(update={"batch_size": 4, "gradient_accumulation_steps": 2})
    arguments = trl_arguments(run, config_of("sft"))
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (4, 2)


def test_further_fields_of_trl(make_run: RunMaker):
    given = {
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"num_cycles": 1},
        "neftune_noise_alpha": 5,
        "completion_only_loss": True,
        "eos_token": "<|im_end|>",
        "optim": "adamw_torch",
        "max_grad_norm": 1,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "router_aux_loss_coef": None,
        "report_to": "none",
        "learning_rate": 5e-5,
        "warmup_steps": 0.0,
        "push_to_hub": False,
        "ddp_backend": "gloo",
        "run_name": "first try",
    }
    arguments = trl_arguments(
        make_run("sft", data=TEXTS, training={"trl": given}),
        config_of("sft"),
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    assert (arguments.weight_decay, arguments.lr_scheduler_type, arguments.max_grad_norm) == (0.1, "cosine", 1)
    assert (arguments.neftune_noise_alpha, arguments.completion_only_loss) == (5, True)
    assert (arguments.eos_token, arguments.optim, arguments.run_name) == ("<|im_end|>", "adamw_torch", "first try")
    assert arguments.gradient_checkpointing_kwargs == {"use_reentrant": True}
    assert arguments.router_aux_loss_coef == 0.001


def test_one_word_for_a_list_of_words(make_run: RunMaker):
    run = make_run("dpo", data=PAIRS, training={"trl": {"loss_type": "ipo"}})
    assert trl_arguments(run, config_of("dpo")).loss_type == ["ipo"]


def test_an_unknown_field_gets_the_nearest(make_run: RunMaker):
    text = sft_error(make_run, trl={"weigth_decay": 0.1})
    assert text.startswith(
        "spec.training.trl has the key 'weigth_decay', which TRL's SFTConfig does not know; near it "
    )
    assert "weight_decay" in text


@pytest.mark.parametrize(
    ("field", "value", "instead"),
    [
        ("learning_rate", 0.5, "spec.training.learning_rate makes it 5e-05; set spec.training.learning_rate instead"),
        ("max_length", 5, "spec.training.max_seq_length makes it 1024"),
        ("per_device_train_batch_size", 5, "spec.training.batch_size makes it 2"),
        ("packing", True, "spec.training.packing makes it False"),
        ("bf16", True, "spec.training.bf16 makes it False"),
        ("report_to", "wandb", "spec.training.report_to"),
        ("report_to", ["wandb"], "spec.training.report_to"),
        ("push_to_hub", True, "spec.output.destination"),
        ("hub_model_id", "a/b", "spec.output.destination"),
        ("trackio_space_id", "a/b", "spec.training.report_to"),
        ("resume_from_checkpoint", "/x", "spec.training.resume_from_path"),
        ("use_cpu", False, "spec.enforce_cpu"),
        ("model_init_kwargs", {"trust_remote_code": True}, "spec.model.source"),
        ("trust_remote_code", True, "spec.model.source.trust_remote_code"),
        ("deepspeed", "/etc/passwd", "spec.training.deepspeed"),
        ("fsdp_config", "/etc/passwd", "spec.training.fsdp"),
        ("auto_find_batch_size", True, "spec.training.oom_retry"),
        ("output_dir", "/x", "the worker decides"),
        ("disable_tqdm", False, "the worker decides"),
        ("eval_strategy", "steps", "the worker decides"),
        ("load_best_model_at_end", True, "the worker decides"),
        ("enable_jit_checkpoint", True, "the worker decides"),
        ("dataset_kwargs", {"skip_prepare_dataset": True}, "the worker decides"),
        ("chat_template_path", "/etc/passwd", "could make the trainer run code, open files or call hosts"),
        ("accelerator_config", "/etc/passwd", "could make the trainer"),
        ("accelerator_config", {"a": {"b": 1}}, "could make the trainer"),
        ("torch_compile_backend", "inductor", "could make the trainer"),
        ("lr_scheduler_type", "../x", "could make the trainer"),
        ("include_for_metrics", ["loss"], "could make the trainer"),
        ("dataset_num_proc", 65, "expected at most 64"),
    ],
)
def test_what_is_not_for_tasks_to_set(make_run: RunMaker, field: str, value: object, instead: str):
    text = sft_error(make_run, trl={field: value})
    assert text.startswith(f"spec.training.trl.{field} is ")
    assert instead in text


@pytest.mark.parametrize("key", ["max_new_tokens", "temperature", "do_sample"])
def test_what_generation_says_cannot_be_said_otherwise(make_run: RunMaker, key: str):
    rewarded = {"data": {"prompts": ["a"]}, "reward_functions": ["json_valid"]}
    run = make_run("grpo", training={"trl": {"generation_kwargs": {"top_k": 5}}}, **rewarded)
    assert trl_arguments(run, config_of("grpo")).generation_kwargs == {"top_k": 5}
    run = make_run("grpo", training={"trl": {"generation_kwargs": {key: 1}}}, **rewarded)
    with pytest.raises(BadSpecError, match=rf"generation_kwargs\.{key} is not for tasks.*spec\.generation"):
        trl_arguments(run, config_of("grpo"))


def test_secrets_are_not_shown(make_run: RunMaker):
    assert "hf_secret" not in sft_error(make_run, trl={"hub_token": "hf_secret"})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("weight_decay", True, "expected float"),
        ("full_determinism", 1, "expected bool"),
        ("dataloader_num_workers", 1.5, "expected int"),
        ("adam_beta1", [1], "could make"),
        ("completion_only_loss", 3, "expected bool | None"),
    ],
)
def test_values_of_a_wrong_type(make_run: RunMaker, field: str, value: object, expected: str):
    assert expected in sft_error(make_run, trl={field: value})


@pytest.mark.parametrize("trl_fields", [{"lr_scheduler_type": "spiral"}, {"dataloader_prefetch_factor": 3}])
def test_what_trl_itself_refuses(make_run: RunMaker, trl_fields: dict[str, object]):
    assert sft_error(make_run, trl=trl_fields).startswith("TRL's SFTConfig refuses the options in spec.training: ")


def test_two_precisions(make_run: RunMaker):
    run = with_gpus(make_run("sft", data=TEXTS, training={"fp16": True, "trl": {"bf16": True}}))
    with pytest.raises(BadSpecError, match=r"spec\.training\.fp16 and spec\.training\.trl\.bf16 are both true"):
        trl_arguments(run, config_of("sft"))


@pytest.mark.parametrize(("enforce_cpu", "why"), [(True, "spec.enforce_cpu is true"), (False, "the task has no GPU")])
def test_what_needs_a_gpu(make_run: RunMaker, *, enforce_cpu: bool, why: str):
    half = make_run("sft", data=TEXTS, enforce_cpu=enforce_cpu, training={"fp16": True})
    with pytest.raises(BadSpecError, match=rf"spec\.training\.fp16 is true, but {why}"):
        trl_arguments(half, config_of("sft"))
    quarter = make_run("lora_sft", data=TEXTS, enforce_cpu=enforce_cpu, lora={"load_in_4bit": True})
    with pytest.raises(BadSpecError, match=rf"spec\.lora\.load_in_4bit is true, but {why}"):
        trl_arguments(quarter, config_of("sft"))
    split = make_run("sft", data=TEXTS, enforce_cpu=enforce_cpu, training={"deepspeed": {"zero_optimization": {}}})
    with pytest.raises(BadSpecError, match=rf"spec\.training\.deepspeed is given, but {why}"):
        trl_arguments(split, config_of("sft"))


def test_libraries_that_are_missing(make_run: RunMaker, monkeypatch: pytest.MonkeyPatch):
    installed(monkeypatch, bitsandbytes=False, deepspeed=False)
    with pytest.raises(MissingLibraryError, match="'bitsandbytes' is not installed"):
        trl_arguments(with_gpus(make_run("lora_sft", data=TEXTS, lora={"load_in_4bit": True})), config_of("sft"))
    with pytest.raises(MissingLibraryError, match="'deepspeed' is not installed"):
        sharding_arguments(with_gpus(make_run("sft", data=TEXTS, training={"deepspeed": {"a": 1}})))


def test_completions_of_a_prompt_stay_together(make_run: RunMaker):
    training = {"batch_size": 6, "num_generations": 4}
    run = make_run("grpo", data=TEXTS, reward_functions=["length"], training=training)
    with pytest.raises(BadSpecError, match=r"num_generations is 4, which does not divide the 6 .*batch_size 6"):
        trl_arguments(run, config_of("grpo"), num_generations=4)
    run.job = run.job.model_copy(update={"gradient_accumulation_steps": 2})
    assert trl_arguments(run, config_of("grpo"), num_generations=4).generation_batch_size == 12


def test_no_vllm_inside_the_trainer(make_run: RunMaker):
    for fields in ({"use_vllm": True}, {"vllm_server_host": "10.0.0.1"}, {"vllm_mode": "server"}):
        run = make_run("grpo", data=TEXTS, reward_functions=["length"], training={"trl": fields})
        with pytest.raises(BadSpecError, match="the worker decides"):
            trl_arguments(run, config_of("grpo"))


def test_a_reward_model_is_not_named_through_trl(make_run: RunMaker):
    run = make_run("ppo", data=TEXTS, reward_functions=["length"], training={"trl": {"reward_model_path": "a/b"}})
    with pytest.raises(BadSpecError, match=r"set spec\.reward_model\.identifier instead"):
        trl_arguments(run, config_of("ppo"))


def test_deepspeed_by_itself_on_several_gpus(make_run: RunMaker, monkeypatch: pytest.MonkeyPatch):
    installed(monkeypatch, deepspeed=True)
    several = with_gpus(make_run("sft", data=TEXTS, training={"zero_stage": 3}), ranks=2)
    assert sharding_arguments(several) == {"deepspeed": zero_configuration(3)}
    assert sharding_arguments(with_gpus(make_run("sft", data=TEXTS))) == {}
    assert sharding_arguments(with_gpus(make_run("sft", data=TEXTS, training={"auto_deepspeed": False}), 2)) == {}
    assert sharding_arguments(with_gpus(make_run("dpo", data=PAIRS), 2)) == {}
    assert sharding_arguments(make_run("sft", data=TEXTS)) == {}


def test_a_wish_for_zero_without_deepspeed_is_a_warning(make_run: RunMaker, monkeypatch: pytest.MonkeyPatch):
    installed(monkeypatch, deepspeed=False)
    run = with_gpus(make_run("sft", data=TEXTS, training={"zero_stage": 3}), ranks=2)
    assert sharding_arguments(run) == {}
    assert isinstance(run.tell, RecordingRankReport)
    [warning] = run.tell.warnings
    assert "spec.training.zero_stage has no effect" in warning


def test_a_deepspeed_configuration_as_object_text_or_file(
    make_run: RunMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    installed(monkeypatch, deepspeed=True)
    wish = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(wish))
    for given in (wish, json.dumps(wish), str(file)):
        run = with_gpus(make_run("sft", data=TEXTS, training={"deepspeed": given}))
        assert sharding_arguments(run) == {"deepspeed": wish}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("/etc/hostname", "lies outside the folders"),
        ("{", "is no JSON"),
        ("[" * 100_000, "spec.training.deepspeed"),
        ('{"a": ' * 100_000, "is no JSON"),
        ({"tensorboard": {"enabled": True}}, "spec.training.deepspeed.tensorboard is not for tasks"),
        ({"zero_optimization": {"offload_param": {"device": "/x"}}}, "offload_param.device is '/x'"),
        ({"zero_optimization": {"offload_param": {"nvme_path": ".."}}}, "offload_param.nvme_path is not for tasks"),
        ({"flops_profiler": {"enabled": True, "output_file": "profile"}}, "flops_profiler.output_file is not for"),
    ],
)
def test_deepspeed_configurations_that_are_refused(
    make_run: RunMaker, monkeypatch: pytest.MonkeyPatch, given: object, words: str
):
    installed(monkeypatch, deepspeed=True)
    run = with_gpus(make_run("sft", data=TEXTS, training={"deepspeed": given}))
    with pytest.raises(BadSpecError) as caught:
        sharding_arguments(run)
    assert words in caught.value.message


def test_a_named_pipe_is_no_deepspeed_configuration(
    make_run: RunMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    installed(monkeypatch, deepspeed=True)
    os.mkfifo(tmp_path / "zero.json")  # opening it would wait for ever
    run = with_gpus(make_run("sft", data=TEXTS, training={"deepspeed": str(tmp_path / "zero.json")}))
    with pytest.raises(BadSpecError, match="no regular file"):
        sharding_arguments(run)


def test_fsdp(make_run: RunMaker):
    plain = with_gpus(make_run("sft", data=TEXTS, training={"fsdp": True}), ranks=2)
    assert sharding_arguments(plain) == {"fsdp": True}
    words = with_gpus(make_run("sft", data=TEXTS, training={"fsdp": "full_shard auto_wrap"}), ranks=2)
    assert sharding_arguments(words) == {"fsdp": "full_shard auto_wrap"}
    wish = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    several = with_gpus(make_run("sft", data=TEXTS, training={"fsdp": wish}), ranks=2)
    assert sharding_arguments(several) == {"fsdp": True, "fsdp_config": wish}
    alone = with_gpus(make_run("sft", data=TEXTS, training={"fsdp": wish}))
    assert sharding_arguments(alone) == {}
    assert isinstance(alone.tell, RecordingRankReport)
    assert "spec.training.fsdp has no effect" in alone.tell.warnings[0]
    bad = with_gpus(make_run("sft", data=TEXTS, training={"fsdp": "/etc/passwd"}), ranks=2)
    with pytest.raises(BadSpecError, match="expected options such as"):
        sharding_arguments(bad)

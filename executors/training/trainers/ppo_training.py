"""PPO: a policy learns to write what a reward model or reward functions rate highly, and stays near what it was."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from executors.errors import BadDataError, BadSpecError
from executors.model_spec import CheckpointSection
from executors.training.rewards.reward_functions import columns_read, reward_functions_for
from executors.training.rewards.reward_scoring import TextScorer, load_scorer
from executors.training.rewards.text_rewards import RewardSum, TextBackbone, reward_module
from executors.training.rows.training_rows import clipped_batch
from executors.training.trainers.base_models import (
    context_tokens,
    load_causal_lm,
    load_classifier,
    load_config,
    load_tokenizer,
    lora_config,
)
from executors.training.trainers.lora_setup import adapter_to_continue
from executors.training.trainers.ppo_batches import Prompt, PromptRows, SeededBatches
from executors.training.trainers.ppo_trainer import load_trl_ppo, ppo_trainer_type
from executors.training.trainers.trl_arguments import trl_arguments
from executors.training.training_run import BuiltTrainer, TrainingRun

if TYPE_CHECKING:
    import datasets

    from executors.training.spec.trainer_specs import PpoSpec

_PROMPT: Final = "prompt"
_BYTES_OF_A_TRAINED_WEIGHT: Final = 12
"""Its gradient and AdamW's two averages, which exist from the first step on."""


@dataclass(frozen=True)
class _Ends:
    """Which tokens end an answer: the one that TRL looks for, and all of them."""

    stop: int
    all: frozenset[int]


def build_ppo(run: TrainingRun, rows: datasets.Dataset) -> BuiltTrainer:
    """Make the trainer of a PPO run.

    Args:
        run: the run.
        rows: column `prompt`, and others for the reward functions.

    Raises:
        BadSpecError: a wrong option, reward function or stop text, or conversations for a model without a template.
        BadDataError: a column that a reward function reads is missing, or a prompt has no tokens.
        ModelLoadError: the model or the reward model cannot be loaded, or the latter is no classifier.
    """
    import datasets

    spec = cast("PpoSpec", run.spec)
    functions = reward_functions_for(spec)
    arguments = _arguments(run, spec, rows)
    columns = columns_read(functions, [name for name in rows.column_names if name != _PROMPT])
    tokenizer = load_tokenizer(run)
    ends = _ends(spec, arguments, tokenizer)
    prompts = _prompts(run, rows, columns, tokenizer, arguments)
    scorer = load_scorer(spec.reward_model, run.policy, "cpu") if spec.reward_model else None
    policy = load_causal_lm(run, tokenizer)
    generation = _sample_freely(policy, tokenizer, ends, arguments)
    adapter = lora_config(run, policy)
    batches = SeededBatches(
        prompts,
        size=arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps,
        seed=arguments.seed,
        pad_id=tokenizer.pad_token_id,
        part=(run.rank, run.world_size),
    )
    value_model = _value_model(run, tokenizer, adapter or getattr(policy, "peft_config", {}).get("default"))
    if arguments.gradient_checkpointing:
        for model in (policy, value_model):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer = ppo_trainer_type()(
        batches=batches,
        generation_config=generation,
        args=arguments,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,  # a frozen copy, or with an adapter the policy without it
        reward_model=reward_module(TextBackbone(batches, tokenizer, ends.all, RewardSum(functions, scorer))),
        train_dataset=datasets.Dataset.from_dict({"input_ids": prompts.tokens}),
        value_model=value_model,
        peft_config=adapter,
    )
    trainer.policy_model.generation_config.eos_token_id = sorted(ends.all)
    if scorer:
        _place(run, scorer, trainer)
    folder = "final_lora" if spec.uses_lora else "final_model"
    return BuiltTrainer(trainer, tokenizer, spec.uses_lora, f"checkpoints/{folder}")


def _arguments(run: TrainingRun, spec: PpoSpec, rows: datasets.Dataset) -> Any:  # noqa: ANN401 - PPOConfig
    training, job = spec.training, run.job
    batch = clipped_batch(run, rows)
    on_this_rank = batch * job.gradient_accumulation_steps
    in_all = on_this_rank * run.world_size
    parts = _mini_batches(run, spec, on_this_rank)
    if training.max_steps:
        episodes = training.max_steps * in_all
    else:
        # After memory ran out a smaller batch is gone through in more rounds: the total stays.
        rounds = job.gradient_accumulation_steps // training.gradient_accumulation_steps
        episodes = training.total_episodes(batch * rounds) or math.ceil(training.num_train_epochs * len(rows))
    arguments = trl_arguments(
        run,
        load_trl_ppo().PPOConfig,
        per_device_train_batch_size=batch,
        num_mini_batches=parts,
        num_ppo_epochs=training.ppo_epochs,
        kl_coef=training.kl_coef,
        total_episodes=episodes,
        response_length=spec.response_length,
        temperature=spec.temperature,
        num_sample_generations=0,
    )
    if arguments.deepspeed or arguments.fsdp:
        raise BadSpecError(
            "ppo trains with plain data parallelism only; expected neither spec.training.deepspeed nor "
            "spec.training.fsdp",
            hint="Remove the key; with spec.lora a larger model fits on one GPU. Or use taskType grpo.",
        )
    if arguments.ref_adapter_name or arguments.model_adapter_name:
        raise BadSpecError("spec.training.trl: ref_adapter_name and model_adapter_name are not for this worker's ppo")
    if arguments.whiten_rewards and on_this_rank // parts < 8:
        raise BadSpecError(
            f"spec.training.trl.whiten_rewards is true with {on_this_rank // parts} rows in a mini batch; "
            "expected at least 8 (batch_size x gradient_accumulation_steps / num_mini_batches)"
        )
    if on_this_rank == 1 and arguments.response_length == 1:
        raise BadSpecError(
            "spec.generation.max_new_tokens is 1 with one row in a batch; PPO compares tokens with each other: "
            "expected more tokens, or a larger spec.training.batch_size"
        )
    return arguments


def _mini_batches(run: TrainingRun, spec: PpoSpec, batch: int) -> int:
    """Into how many parts a batch is split; fewer than the task says where the data set is too small for them."""
    wanted = spec.training.num_mini_batches
    if batch % wanted == 0:
        return wanted
    parts = math.gcd(batch, wanted)
    if run.is_first:
        run.tell.warn(f"training.num_mini_batches is {parts}, not {wanted}, which does not divide the batch of {batch}")
    return parts


def _ends(spec: PpoSpec, arguments: Any, tokenizer: Any) -> _Ends:  # noqa: ANN401 - types of heavy libraries
    own = tokenizer.eos_token_id
    if own is None:
        raise BadSpecError("the model's tokenizer has no end token; expected one, for PPO looks where an answer ends")
    if spec.generation.stop is not None:
        stop = _single_token(spec.generation.stop, tokenizer)
    else:
        stop = own if arguments.stop_token_id is None else arguments.stop_token_id
    arguments.stop_token, arguments.stop_token_id = None, stop
    return _Ends(stop, frozenset({stop, own}))


def _single_token(stop: str, tokenizer: Any) -> int:  # noqa: ANN401 - a type of a heavy library
    tokens = tokenizer.encode(stop, add_special_tokens=False)
    if len(tokens) == 1:
        return int(tokens[0])
    named = tokenizer.get_vocab().get(stop)
    if named is None:
        parts = ", ".join(repr(part) for part in tokenizer.convert_ids_to_tokens(tokens))
        raise BadSpecError(
            f"spec.generation.stop is {stop!r}, which the model's tokenizer splits into {len(tokens)} tokens "
            f"({parts}); expected one token",
            hint=f"Leave it out to stop at the model's own end token, {tokenizer.eos_token!r}.",
        )
    return int(named)


def _prompts(
    run: TrainingRun,
    rows: datasets.Dataset,
    columns: Sequence[str],
    tokenizer: Any,  # noqa: ANN401 - a type of a heavy library
    arguments: Any,  # noqa: ANN401 - PPOConfig
) -> PromptRows:
    longest = run.spec.training.max_seq_length
    context = context_tokens(load_config(run))
    if context is not None and context - arguments.response_length < 1:
        raise BadSpecError(
            f"spec.generation.max_new_tokens is {arguments.response_length}, and the model's context is {context} "
            "tokens; expected fewer, so that a prompt fits too"
        )
    limit = min(longest, context - arguments.response_length) if context else longest
    prompts: list[Prompt] = list(rows[_PROMPT])
    tokens = []
    for number, prompt in enumerate(prompts):
        encoded = _encode(prompt, tokenizer)
        if not encoded:
            raise BadDataError(f"row {number} of the data set: its prompt has no tokens ({prompt!r:.60})")
        tokens.append(encoded)
    cut = sum(len(each) > limit for each in tokens)
    if cut and run.is_first:
        run.tell.warn(f"{cut} of {len(tokens)} prompts are longer than {limit} tokens; their beginnings are cut off")
    return PromptRows(prompts, [each[-limit:] for each in tokens], {name: list(rows[name]) for name in columns})


def _encode(prompt: Prompt, tokenizer: Any) -> list[int]:  # noqa: ANN401 - a type of a heavy library
    if isinstance(prompt, str):
        tokens: list[int] = list(tokenizer(prompt)["input_ids"])
    elif tokenizer.chat_template is None:
        raise BadSpecError(
            "data holds conversations, but the model's tokenizer has no chat template",
            hint="Give the prompts as texts, or train a model with a chat template.",
        )
    else:
        return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])
    while tokens and tokens[-1] == tokenizer.eos_token_id:  # some tokenizers end each text
        tokens.pop()
    return tokens


def _sample_freely(policy: Any, tokenizer: Any, ends: _Ends, arguments: Any) -> Any:  # noqa: ANN401 - heavy types
    """Take the model's own sampling values away, with which TRL would reckon wrong chances.

    Each answer has a token to learn from, and each batch two: of fewer, TRL's averages are no numbers.

    Returns:
        The values as they were, to be saved with the model.
    """
    import transformers

    kept = policy.generation_config
    rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    pad = tokenizer.pad_token_id
    least = 2 if rows == 1 else 1 if pad in ends.all else None
    policy.generation_config = transformers.GenerationConfig(
        bos_token_id=kept.bos_token_id,
        pad_token_id=pad,
        min_new_tokens=least,
        suppress_tokens=None if pad in ends.all else [pad],
    )
    return copy.deepcopy(kept)


def _value_model(run: TrainingRun, tokenizer: Any, adapter: Any) -> Any:  # noqa: ANN401 - types of heavy libraries
    """The policy's weights with a score head of their own, which says 0 at first.

    Where the policy has an adapter, the value model gets a new one of the same form; its other weights stay.
    """
    import peft
    import torch

    if adapter_to_continue(run):  # it is of a language model
        run = dataclasses.replace(run, spec=run.spec.model_copy(update={"checkpoint": CheckpointSection()}))
    model = load_classifier(run, tokenizer)
    if adapter is not None:
        peft.inject_adapter_in_model(copy.deepcopy(adapter), model)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()  # PEFT does so for whole models only
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Module):
        raise BadSpecError(
            f"ppo cannot train {type(model).__name__}: it has no head named 'score'; expected a decoder such as Llama, "
            "Qwen or GPT-2"
        )
    for weight in head.parameters():
        torch.nn.init.zeros_(weight)
        weight.requires_grad_(requires_grad=True)
    return model


def _place(run: TrainingRun, scorer: TextScorer, trainer: Any) -> None:  # noqa: ANN401 - a type of a heavy library
    trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    # As much again for what a step computes with.
    scorer.place(trainer.accelerator.device, kept_free=2 * trained * _BYTES_OF_A_TRAINED_WEIGHT)
    if run.is_first:
        run.tell.log("info", f"the reward model runs on {scorer.device}")

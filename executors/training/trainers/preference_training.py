"""Training on preferences: DPO, and reward models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from executors.errors import BadDataError, BadSpecError
from executors.training.trainers.base_models import (
    context_tokens,
    load_causal_lm,
    load_classifier,
    load_config,
    load_tokenizer,
    lora_config,
)
from executors.training.trainers.reference_adapter import save_without_reference
from executors.training.trainers.trl_arguments import trl_arguments
from executors.training.training_run import BuiltTrainer, TrainingRun

if TYPE_CHECKING:
    import datasets

    from executors.training.spec.trainer_specs import DpoSpec

_COLUMNS = ("prompt", "chosen", "rejected")


def build_dpo(run: TrainingRun, rows: datasets.Dataset) -> BuiltTrainer:
    """Make the trainer of a DPO run.

    A full training compares with a second, frozen copy of the base model; with a new adapter the reference is the base
    model itself, the adapter switched off; an adapter that is trained further is compared with a copy of itself.

    Raises:
        BadSpecError: a wrong option, or conversations for a model without a chat template.
        BadDataError: no pair fits into `training.max_seq_length`.
        ModelLoadError: the model cannot be loaded.
    """
    import trl

    spec = cast("DpoSpec", run.spec)
    arguments = trl_arguments(run, trl.DPOConfig, beta=spec.training.beta, max_length=spec.training.max_seq_length)
    tokenizer = load_tokenizer(run)
    _check_pairs(rows, tokenizer)
    _limit_length(run, arguments)
    model = load_causal_lm(run, tokenizer)
    adapter = spec.uses_lora
    # TRL would load the reference by the model's name alone, without its revision and dtype.
    reference = None if adapter or arguments.precompute_ref_log_probs else load_causal_lm(run, tokenizer)
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=_pairs_of(rows),
        processing_class=tokenizer,
        peft_config=lora_config(run, model),
    )
    save_without_reference(trainer.model)
    _tell_left_out(run, len(rows), trainer, "prompts")
    return BuiltTrainer(trainer, tokenizer, adapter, f"checkpoints/{'final_lora' if adapter else 'final_model'}")


def build_reward(run: TrainingRun, rows: datasets.Dataset) -> BuiltTrainer:
    """Make the trainer of a reward model: a sequence classifier with one label, the score.

    Raises:
        BadSpecError: a wrong option, or conversations for a model without a chat template.
        BadDataError: no pair fits into `training.max_seq_length`.
        ModelLoadError: the model cannot be loaded.
    """
    import trl

    arguments = trl_arguments(run, trl.RewardConfig, max_length=run.spec.training.max_seq_length)
    tokenizer = load_tokenizer(run)
    _check_pairs(rows, tokenizer)
    _limit_length(run, arguments)
    model = load_classifier(run, tokenizer)
    trainer = trl.RewardTrainer(
        model=model,
        args=arguments,
        train_dataset=_pairs_of(rows),
        processing_class=tokenizer,
        peft_config=lora_config(run, model),
    )
    _tell_left_out(run, len(rows), trainer, "prompts with their answers")
    adapter = run.spec.uses_lora
    return BuiltTrainer(trainer, tokenizer, adapter, "final_lora" if adapter else "final_model")


def _pairs_of(rows: datasets.Dataset) -> datasets.Dataset:
    # Other columns, such as `images` or `tools`, would change what TRL does.
    return rows.select_columns([name for name in _COLUMNS if name in rows.column_names])


def _check_pairs(rows: datasets.Dataset, tokenizer: Any) -> None:  # noqa: ANN401 - a type of a heavy library
    """Raise before the weights load what TRL would only find after."""
    if tokenizer.eos_token is None:
        raise BadSpecError("the model's tokenizer has no end token; expected one, for it ends each answer in training")
    if not isinstance(rows[0]["chosen"], str) and tokenizer.chat_template is None:
        raise BadSpecError(
            "data holds conversations, but the model's tokenizer has no chat template",
            hint="Give texts for prompt, chosen and rejected, or train a model with a chat template.",
        )


def _limit_length(run: TrainingRun, arguments: Any) -> None:  # noqa: ANN401 - a type of a heavy library
    context = context_tokens(load_config(run))
    if context is None or (arguments.max_length is not None and arguments.max_length <= context):
        return
    if "max_seq_length" in run.spec.training.model_fields_set and run.is_first:
        run.tell.warn(
            f"training.max_seq_length is {arguments.max_length}, above the model's context of {context} tokens, "
            "which is used instead"
        )
    arguments.max_length = context


def _tell_left_out(run: TrainingRun, given: int, trainer: Any, what: str) -> None:  # noqa: ANN401 - as above
    kept, limit = len(trainer.train_dataset), trainer.args.max_length
    if not kept:
        raise BadDataError(
            f"none of the {given} pairs fits: all {what} are longer than training.max_seq_length ({limit} tokens)",
            hint="Raise training.max_seq_length, or shorten the texts.",
        )
    if kept < given and run.is_first:
        run.tell.warn(
            f"{given - kept} of {given} pairs are left out: their {what} are longer than "
            f"training.max_seq_length ({limit} tokens)"
        )

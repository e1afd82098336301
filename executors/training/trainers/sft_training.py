"""Supervised fine-tuning on TRL's `SFTTrainer`: whole weights (`sft`) or a LoRA adapter (`lora_sft`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from executors.errors import BadDataError, BadSpecError
from executors.training.trainers.base_models import (
    context_tokens,
    load_causal_lm,
    load_config,
    load_tokenizer,
    lora_config,
)
from executors.training.trainers.chat_checks import (
    LOOKED_AT_FIRST,
    are_conversations,
    check_conversations,
    check_template,
)
from executors.training.trainers.trl_arguments import trl_arguments
from executors.training.training_run import BuiltTrainer

if TYPE_CHECKING:
    from datasets import Dataset

    from executors.training.training_run import TrainingRun

_TOLERANCE: Final = 1e-4
"""By so much, relative to the highest, a token's scores may differ when the same is computed in another way."""

_COARSE_TOLERANCE: Final = 5e-2
"""The same with weights of 16 or fewer bits."""


def build_sft(run: TrainingRun, rows: Dataset) -> BuiltTrainer:
    """Make the trainer for `sft` or `lora_sft`.

    Args:
        run: the run.
        rows: column `text`, or `messages`, or `prompt` and `completion`.

    Raises:
        BadSpecError: arguments, model or target modules that cannot be used; conversations without a chat template;
            packing with a model that would mix the packed texts.
        BadDataError: no row is left to learn from.
        MissingLibraryError: a library is not installed.
        ModelLoadError: the model cannot be loaded.
    """
    import trl
    from jinja2 import TemplateError  # noqa: PLC0415 - comes with an extra

    args = trl_arguments(
        run,
        trl.SFTConfig,
        max_length=run.spec.training.max_seq_length,
        packing=run.spec.training.packing,
    )
    tokenizer = load_tokenizer(run)
    _check_tokenizer(run, args, tokenizer, rows)
    _limit_length(run, args)
    model = load_causal_lm(run, tokenizer)
    if args.packing:
        _check_packing(run, model)
    adapter = lora_config(run, model)
    if args.loss_type == "chunked_nll" and not _has_plain_head(model, adapter):
        args.loss_type = "nll"  # the same loss; the other way of computing it needs an untouched linear head
    try:
        trainer = trl.SFTTrainer(
            model=model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=adapter
        )
    except (RuntimeError, TemplateError):
        if are_conversations(rows):  # one that was not looked at before may be at fault
            check_conversations(tokenizer, rows, assistant_only=bool(args.assistant_only_loss))
        raise
    if not len(trainer.train_dataset):
        raise BadDataError(
            f"no example has anything to learn from within its first {args.max_length} tokens",
            hint="Raise spec.training.max_seq_length, or shorten the prompts.",
        )
    if run.is_first and not args.packing:
        _tell_cut(run, trainer)
    uses_lora = run.spec.uses_lora
    return BuiltTrainer(
        trainer=trainer, tokenizer=tokenizer, adapter=uses_lora, folder="final_lora" if uses_lora else "final_model"
    )


def _check_tokenizer(run: TrainingRun, args: Any, tokenizer: Any, rows: Dataset) -> None:  # noqa: ANN401 - heavy types
    name = run.spec.model_name
    end = args.eos_token or tokenizer.eos_token
    if end is None:
        raise BadSpecError(
            f"the tokenizer of {name!r} has no end token, so the model could not learn where an answer ends",
            hint="Name one of its tokens in spec.training.trl.eos_token.",
        )
    if end not in tokenizer.get_vocab():
        raise BadSpecError(f"spec.training.trl.eos_token is {end!r}, which the tokenizer of {name!r} does not know")
    alone = bool(args.assistant_only_loss)
    if are_conversations(rows):
        check_template(run, tokenizer, assistant_only=alone)
        check_conversations(tokenizer, rows, assistant_only=alone, most=LOOKED_AT_FIRST)
    elif alone:
        raise BadSpecError(
            "spec.training.trl.assistant_only_loss is true, but the data are plain texts; expected conversations",
            hint="Give data.messages or data.messages_column, or remove the key.",
        )


def _limit_length(run: TrainingRun, args: Any) -> None:  # noqa: ANN401 - trl.SFTConfig
    context = context_tokens(load_config(run))
    if context is None or (args.max_length is not None and args.max_length <= context):
        return
    if run.is_first and "max_seq_length" in run.spec.training.model_fields_set:
        run.tell.warn(
            f"spec.training.max_seq_length is {args.max_length}, above the model's context of {context} tokens, which "
            "is used instead; longer examples are cut there"
        )
    args.max_length = context


def _tell_cut(run: TrainingRun, trainer: Any) -> None:  # noqa: ANN401 - trl.SFTTrainer
    """Say how many examples are as long as may be; TRL cuts longer ones without a word."""
    limit, tables = trainer.args.max_length, trainer.train_dataset.with_format("arrow").iter(batch_size=1000)
    if limit is None:
        return
    lengths = (table["input_ids"].combine_chunks().value_lengths().to_numpy() for table in tables)
    full = sum(int((each >= limit).sum()) for each in lengths)
    if full:
        run.tell.warn(
            f"{full} of {len(trainer.train_dataset)} examples reach the limit of {limit} tokens "
            "(spec.training.max_seq_length, the model's context); what goes beyond was cut"
        )


def _has_plain_head(model: Any, adapter: Any) -> bool:  # noqa: ANN401 - heavy types
    """Whether the output projection is one linear module that no adapter changes."""
    import torch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = inner.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return False
    if adapter is None or isinstance(adapter.target_modules, str):
        return True
    names = [name for name, module in inner.named_modules() if module is head]
    targets = adapter.target_modules
    return not any(name == target or name.endswith(f".{target}") for name in names for target in targets)


def _check_packing(run: TrainingRun, model: Any) -> None:  # noqa: ANN401 - transformers.PreTrainedModel
    """Make sure that a text's scores do not depend on the text that is packed before it."""
    import torch

    device = model.device
    one, other = torch.tensor([[5, 6, 7, 8]], device=device), torch.tensor([[9, 4, 3, 2]], device=device)
    places = torch.arange(4, device=device)[None]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = model(input_ids=one, position_ids=places, use_cache=False).logits[0]
            packed = model(
                input_ids=torch.cat([other, one], dim=1),
                position_ids=torch.cat([places, places], dim=1),
                use_cache=False,
            ).logits[0, 4:]
    except TypeError:  # it takes no position_ids, which tell packed texts apart
        kept_apart = False
    else:
        tolerance = _TOLERANCE if model.dtype == torch.float32 else _COARSE_TOLERANCE
        kept_apart = bool((alone - packed).abs().max() <= tolerance * alone.abs().max())
    model.train(was_training)
    if not kept_apart:
        raise BadSpecError(
            f"spec.training.packing is true, but the model {run.spec.model_name!r} "
            f"({type(model).__name__}) does not keep packed texts apart: each would see those before it",
            hint="Remove spec.training.packing.",
        )

"""GRPO: reward functions or a reward model judge several completions of each prompt; the better ones are favoured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from executors.errors import BadDataError, BadSpecError
from executors.training.rewards.reward_functions import WeightedReward, columns_read, reward_functions_for
from executors.training.rewards.reward_scoring import TextScorer, load_scorer
from executors.training.trainers.base_models import (
    context_tokens,
    find_trainable,
    load_causal_lm,
    load_config,
    load_tokenizer,
    lora_config,
)
from executors.training.trainers.reference_adapter import save_without_reference
from executors.training.trainers.trl_arguments import trl_arguments
from executors.training.training_run import BuiltTrainer, TrainingRun
from executors.weights_source import hub_options

if TYPE_CHECKING:
    import datasets

    from executors.training.spec.trainer_specs import GrpoSpec

Judge = Callable[..., list[float]]
"""A reward function as TRL calls it: `prompts`, `completions` and the rows' columns by keyword."""

_COLUMN_MARK: Final = "row_"
"""Before the names of the rows' columns: `completions` or `images` as they are would mean something to TRL."""


def build_grpo(run: TrainingRun, rows: datasets.Dataset) -> BuiltTrainer:
    """Make the trainer of a GRPO run.

    Raises:
        BadSpecError: a wrong option or reward function, or conversations for a model without a chat template.
        BadDataError: a column that a reward function reads is missing, too few prompts, or all are too long.
        ModelLoadError: the model or the reward model cannot be loaded.
    """
    import trl

    spec = cast("GrpoSpec", run.spec)
    rewards = reward_functions_for(spec)
    arguments = trl_arguments(
        run,
        trl.GRPOConfig,
        beta=spec.training.beta,
        num_generations=spec.training.num_generations,
        max_completion_length=spec.response_length,
        temperature=spec.temperature,
        reward_weights=[*(reward.weight for reward in rewards), *([1.0] if spec.reward_model else [])],
    )
    if spec.generation.stop and run.is_first:
        run.tell.warn("generation.stop has no effect in grpo: an answer ends at the tokenizer's own end token")
    columns = columns_read(rewards, [name for name in rows.column_names if name != "prompt"])
    tokenizer = load_tokenizer(run)
    prompts = _fitting_prompts(run, rows, tokenizer, arguments)
    judges = [_judge_by_function(reward, columns) for reward in rewards]
    if spec.reward_model:
        judges.append(_judge_by_model(load_scorer(spec.reward_model, run.policy, arguments.device)))
    model = load_causal_lm(run, tokenizer)
    if arguments.beta and not spec.uses_lora:
        _name_reference(run, arguments, model)
    trainer = _trainer_class()(
        model=model,
        reward_funcs=judges,
        args=arguments,
        train_dataset=prompts.select_columns(["prompt", *columns]).rename_columns(
            {name: _COLUMN_MARK + name for name in columns}
        ),
        processing_class=tokenizer,
        peft_config=lora_config(run, model),
    )
    if trainer.ref_model is not None and find_trainable(run).weights_file:
        # TRL has loaded the base whose configuration the checkpoint borrows.
        trainer.accelerator.unwrap_model(trainer.ref_model).load_state_dict(model.state_dict())
    save_without_reference(trainer.model)
    adapter = spec.uses_lora
    return BuiltTrainer(trainer, tokenizer, adapter, "final_lora" if adapter else "final_model")


def _trainer_class() -> Any:  # noqa: ANN401 - trl.GRPOTrainer
    """TRL's trainer, imported as if vLLM were not installed.

    TRL imports vLLM along with it, of which it knows other versions than ours, and which is not used here.
    """
    from trl import import_utils

    asked = import_utils.is_vllm_available
    import_utils.is_vllm_available = _no_vllm
    try:
        from trl.trainer.grpo_trainer import GRPOTrainer
    finally:
        import_utils.is_vllm_available = asked
    return GRPOTrainer


def _no_vllm(min_version: str | None = None) -> bool:
    del min_version
    return False


def _name_reference(run: TrainingRun, arguments: Any, model: Any) -> None:  # noqa: ANN401 - types of heavy libraries
    """Tell TRL, which loads the reference itself, where it lies and how it is loaded."""
    source = find_trainable(run)
    whole = source.base if source.weights_file and source.base else source
    model.config.name_or_path = whole.location
    arguments.model_init_kwargs = {
        **hub_options(run.spec, run.policy, whole),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device_map": None,
    }


def _fitting_prompts(
    run: TrainingRun,
    rows: datasets.Dataset,
    tokenizer: Any,  # noqa: ANN401 - types of heavy libraries
    arguments: Any,  # noqa: ANN401
) -> datasets.Dataset:
    """The rows whose prompt is not too long; raises where they are too few for one step."""
    limit = _prompt_limit(run, arguments.max_completion_length)
    if not isinstance(rows[0]["prompt"], str) and tokenizer.chat_template is None:
        raise BadSpecError(
            "data holds conversations, but the model's tokenizer has no chat template",
            hint="Give texts as prompts, or train a model with a chat template.",
        )

    def fits(prompt: Any) -> bool:  # noqa: ANN401 - text or messages
        if isinstance(prompt, str):
            return len(tokenizer(prompt)["input_ids"]) <= limit
        rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
        return len(rendered["input_ids"]) <= limit

    kept = rows.filter(fits, input_columns=["prompt"])
    if len(kept) < len(rows) and run.is_first:
        run.tell.warn(
            f"{len(rows) - len(kept)} of {len(rows)} prompts are left out: they are longer than {limit} tokens "
            "(training.max_seq_length, and what the model's context leaves beside generation.max_new_tokens)"
        )
    needed = arguments.generation_batch_size // arguments.num_generations
    if len(kept) < needed:
        raise BadDataError(
            f"data has {len(kept)} prompts of at most {limit} tokens, but one step takes {needed}: "
            f"{arguments.generation_batch_size} completions, {arguments.num_generations} of each prompt",
            hint="Give more prompts, lower training.batch_size or gradient_accumulation_steps, "
            "or raise training.num_generations.",
        )
    return kept


def _prompt_limit(run: TrainingRun, response_length: int) -> int:
    """Tokens of a prompt at most."""
    limit = run.spec.training.max_seq_length
    context = context_tokens(load_config(run))
    if context is None:
        return limit
    if response_length >= context:
        raise BadSpecError(
            f"generation.max_new_tokens is {response_length}, but the model's context has {context} tokens; "
            "expected fewer, so that a prompt fits too"
        )
    return min(limit, context - response_length)


def _answers(completions: Sequence[Any]) -> list[str]:
    """The texts of completions; to a conversation the answer is a list of one message."""
    return [each if isinstance(each, str) else str(each[0]["content"]) for each in completions]


def _judge_by_function(reward: WeightedReward, columns: Sequence[str]) -> Judge:
    def judge(*, prompts: Sequence[object], completions: Sequence[Any], **given: Any) -> list[float]:  # noqa: ANN401
        cells = {name: given[_COLUMN_MARK + name] for name in columns}
        return reward.score(prompts, _answers(completions), cells)

    judge.__name__ = reward.label  # TRL names the metrics by it
    return judge


def _judge_by_model(scorer: TextScorer) -> Judge:
    def judge(*, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:  # noqa: ANN401
        return scorer.score(prompts, _answers(completions))

    judge.__name__ = "reward_model"
    return judge

"""Checks conversations against a tokenizer's chat template, before anything heavy is loaded and after a refusal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from executors.errors import BadDataError, BadSpecError
from executors.training.training_run import TrainingRun

if TYPE_CHECKING:
    from datasets import Dataset

LOOKED_AT_FIRST: Final = 200
"""Rows that are tried before the weights are loaded."""


def are_conversations(rows: Dataset) -> bool:
    """Whether the rows hold messages, as opposed to texts."""
    first = rows[0]
    return "messages" in first or isinstance(first.get("prompt"), list)


def check_template(run: TrainingRun, tokenizer: Any, *, assistant_only: bool) -> None:  # noqa: ANN401 - a heavy type
    """Make sure that conversations can become text.

    Args:
        run: the run.
        tokenizer: the model's tokenizer.
        assistant_only: whether only the assistant's words are to count, for which the template has to mark them.

    Raises:
        BadSpecError: there is no chat template, or one in which the assistant's words cannot be told.
    """
    name = run.spec.model_name
    if tokenizer.chat_template is None:
        raise BadSpecError(
            f"the data are conversations, and the tokenizer of {name!r} has no chat template to make text of them",
            hint="Train an instruction model, give texts (data.prompts, data.text_field), or name two columns in "
            "data.prompt_column and data.response_column.",
        )
    if not assistant_only:
        return
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return
    try:
        get_training_chat_template(tokenizer)
    except ValueError as error:
        raise BadSpecError(
            f"spec.training.trl.assistant_only_loss is true, but the chat template of {name!r} does not mark the "
            "assistant's words with {% generation %}, and TRL knows no other template for it",
            hint="Remove the key, or mark the words in the chat template of the model's tokenizer.",
        ) from error


def check_conversations(
    tokenizer: Any,  # noqa: ANN401 - a heavy type
    rows: Dataset,
    *,
    assistant_only: bool,
    most: int | None = None,
) -> None:
    """Make text of conversations, only to see whether the chat template takes them.

    Args:
        tokenizer: has a chat template.
        rows: conversations.
        assistant_only: whether each needs words of the assistant.
        most: look at so many of the first rows; None: at all.

    Raises:
        BadDataError: a row that the template refuses, or without words of the assistant.
    """
    from jinja2 import TemplateError  # noqa: PLC0415 - comes with an extra

    for number in range(min(len(rows), len(rows) if most is None else most)):
        row = rows[number]
        messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
        if assistant_only and not any(message["role"] == "assistant" for message in messages):
            raise BadDataError(
                f"row {number} has no message of the assistant, and spec.training.trl.assistant_only_loss lets only "
                "these count"
            )
        try:
            tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            roles = ", ".join(str(message["role"]) for message in messages[:6])
            raise BadDataError(
                f"row {number}: the model's chat template refuses the conversation (roles: {roles}): {error}"
            ) from error

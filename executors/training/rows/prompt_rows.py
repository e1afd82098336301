"""What ppo and grpo make of one row: the prompt, and the other columns for reward functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from executors.training.rows.raw_rows import PROMPT, RawRows
from executors.training.rows.row_cells import (
    BadRowError,
    Row,
    cell_of,
    filled_text_of,
    is_conversation,
    listed,
    messages_of,
    plain_value,
)
from executors.training.rows.row_shapes import LostKeys, Shaped, need_columns
from executors.training.spec.training_data_spec import PromptData

MOST_COLUMNS: Final = 100
"""Columns beside the prompt."""

RESPONSE: Final = "response"
"""Where reward functions look for the answer that the data has."""


@dataclass
class PromptShape:
    """A prompt with the other columns as text: strings as they are, anything else as JSON, null as null.

    Attributes:
        prompt: its column.
        conversation: whether prompts are conversations.
        response: column that the task names as the answer; it comes out as `response` too.
        others: the other columns that are kept.
        dropped: those that are not.
    """

    prompt: str
    conversation: bool
    response: str | None
    others: Sequence[str]
    dropped: Sequence[str]
    lost: LostKeys = field(default_factory=LostKeys)

    @property
    def wanted(self) -> Sequence[str]:
        """The columns that are read."""
        return [self.prompt, *self.others]

    @property
    def columns(self) -> Mapping[str, bool]:
        """The columns that come out."""
        return {
            PROMPT: self.conversation,
            **dict.fromkeys(self.others, False),
            **({RESPONSE: False} if self.response else {}),
        }

    def make(self, row: Row) -> Shaped:
        """Check the prompt and print the other cells."""
        others: Shaped = {name: plain_value(row.get(name), name) for name in self.others}
        if self.response:
            # The task names it, so no row may lack it.
            others[RESPONSE] = plain_value(cell_of(row, self.response), self.response)
        if not self.conversation:
            return {PROMPT: filled_text_of(row, self.prompt), **others}
        messages = messages_of(cell_of(row, self.prompt), self.prompt, self.lost.keys)
        if messages[-1]["role"] not in {"user", "tool", "assistant"}:
            raise BadRowError(f"{self.prompt!r} ends with a message of role {messages[-1]['role']}; expected user")
        return {PROMPT: messages, **others}

    def notes(self) -> list[str]:
        """Name what is left out."""
        dropped = (
            [f"the columns {listed(self.dropped)} are left out; {MOST_COLUMNS} are kept, none named 'prompt'"]
            if self.dropped
            else []
        )
        return [*dropped, *self.lost.notes()]


def prompt_shape(data: PromptData, rows: RawRows, first: int) -> PromptShape:
    """Choose how prompts are read.

    Args:
        data: the section `data`.
        rows: where they come from.
        first: position of a row whose kind, text or conversation, all others must share.

    Raises:
        BadDataError: the prompt's column is missing.
    """
    column, response = _column(data, rows), _response(data)
    need_columns(data, rows, {"prompt_column": column, "response_column": response})
    others = [name for name in rows.columns if name != column]
    # The named answer first, so that it is never among those that are too many.
    kept = [name for name in sorted(others, key=lambda name: name != response) if name != PROMPT][:MOST_COLUMNS]
    _, row = next(iter(rows.read([first], [column])))
    return PromptShape(
        prompt=column,
        conversation=is_conversation(row.get(column)),
        response=response,
        others=kept,
        dropped=[name for name in others if name not in kept],
    )


def _response(data: PromptData) -> str | None:
    if data.rows == "inline":
        return None
    return data.jsonl_columns.response if data.rows == "jsonl" else data.response_column


def _column(data: PromptData, rows: RawRows) -> str:
    if data.rows == "inline":
        return PROMPT
    if data.rows == "jsonl":
        return data.jsonl_columns.query
    if data.prompt_column is None and PROMPT not in rows.columns and len(rows.columns) == 1:
        return rows.columns[0]
    return data.prompt_column or PROMPT

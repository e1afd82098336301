"""What supervised training makes of one row, and what all shapes of rows share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from executors.errors import BadDataError, BadSpecError
from executors.secret_masking import shown
from executors.training.rows.raw_rows import COMPLETION, MESSAGES, PROMPT, TEXT, RawRows
from executors.training.rows.row_cells import (
    BadRowError,
    Message,
    Row,
    cell_of,
    filled_text_of,
    listed,
    messages_of,
    text_of,
)
from executors.training.spec.training_data_spec import TextColumns, TextData, TrainingData

Shaped = dict[str, str | list[Message] | None]
"""A row as a trainer wants it: each cell a text or a conversation."""


class RowShape(Protocol):
    """Makes rows for a trainer."""

    @property
    def wanted(self) -> Sequence[str]:
        """The columns that are read."""
        ...

    @property
    def columns(self) -> Mapping[str, bool]:
        """The columns that come out, and whether each holds conversations."""
        ...

    def make(self, row: Row) -> Shaped | None:
        """Make one row; None: it is left out.

        Raises:
            BadRowError: it cannot be used.
        """
        ...

    def notes(self) -> list[str]:
        """Sentences for the sender about the rows so far."""
        ...


@dataclass
class LostKeys:
    """Keys of messages that no chat template will see."""

    keys: set[str] = field(default_factory=set)

    def notes(self) -> list[str]:
        if not self.keys:
            return []
        return [f"messages keep role and content only; {listed(sorted(self.keys))} is left out"]


@dataclass
class TextShape:
    """sft on one text a row.

    Attributes:
        text: its column.
        skip_blank: whether a blank text is left out with a warning (data sets have such rows), not an error.
        blank: how many were left out.
    """

    text: str
    skip_blank: bool
    blank: int = 0

    @property
    def wanted(self) -> Sequence[str]:
        """The columns that are read."""
        return [self.text]

    @property
    def columns(self) -> Mapping[str, bool]:
        """The columns that come out."""
        return {TEXT: False}

    def make(self, row: Row) -> Shaped | None:
        """Take the text."""
        if not self.skip_blank:
            return {TEXT: filled_text_of(row, self.text)}
        text = text_of(row, self.text)
        if text.strip():
            return {TEXT: text}
        self.blank += 1
        return None

    def notes(self) -> list[str]:
        """Say how many rows are left out."""
        return [f"{self.blank} rows whose {self.text!r} is blank are left out"] if self.blank else []


@dataclass
class PairShape:
    """sft on a prompt and its response: joined, or as prompt and completion.

    Attributes:
        separator: stands between them.
        split: whether they stay apart.
    """

    prompt: str
    response: str
    separator: str
    split: bool

    @property
    def wanted(self) -> Sequence[str]:
        """The columns that are read."""
        return list(dict.fromkeys([self.prompt, self.response]))

    @property
    def columns(self) -> Mapping[str, bool]:
        """The columns that come out."""
        return {PROMPT: False, COMPLETION: False} if self.split else {TEXT: False}

    def make(self, row: Row) -> Shaped:
        """Join them."""
        prompt, response = filled_text_of(row, self.prompt) + self.separator, filled_text_of(row, self.response)
        return {PROMPT: prompt, COMPLETION: response} if self.split else {TEXT: prompt + response}

    def notes(self) -> list[str]:
        """Nothing to say."""
        return []


@dataclass
class ConversationShape:
    """sft on conversations; split: the last message is the completion of all before it."""

    messages: str
    split: bool
    lost: LostKeys = field(default_factory=LostKeys)

    @property
    def wanted(self) -> Sequence[str]:
        """The columns that are read."""
        return [self.messages]

    @property
    def columns(self) -> Mapping[str, bool]:
        """The columns that come out."""
        return {PROMPT: True, COMPLETION: True} if self.split else {MESSAGES: True}

    def make(self, row: Row) -> Shaped:
        """Check the conversation."""
        messages = messages_of(cell_of(row, self.messages), self.messages, self.lost.keys)
        if not self.split:
            return {MESSAGES: messages}
        if len(messages) == 1 or messages[-1]["role"] != "assistant":
            raise BadRowError(
                f"{self.messages!r} does not end with an assistant's answer to something before it, "
                "which completion_only_loss needs"
            )
        return {PROMPT: messages[:-1], COMPLETION: messages[-1:]}

    def notes(self) -> list[str]:
        """Name what is left out."""
        return self.lost.notes()


def text_shape(data: TextData, rows: RawRows, *, split: bool) -> RowShape:
    """Choose how texts are read.

    Args:
        data: the section `data`.
        rows: where they come from.
        split: whether prompt and completion are wanted apart (`training.trl.completion_only_loss`).

    Raises:
        BadDataError: a column is missing.
        BadSpecError: prompt and completion are wanted, but there is one text only.
    """
    named = _text_columns(data, rows.columns)
    need_columns(
        data,
        rows,
        {
            "messages_column": named.messages,
            "text_field": named.text,
            "prompt_column": named.prompt,
            "response_column": named.response,
        },
    )
    if named.messages:
        return ConversationShape(named.messages, split)
    if named.prompt and named.response:
        return PairShape(named.prompt, named.response, named.separator, split)
    if split:
        raise BadSpecError(
            "training.trl.completion_only_loss is true, but the rows have one text each "
            f"({named.text!r} of {rows.name}); expected prompts with responses, or conversations",
            hint="Name data.prompt_column and data.response_column, or take completion_only_loss away.",
        )
    return TextShape(named.text or TEXT, skip_blank=data.rows == "dataset")


def need_columns(data: TrainingData, rows: RawRows, named: Mapping[str, str | None]) -> None:
    """Make sure that a data set has the columns; lines of a JSONL file are looked at one by one.

    Args:
        data: the section `data`.
        rows: where they come from.
        named: the column that each key of `data` names; None: not used.

    Raises:
        BadDataError: one is missing.
    """
    for key, column in named.items():
        if data.rows == "dataset" and column is not None and column not in rows.columns:
            raise BadDataError(
                f"spec.data.{key} wants the column {shown(column)}, but {rows.name} has the columns "
                f"{listed(rows.columns)}",
                hint=f"Set data.{key} to the name of an existing column with text.",
            )


def _text_columns(data: TextData, available: Sequence[str]) -> TextColumns:
    """Return either the messages' column, or those of prompt and response, or that of the text."""
    if data.rows == "inline":
        return _only(messages=MESSAGES) if data.messages else _only(text=TEXT)
    given = data.model_fields_set
    named = (
        data.jsonl_columns
        if data.rows == "jsonl"
        else TextColumns(
            text=data.text_field if "text_field" in given else None,
            prompt=data.prompt_column,
            response=data.response_column,
            messages=data.messages_column if "messages_column" in given else None,
            separator=data.separator,
        )
    )
    if named.messages:
        return _only(messages=named.messages)
    # In a JSONL file the text comes before prompt and response, in a data set behind them (WIRE 4.4).
    if named.prompt and named.response and not (named.text and data.rows == "jsonl"):
        return named._replace(text=None)
    text = named.text or named.prompt or named.response
    if text is None and data.messages_column in available:
        return _only(messages=data.messages_column)
    return _only(text=text or data.text_field)


def _only(*, text: str | None = None, messages: str | None = None) -> TextColumns:
    return TextColumns(text=text, prompt=None, response=None, messages=messages, separator="")

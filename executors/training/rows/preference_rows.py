"""What dpo and reward make of one row: the better and the worse answer to a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from executors.training.rows.raw_rows import CHOSEN, PROMPT, REJECTED, RawRows
from executors.training.rows.row_cells import (
    BadRowError,
    Message,
    Row,
    cell_of,
    filled_text_of,
    is_conversation,
    messages_of,
)
from executors.training.rows.row_shapes import LostKeys, Shaped, need_columns
from executors.training.spec.training_data_spec import PreferenceColumns, PreferenceData


@dataclass
class PreferenceShape:
    """A prompt with two answers, all of them texts or all of them conversations.

    Attributes:
        prompt: its column; None: there is none.
        chosen: column of the better answer.
        rejected: column of the worse answer.
        prompt_talks: whether prompts are lists of messages.
        answers_talk: whether answers are lists of messages.
        shared: whether, without a prompt, the messages that both answers begin with are the prompt.
        equal: in how many rows both answers are the same.
    """

    prompt: str | None
    chosen: str
    rejected: str
    prompt_talks: bool
    answers_talk: bool
    shared: bool
    equal: int = 0
    lost: LostKeys = field(default_factory=LostKeys)

    @property
    def wanted(self) -> Sequence[str]:
        """The columns that are read."""
        return list(dict.fromkeys([*([self.prompt] if self.prompt else []), self.chosen, self.rejected]))

    @property
    def columns(self) -> Mapping[str, bool]:
        """The columns that come out."""
        talks = self.prompt_talks or self.answers_talk
        names = [PROMPT, CHOSEN, REJECTED] if self.prompt or self.shared else [CHOSEN, REJECTED]
        return dict.fromkeys(names, talks)

    def make(self, row: Row) -> Shaped:
        """Check the row, and bring texts beside conversations into messages."""
        if self.prompt_talks or self.answers_talk:
            return self._conversations(row)
        prompt: Shaped = {PROMPT: filled_text_of(row, self.prompt)} if self.prompt else {}
        chosen, rejected = filled_text_of(row, self.chosen), filled_text_of(row, self.rejected)
        self.equal += chosen == rejected
        return {**prompt, CHOSEN: chosen, REJECTED: rejected}

    def notes(self) -> list[str]:
        """Say in how many rows there is nothing to learn, and name what is left out."""
        equal = (
            [f"in {self.equal} rows {self.chosen!r} and {self.rejected!r} are equal; nothing is learned from those"]
            if self.equal
            else []
        )
        return [*equal, *self.lost.notes()]

    def _conversations(self, row: Row) -> Shaped:
        chosen = self._messages(row, self.chosen, "assistant", talks=self.answers_talk)
        rejected = self._messages(row, self.rejected, "assistant", talks=self.answers_talk)
        for column, answer in ((self.chosen, chosen), (self.rejected, rejected)):
            if answer[-1]["role"] != "assistant" or not answer[-1]["content"].strip():
                raise BadRowError(f"{column!r} does not end with an assistant's message that has text")
        self.equal += chosen == rejected
        if self.prompt:
            prompt = self._messages(row, self.prompt, "user", talks=self.prompt_talks)
        elif self.shared:
            pairs = zip(chosen[:-1], rejected[:-1], strict=False)
            prompt = [message for message, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
            if not prompt:
                raise BadRowError(
                    f"{self.chosen!r} and {self.rejected!r} do not begin with the same message, and there is no prompt"
                )
        else:
            return {CHOSEN: chosen, REJECTED: rejected}
        return {PROMPT: prompt, CHOSEN: _behind(prompt, chosen), REJECTED: _behind(prompt, rejected)}

    def _messages(self, row: Row, column: str, role: str, *, talks: bool) -> list[Message]:
        if talks:
            return messages_of(cell_of(row, column), column, self.lost.keys)
        return [{"role": role, "content": filled_text_of(row, column)}]


def preference_shape(data: PreferenceData, rows: RawRows, first: int, *, needs_prompt: bool) -> PreferenceShape:
    """Choose how preferences are read.

    Args:
        data: the section `data`.
        rows: where they come from.
        first: position of a row whose kind, texts or conversations, all others must share.
        needs_prompt: whether there must be a prompt (dpo); conversations may begin with it.

    Raises:
        BadDataError: a column is missing.
    """
    named = _columns(data)
    need_columns(data, rows, {"chosen_column": named.chosen, "rejected_column": named.rejected})
    wanted = [name for name in named if name in rows.columns]
    _, row = next(iter(rows.read([first], wanted)))
    answers_talk = is_conversation(row.get(named.chosen))
    prompt: str | None = named.prompt
    if named.prompt not in rows.columns and not _names_prompt(data) and (answers_talk or not needs_prompt):
        prompt = None
    need_columns(data, rows, {"prompt_column": prompt})
    return PreferenceShape(
        prompt=prompt,
        chosen=named.chosen,
        rejected=named.rejected,
        prompt_talks=prompt is not None and is_conversation(row.get(prompt)),
        answers_talk=answers_talk,
        shared=prompt is None and needs_prompt,
    )


def _columns(data: PreferenceData) -> PreferenceColumns:
    if data.rows == "inline":
        return PreferenceColumns(PROMPT, CHOSEN, REJECTED)
    if data.rows == "jsonl":
        return data.jsonl_columns
    return PreferenceColumns(data.prompt_column, data.chosen_column, data.rejected_column)


def _names_prompt(data: PreferenceData) -> bool:
    """Whether the task itself says where the prompt stands."""
    inner = data.jsonl.prompt_field if data.jsonl else None
    return data.rows != "inline" and bool(
        {"prompt_column", "prompt_field"} & data.model_fields_set or inner is not None
    )


def _behind(prompt: list[Message], answer: list[Message]) -> list[Message]:
    """An answer without the prompt, where it repeats it."""
    length = len(prompt)
    return answer[length:] if len(answer) > length and answer[:length] == prompt else answer

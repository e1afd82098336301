"""Cells of training data as text and as conversations, whatever the file holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Final

from executors.secret_masking import shown

Message = dict[str, str]
Row = Mapping[str, object]

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
LONGEST_TEXT: Final = 64 * 2**20
"""Characters of one cell."""

_LONGEST_NAME = 60
_MOST_NAMES = 30


class BadRowError(Exception):
    """One row cannot be used; its text says why, and whoever reads the rows adds which row it is."""


def listed(names: Iterable[str]) -> str:
    """Names of columns for an error text: at most 30, strange ones quoted."""
    every = list(names)
    plain = [name if name.isprintable() and len(name) <= _LONGEST_NAME else shown(name) for name in every[:_MOST_NAMES]]
    more = f" and {len(every) - _MOST_NAMES} more" if len(every) > _MOST_NAMES else ""
    return ", ".join(plain) + more if plain else "none"


def kind_of(value: object) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, str):
        return "text"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, list | tuple):
        return "a list"
    return "an object" if isinstance(value, Mapping) else f"a value of type {type(value).__name__}"


def cell_of(row: Row, column: str) -> object:
    """One cell.

    Raises:
        BadRowError: the row does not have it, or it is null.
    """
    if column not in row:
        raise BadRowError(f"has no {shown(column)}; it has {listed(row)}")
    if row[column] is None:
        raise BadRowError(f"{shown(column)} is null; expected text (the row has {listed(row)})")
    return row[column]


def text_of(row: Row, column: str) -> str:
    """A cell as text; what is no string is printed. The text may be blank.

    Raises:
        BadRowError: the cell is missing or null, or is no text that can be stored.
    """
    cell = cell_of(row, column)
    if cell and is_conversation(cell):
        raise BadRowError(f"{shown(column)} is a list of messages; expected text")
    if isinstance(cell, bytes | bytearray):
        raise BadRowError(f"{shown(column)} is {len(cell)} bytes; expected text")
    return _storable(cell, column)


def filled_text_of(row: Row, column: str) -> str:
    """A cell as text that is not blank.

    Raises:
        BadRowError: as `text_of`, or the text is blank.
    """
    text = text_of(row, column)
    if not text.strip():
        raise BadRowError(f"{shown(column)} is blank; expected text (the row has {listed(row)})")
    return text


def plain_value(cell: object, column: str) -> str | None:
    """A cell that travels with a prompt: text as it is, anything else as JSON, null as null.

    Raises:
        BadRowError: it cannot be stored.
    """
    if cell is None or isinstance(cell, str):
        return cell if cell is None else _storable(cell, column)
    try:
        text = json.dumps(cell, ensure_ascii=False, default=str)
    except (RecursionError, ValueError, TypeError) as error:
        raise BadRowError(f"{shown(column)} cannot be written as JSON: {error}") from error
    return _storable(text, column)


def messages_of(cell: object, column: str, lost: set[str]) -> list[Message]:
    """A cell as a conversation: role and content of each message.

    Args:
        cell: the cell.
        column: its column, for the error text.
        lost: gets the names of further keys that messages have.

    Raises:
        BadRowError: it is no list of messages with known roles and text.
    """
    if not isinstance(cell, list | tuple):
        raise BadRowError(f"{shown(column)} is {kind_of(cell)}; expected a list of messages with role and content")
    if not cell:
        raise BadRowError(f"{shown(column)} has no messages; expected at least one with role and content")
    return [_message(each, f"message {number} of {shown(column)}", lost) for number, each in enumerate(cell)]


def is_conversation(cell: object) -> bool:
    """Whether a cell is meant as a list of messages."""
    return isinstance(cell, list | tuple) and all(isinstance(each, Mapping) for each in cell)


def _message(message: object, name: str, lost: set[str]) -> Message:
    if not isinstance(message, Mapping):
        raise BadRowError(f"{name} is {kind_of(message)}; expected an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role is None:
        raise BadRowError(f"{name} has no role; expected role and content, it has {listed(map(str, message))}")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRowError(f"{name} has the role {shown(str(role))}; expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise BadRowError(f"{name} has content that is {kind_of(content)}; expected text")
    lost.update(str(key) for key, value in message.items() if key not in {"role", "content"} and value is not None)
    return {"role": role, "content": _storable(content, "content")}


def _storable(cell: object, column: str) -> str:
    try:
        text = cell if isinstance(cell, str) else str(cell)
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(
            f"{shown(column)} holds half of a character (a lone surrogate) at position {error.start}; "
            "expected valid Unicode"
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deeply, a number with too many digits
        raise BadRowError(f"{shown(column)} cannot be printed as text: {error}") from error
    if len(text) > LONGEST_TEXT:
        raise BadRowError(f"{shown(column)} has {len(text)} characters; expected at most {LONGEST_TEXT}")
    return text

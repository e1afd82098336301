"""Rows of a JSONL file: read line by line, so that a file may be larger than memory."""

from __future__ import annotations

import codecs
import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Final

from executors.errors import BadDataError
from executors.secret_masking import shown
from executors.training.rows.row_cells import BadRowError, Row, kind_of
from executors.training.rows.row_problems import RowProblems

LONGEST_LINE: Final = 16 * 2**20
"""Bytes."""


class JsonlRows:
    """The lines of a file that are not blank, each an object.

    Attributes:
        name: what the file is called in error texts.
        columns: all keys of its lines, in the order of their first appearance.

    Args:
        path: the file; it must not change while it is in use.
        name: see above.
        limit: how many lines are wanted; None: all. Nothing behind them is read.

    Raises:
        BadDataError: it cannot be read, a line is too long, is no JSON or no object.
    """

    def __init__(self, path: Path, name: str, limit: int | None = None) -> None:
        self.name = name
        self._path = path
        self._offsets = array("Q")
        self._numbers = array("Q")
        columns: dict[str, None] = {}
        problems = RowProblems(name)
        with self._open() as file:
            for number, offset, line in _lines(file, name):
                try:
                    columns.update(dict.fromkeys(_parse(line)))
                except BadRowError as error:
                    problems.add(f"line {number}", error)
                self._offsets.append(offset)
                self._numbers.append(number)
                if len(self._offsets) == limit:
                    break
        problems.raise_if_any()
        self.columns: Sequence[str] = list(columns)

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, order: Sequence[int], wanted: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """Yield the rows at these positions, each with the number of its line, counted from 1."""
        del wanted
        with self._open() as file:
            for position in order:
                place = f"line {self._numbers[position]}"
                file.seek(self._offsets[position])
                try:
                    row = _parse(file.readline(LONGEST_LINE + 1))
                except BadRowError as error:
                    raise BadDataError(f"{self.name} has changed while it was read: {place} {error}") from error
                yield place, row

    def _open(self) -> IO[bytes]:
        try:
            return self._path.open("rb")
        except OSError as error:
            raise BadDataError(f"{self.name} cannot be read: {error.strerror or error}") from error


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[int, int, bytes]]:
    """Yield number, offset and bytes of each line that is not blank."""
    number = offset = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise BadDataError(
                f"{name}: line {number} is longer than {LONGEST_LINE} bytes; expected one JSON object on each line",
                hint="A file that is one JSON list is no JSONL; give it as a data set.",
            )
        mark = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
        if line[mark:].strip():
            yield number, offset + mark, line[mark:]
        offset += len(line)


def _parse(line: bytes) -> dict[str, object]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadRowError(f"is not UTF-8 (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise BadRowError(f"is not JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise BadRowError("is nested too deeply") from error
    except ValueError as error:  # a number with too many digits
        raise BadRowError(f"is not JSON that can be read: {error}") from error
    if not isinstance(row, dict):
        raise BadRowError(f"is {kind_of(row)}; expected an object")
    for key in row:
        if not _is_unicode(key):
            raise BadRowError(f"has the key {shown(key)} with half of a character; expected valid Unicode")
    return row


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

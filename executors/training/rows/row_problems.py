"""What is wrong with single rows: the first few problems together make one error."""

from __future__ import annotations

from typing import Final

from executors.errors import BadDataError
from executors.training.rows.row_cells import BadRowError

MOST_PROBLEMS: Final = 3


class RowProblems:
    """Gathers the problems of rows; the third ends the reading.

    Args:
        name: the rows' source, for the error text.
        hint: the next step for the sender.
    """

    def __init__(self, name: str, hint: str = "") -> None:
        self._name = name
        self._hint = hint
        self._found: list[str] = []

    def add(self, place: str, problem: BadRowError) -> None:
        """Note one problem.

        Raises:
            BadDataError: there are three now.
        """
        self._found.append(f"{place} {problem}")
        if len(self._found) == MOST_PROBLEMS:
            self.raise_if_any()

    def raise_if_any(self) -> None:
        """Raise what was found.

        Raises:
            BadDataError: there was a problem.
        """
        if self._found:
            raise BadDataError(f"{self._name}: {'; '.join(self._found)}", hint=self._hint)

"""One readable sentence out of a pydantic error: field, value, expectation."""

from __future__ import annotations

import re

from pydantic import ValidationError

_LONGEST_VALUE = 80
_MOST_PROBLEMS = 5
_SECRET = re.compile(r"header|auth|token(?!s|iz)|secret|passw|api_?key", re.IGNORECASE)
"""Places whose values may be secrets and are not repeated."""


def validation_text(error: ValidationError, root: str) -> str:
    """Say what is wrong.

    Args:
        error: what pydantic raised.
        root: the name of the validated thing, for instance `spec`.

    Returns:
        For instance `spec.inference.top_p is 'hot': input should be a valid number`; several are joined with `; `.
    """
    problems = error.errors(include_url=False, include_context=False)
    sentences = []
    for problem in problems[:_MOST_PROBLEMS]:
        place = root + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            sentences.append(f"{place} is missing")
        elif problem["type"] == "value_error":  # our own validators name field and value themselves
            sentences.append(message if message.startswith(root) else f"{place}: {message}")
        else:
            shown = "(hidden)" if _SECRET.search(place) else _shown(problem["input"])
            sentences.append(f"{place} is {shown}: {message[:1].lower()}{message[1:]}")
    if len(problems) > _MOST_PROBLEMS:
        sentences.append(f"and {len(problems) - _MOST_PROBLEMS} more")
    return "; ".join(sentences)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}… ({type(value).__name__})"

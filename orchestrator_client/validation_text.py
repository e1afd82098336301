"""One readable sentence out of a pydantic error: field, value, expectation."""

from __future__ import annotations

import re

from pydantic import ValidationError

from orchestrator_client.transfers.web_addresses import shown_url

_LONGEST_VALUE = 80
_LONGEST_KEY = 60
_MOST_PROBLEMS = 5
_MOST_PARTS = 8
_DEEPEST = 4
_SECRET = re.compile(
    r"header|auth(?!or\b)|cookie|token(?!s|iz)|secret|passw|passphrase|pwd|credential|bearer|signature|"
    r"(api|access|private)[-_ ]?key",
    re.IGNORECASE,
)
"""Places whose values may be secrets and are not repeated."""
_HIDDEN = "(hidden)"


def validation_text(error: ValidationError, root: str) -> str:
    """Say what is wrong.

    Args:
        error: what pydantic raised.
        root: the name of the validated thing, for instance `spec`.

    Returns:
        For instance `spec.inference.top_p is 'hot': input should be a valid number`; several are joined with `; `.
        Values are cut, and shown without what may be a secret.
    """
    problems = error.errors(include_url=False, include_context=False)
    sentences = []
    for problem in problems[:_MOST_PROBLEMS]:
        place = root + "".join(f"[{part}]" if isinstance(part, int) else f".{_key(part)}" for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            sentences.append(f"{place} is missing")
        elif problem["type"] == "value_error":  # our own validators name field and value themselves
            sentences.append(message if message.startswith(root) else f"{place}: {message}")
        else:
            shown = _HIDDEN if _SECRET.search(place) else _shown(problem["input"])
            sentences.append(f"{place} is {shown}: {message[:1].lower()}{message[1:]}")
    if len(problems) > _MOST_PROBLEMS:
        sentences.append(f"and {len(problems) - _MOST_PROBLEMS} more")
    return "; ".join(sentences)


def _shown(value: object) -> str:
    text = repr(_harmless(value, 0))
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}… ({type(value).__name__})"


def _harmless(value: object, depth: int) -> object:
    """A copy of the beginning of a value, without secrets."""
    if isinstance(value, str):
        return (shown_url(value) if "://" in value else value)[: _LONGEST_VALUE + 1]
    if not isinstance(value, dict | list | tuple):
        return value
    if depth == _DEEPEST:
        return "…"
    if isinstance(value, dict):
        pairs = list(value.items())[:_MOST_PARTS]
        return {_key(key): _HIDDEN if _SECRET.search(str(key)) else _harmless(part, depth + 1) for key, part in pairs}
    rest = ["…"] if len(value) > _MOST_PARTS else []
    return [*(_harmless(part, depth + 1) for part in value[:_MOST_PARTS]), *rest]


def _key(key: object) -> str:
    text = str(key)
    return (shown_url(text) if "://" in text else text)[:_LONGEST_KEY]

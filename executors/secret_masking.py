"""Cuts secrets out of what a spec holds, before it is shown in an error or given back in a result (WIRE 9.38)."""

from __future__ import annotations

import re

from pydantic import JsonValue

_MASK = "***"
_LONGEST_SHOWN = 200
_SECRET_KEY = re.compile(
    r"auth(?!ors?$)|cookie|token(?!s|i)|secret|passw|passphrase|^pass$|pwd$|credential|bearer|signature$|"
    r"(api|access|private)key"
)
"""In keys without case, dashes and underscores; `max_tokens`, `tokenizer` and `author` are none."""
_QUERY_KEY = re.compile(r"[\w.\[\]-]{1,60}")


def shown(value: str) -> str:
    """A value of a spec for an error text: quoted, at most 200 characters, without the secrets of a URL."""
    text = without_url_secrets(value)
    return repr(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…")


def without_url_secrets(text: str) -> str:
    """Mask the userinfo of a URL and the values of its query.

    Everything behind the first `://` counts as one URL, also where it is prose: too much is better masked than too
    little.
    """
    head, mark, rest = text.partition("://")
    if not mark:
        return text
    place, *pairs = re.split(r"[?#&]", rest)
    separators = re.findall(r"[?#&]", rest)
    userinfo = f"{_MASK}@" if "@" in place else ""
    shown_pairs = (separator + _shown_pair(pair) for separator, pair in zip(separators, pairs, strict=True))
    return f"{head}://{userinfo}{place.rpartition('@')[2]}{''.join(shown_pairs)}"


def without_secrets(value: JsonValue) -> JsonValue:
    """A copy with `***` for the value of each key that looks like a secret, and for all values of headers."""
    if isinstance(value, dict):
        return {without_url_secrets(key): _of_key(key, part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_secrets(part) for part in value]
    return without_url_secrets(value) if isinstance(value, str) else value


def _of_key(key: str, value: JsonValue) -> JsonValue:
    plain = re.sub(r"[\W_]", "", key).lower()
    if _SECRET_KEY.search(plain):
        return _MASK
    return _masked(value) if plain.endswith(("header", "headers")) else without_secrets(value)


def _masked(value: JsonValue) -> JsonValue:
    if isinstance(value, dict):
        return {key: _masked(part) for key, part in value.items()}
    return [_masked(part) for part in value] if isinstance(value, list) else _MASK


def _shown_pair(pair: str) -> str:
    name, equals, _ = pair.partition("=")
    return f"{name}={_MASK}" if equals and _QUERY_KEY.fullmatch(name) else _MASK

"""Refuses structured output that a compiler of grammars would crash on, or take for ever, or enforce only in part.

All engines compile with xgrammar, at least at first, so these limits hold for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final, NoReturn

from pydantic import JsonValue
from pydantic_core import PydanticCustomError

LONGEST_PATTERN: Final = 10_000
_DEEPEST_BRACKETS: Final = 200  # compilers of grammars go down by recursion
_HIGHEST_COUNT: Final = 100_000

_COUNT_IN_BRACES: Final = re.compile(r"\{\s*+(\d*+)\s*+(?:,\s*+(\d*+)\s*+)?\}")
_CLASS: Final = r"\\.|\[(?:\\.|[^\]\\])*(?:\]|\Z)"  # an escape, or a set of characters
_IN_PATTERN: Final = re.compile(rf"{_CLASS}|[()]", re.DOTALL)
_IN_GRAMMAR: Final = re.compile(rf'{_CLASS}|"(?:\\.|[^"\\])*(?:"|\Z)|[()]', re.DOTALL)
_COUNTS: Final = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
_NAMED_SCHEMAS: Final = frozenset({"properties", "patternProperties", "$defs", "definitions"})
"""Keys whose value maps names of the sender's choice to schemas."""
_PLAIN_VALUES: Final = frozenset({"enum", "const", "default", "examples", "required"})
"""Keys whose value is no schema."""

# What follows are gaps of xgrammar: keys that it passes over in silence, so that an output could break them.
_NEVER_ENFORCED: Final = frozenset(
    {
        "multipleOf", "uniqueItems", "contains", "minContains", "maxContains", "not", "if", "dependentRequired",
        "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef",
    }
)  # fmt: skip
_STRING_KEYS: Final = frozenset({"minLength", "maxLength", "pattern", "format"})
_NUMBER_KEYS: Final = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
_ARRAY_KEYS: Final = frozenset({"minItems", "maxItems"})
_OBJECT_KEYS: Final = frozenset({"required", "minProperties", "maxProperties", "patternProperties", "propertyNames"})
_TELL_ARRAY: Final = frozenset({"items", "prefixItems", "unevaluatedItems"})
_TELL_OBJECT: Final = frozenset({"properties", "additionalProperties", "unevaluatedProperties"})
_NEED_TYPE: Final = {
    **dict.fromkeys(_STRING_KEYS | _NUMBER_KEYS, frozenset({"type"})),
    **dict.fromkeys(_ARRAY_KEYS, frozenset({"type"}) | _TELL_ARRAY),
    **dict.fromkeys(_OBJECT_KEYS, frozenset({"type"}) | _TELL_OBJECT),
}
"""Keys that only count beside one of others."""
_WHOLE_SCHEMAS: Final = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
"""Keys beside which others do not count."""
_CONSTRAINTS: Final = frozenset({*_NEED_TYPE, *_TELL_ARRAY, *_TELL_OBJECT, *_WHOLE_SCHEMAS})
_KNOWN_FORMATS: Final = frozenset(
    {
        "date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "json-pointer", "relative-json-pointer",
        "time", "uri", "uri-reference", "uri-template", "uuid",
    }
)  # fmt: skip
"""Formats that are enforced; all others are mere remarks, as in JSON Schema."""
_INSTEAD: Final = "leave it out, and check it on the output"


def check_schema(schema: JsonValue) -> None:
    """Make sure that a JSON schema is within the limits, and would be enforced as a whole.

    Raises:
        PydanticCustomError: it is not; names the place.
    """
    for place, inner in _schemas(schema, ""):
        _check_limits(place, inner)
        _check_enforced(place, inner)


def check_pattern(pattern: str) -> str:
    """Return a regular expression within the limits.

    Raises:
        PydanticCustomError: too long, nested too deeply, or with too high a count.
    """
    if len(pattern) > LONGEST_PATTERN:
        _refuse(f"has {len(pattern)} characters; expected at most {LONGEST_PATTERN}")
    _check_text(pattern, _IN_PATTERN)
    return pattern


def check_grammar(grammar: str) -> str:
    """Return the text of a grammar within the limits.

    Raises:
        PydanticCustomError: nested too deeply, or with too high a count.
    """
    _check_text(grammar, _IN_GRAMMAR)
    return grammar


def _check_text(text: str, pieces: re.Pattern[str]) -> None:
    if "\0" in text:
        _refuse("holds a null character; expected text")
    depth = 0
    for piece in pieces.finditer(text):
        depth = max(0, depth + {"(": 1, ")": -1}.get(piece[0], 0))
        if depth > _DEEPEST_BRACKETS:
            _refuse(f"is nested too deeply; expected at most {_DEEPEST_BRACKETS} brackets in each other")
    for found in _COUNT_IN_BRACES.finditer(text):
        for number in filter(None, found.groups()):
            if len(number) > len(str(_HIGHEST_COUNT)) or int(number) > _HIGHEST_COUNT:
                _refuse(f"repeats {found[0][:50]} times; expected at most {_HIGHEST_COUNT}")


def _check_limits(place: str, schema: Mapping[str, JsonValue]) -> None:
    """Counts, references and patterns of one schema."""
    for key, value in schema.items():
        if key == "$ref" and not (isinstance(value, str) and (value == "#" or value.startswith("#/"))):
            _refuse(f"has {value!r:.100} as {place}$ref; expected a place in this schema, such as '#/$defs/x'")
        if key in _COUNTS and isinstance(value, int | float) and value > _HIGHEST_COUNT:
            _refuse(f"has {value} as {place}{key}; expected at most {_HIGHEST_COUNT}")
    patterns = schema.get("patternProperties")
    for pattern in (schema.get("pattern"), *(patterns if isinstance(patterns, dict) else ())):
        if isinstance(pattern, str):
            try:
                check_pattern(pattern)
            except PydanticCustomError as error:
                _refuse(f"has a pattern in {place or 'itself'} that {error.message()}")


def _check_enforced(place: str, schema: Mapping[str, JsonValue]) -> None:
    """Refuse what an output could break without a word."""
    where = f" in {place.removesuffix('.')}" if place else ""
    for key, value in schema.items():
        if key in _NEVER_ENFORCED and value is not False:
            _refuse(f"has {key!r}{where}, which cannot be enforced while a text is generated; {_INSTEAD}")
        if key in _NEED_TYPE and _NEED_TYPE[key].isdisjoint(schema) and not schema.keys() & set(_WHOLE_SCHEMAS):
            _refuse(f"has {key!r}{where} without a 'type', so that it would not count; expected the type it is for")
    several = schema.get("allOf")
    if isinstance(several, list) and len(several) > 1:
        _refuse(f"has 'allOf' with {len(several)} schemas{where}, which cannot be enforced; write them as one schema")
    for one, other in _unenforced_pairs(schema):
        _refuse(f"has {other!r} beside {one!r}{where}, which cannot be enforced together; {_INSTEAD}")
    named, properties = schema.get("required"), schema.get("properties")
    for name in named if isinstance(named, list) else ():
        if name not in (properties if isinstance(properties, dict) else {}):
            _refuse(f"requires {name!r:.100}{where}, which is none of its 'properties'; expected a schema for it there")
    patterns = schema.get("patternProperties")
    if isinstance(patterns, dict) and len(patterns) > 1:
        _refuse(f"has 'patternProperties' with {len(patterns)} patterns{where}, which cannot be enforced; expected one")


def _unenforced_pairs(schema: Mapping[str, JsonValue]) -> Iterator[tuple[str, str]]:
    """Keys of which the second does not count beside the first."""
    for whole in _WHOLE_SCHEMAS:
        if whole in schema:
            yield from ((whole, key) for key in sorted(schema.keys() & _CONSTRAINTS - {whole}))
    patterned = [key for key in ("pattern", "format") if key in schema]
    if schema.get("format") not in _KNOWN_FORMATS:
        patterned = [key for key in patterned if key != "format"]
    for key in patterned:
        yield from ((key, bound) for bound in ("minLength", "maxLength") if bound in schema)
    if len(patterned) > 1:
        yield "format", "pattern"
    if "propertyNames" in schema:
        yield from ((key, "propertyNames") for key in ("properties", "patternProperties") if key in schema)
    if "properties" in schema and "patternProperties" in schema:
        yield "properties", "patternProperties"


def _schemas(schema: JsonValue, place: str) -> Iterator[tuple[str, dict[str, JsonValue]]]:
    """All schemas within one, itself included, each after its place: empty, or ending in a dot."""
    if isinstance(schema, list):
        for index, item in enumerate(schema):
            yield from _schemas(item, f"{place.removesuffix('.')}[{index}].")
    if not isinstance(schema, dict):
        return
    yield place, schema
    for key, value in schema.items():
        if key in _NAMED_SCHEMAS and isinstance(value, dict):
            for name, named in value.items():
                yield from _schemas(named, f"{place}{key}.{name[:100]}.")
        elif key not in _PLAIN_VALUES:
            yield from _schemas(value, f"{place}{key}.")


def _refuse(problem: str) -> NoReturn:
    raise PydanticCustomError("guided_limits", "{problem}", {"problem": problem})

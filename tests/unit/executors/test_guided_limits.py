"""What structured output a spec may ask for. Compiling it is in tests/with_model."""

import time

import pytest
from pydantic import ValidationError

from executors.inference.sampling_spec import GuidedOutput


def check(**given: object) -> GuidedOutput:
    return GuidedOutput.model_validate(given)


def problem_of(**given: object) -> str:
    with pytest.raises(ValidationError) as caught:
        check(**given)
    (error,) = caught.value.errors()
    assert error["loc"] == tuple(given)
    return error["msg"]


def nested(levels: int) -> str:
    return "(" * levels + "a" + ")" * levels


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"next": {"$ref": "#"}, "name": {"type": "string", "maxLength": 100_000}}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "string", "pattern": "[a-z]{1,500}"}}},
        {"allOf": [{"type": "string"}], "default": {"not": 1}},
        {"enum": [{"$ref": "http://x"}], "type": "object", "description": "any"},
        {"type": "object", "properties": {"not": {"type": "string"}, "$ref": {"type": "string"}}},
        {"type": "string", "format": "unheard-of", "maxLength": 5},
        {"type": "string", "contentEncoding": "base64"},
        {"type": ["integer", "null"], "minimum": 5, "uniqueItems": False},
        {"properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False},
        {"items": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "minItems": 2},
        {"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": False},
    ],
    ids=str,
)
def test_ordinary_schemas_pass(schema: dict[str, object]):
    assert check(json=schema).json_schema == schema


def test_ordinary_expressions_and_grammars_pass():
    assert check(regex="a{2}b{1,}c{,100}{x}[(][)]").regex
    assert check(choice=["a", "{999999999}"]).choice
    assert check(regex=nested(200)).regex
    assert check(regex="[(]" * 300).regex
    assert check(grammar='root ::= "(" root | ' + " | ".join(['"("'] * 300)).grammar


@pytest.mark.parametrize("reference", ["http://h/s.json", "other.json#/a", "#anchor", "file:///etc/passwd", 3])
def test_a_reference_to_elsewhere_is_refused(reference: object):
    schema = {"type": "array", "items": {"anyOf": [{"$ref": reference}]}}
    assert f"has {reference!r} as items.anyOf[0].$ref; expected a place in this schema" in problem_of(json=schema)


@pytest.mark.parametrize("key", ["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"])
def test_counts_are_limited(key: str):
    schema = {"properties": {"a": {key: 100_001}}}
    assert f"has 100001 as properties.a.{key}; expected at most 100000" in problem_of(json=schema)


@pytest.mark.parametrize("braces", ["{100001}", "{1,100001}", "{ 5 , 999999999999999999999 }"])
def test_repetitions_are_limited(braces: str):
    assert problem_of(regex=f"a{braces}").startswith("repeats {")
    assert problem_of(grammar=f'root ::= "a"{braces}').startswith("repeats {")
    assert "a pattern in itself that repeats" in problem_of(json={"type": "string", "pattern": f"a{braces}"})


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        (nested(201), "is nested too deeply; expected at most 200 brackets"),
        ("([)]" * 201 + "a" + ")" * 201, "is nested too deeply"),
        (r"(\)" * 201 + "a" + ")" * 201, "is nested too deeply"),
        (nested(200_000), "has 400001 characters; expected at most 10000"),
        ("a" + "*" * 10_000, "has 10001 characters; expected at most 10000"),
        ("a\0b", "holds a null character"),
    ],
    ids=["nested", "with sets", "with escapes", "nested and long", "long", "null"],
)
@pytest.mark.parametrize("place", ["pattern", "patternProperties", "propertyNames", "regex"])
def test_patterns_are_limited(place: str, pattern: str, told: str):
    """A compiler that goes down by recursion ends the whole process when its stack is full."""
    schemas: dict[str, dict[str, object]] = {
        "pattern": {"type": "string", "pattern": pattern},
        "patternProperties": {"type": "object", "patternProperties": {pattern: {"type": "integer"}}},
        "propertyNames": {"type": "object", "propertyNames": {"type": "string", "pattern": pattern}},
    }
    if place == "regex":
        assert problem_of(regex=pattern).startswith(told)
    else:
        assert told in problem_of(json={"type": "array", "items": schemas[place]})


def test_the_brackets_of_a_grammar_are_limited():
    for text in (f"root ::= {nested(201)}", "root ::= " + '(")"' * 201 + ")" * 201):
        assert problem_of(grammar=text).startswith("is nested too deeply")


@pytest.mark.parametrize("text", ["{" + " " * 500_000, "[" * 500_000, '"' * 500_000, "\\[" * 250_000, "{1" * 250_000])
def test_looking_takes_little_time(text: str):
    begun = time.process_time()
    assert check(grammar=text).grammar == text
    assert time.process_time() - begun < 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("multipleOf", 3),
        ("uniqueItems", True),
        ("contains", {"type": "integer"}),
        ("not", {"const": 1}),
        ("if", {"type": "string"}),
        ("dependentRequired", {"a": ["b"]}),
        ("$dynamicRef", "#a"),
        ("allOf", [{"type": "string"}, {"enum": ["a"]}]),
    ],
)
def test_what_is_never_enforced_is_refused(key: str, value: object):
    message = problem_of(json={"properties": {"a": {key: value}}})
    assert message.startswith(f"has {key!r}")
    assert "in properties.a, which cannot be enforced" in message


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"type": "string", "pattern": "^a+$", "maxLength": 2}, "'maxLength' beside 'pattern'"),
        ({"type": "string", "format": "email", "minLength": 20}, "'minLength' beside 'format'"),
        ({"type": "string", "format": "date", "pattern": "^a$"}, "'pattern' beside 'format'"),
        ({"$ref": "#/$defs/a", "maxLength": 1, "$defs": {"a": {"type": "string"}}}, "'maxLength' beside '$ref'"),
        ({"properties": {"a": {}}, "anyOf": [{"required": ["a"]}]}, "'properties' beside 'anyOf'"),
        ({"enum": ["a", "bb"], "maxLength": 1}, "'maxLength' beside 'enum'"),
        (
            {"type": "object", "properties": {"b": {}}, "propertyNames": {"type": "string", "pattern": "^a$"}},
            "'propertyNames' beside 'properties'",
        ),
        ({"properties": {"a": {}}, "patternProperties": {"a": {}}}, "'patternProperties' beside 'properties'"),
        ({"type": "object", "patternProperties": {"a": {}, "b": {}}}, "'patternProperties' with 2 patterns"),
        ({"minimum": 5}, "'minimum' without a 'type'"),
        ({"pattern": "^a$"}, "'pattern' without a 'type'"),
        ({"maxItems": 2}, "'maxItems' without a 'type'"),
        ({"required": ["a"]}, "'required' without a 'type'"),
        ({"type": "object", "required": ["z"], "properties": {"a": {}}}, "requires 'z', which is none of its"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_would_be_passed_over_in_silence_is_refused(schema: dict[str, object], told: str):
    assert told in problem_of(json=schema)

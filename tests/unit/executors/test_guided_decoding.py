"""What is refused before a grammar is compiled. The compiling itself is in tests/with_model."""

import pytest

from executors.errors import BadSpecError
from executors.guided_decoding import check_guided
from executors.sampling_spec import GuidedOutput


def check(**given: object) -> None:
    check_guided(GuidedOutput.model_validate(given))


def problem_of(**given: object) -> str:
    with pytest.raises(BadSpecError) as caught:
        check(**given)
    return caught.value.message


def test_ordinary_schemas_pass():
    node = {"type": "object", "properties": {"next": {"$ref": "#"}, "name": {"type": "string", "maxLength": 100_000}}}
    check(json=node)
    check(json={"$ref": "#/$defs/a", "$defs": {"a": {"type": "string", "pattern": "[a-z]{1,500}"}}})
    check(json={"allOf": [{"type": "string"}], "default": {"not": 1}, "enum": [{"$ref": "http://x"}]})
    check(regex="a{2}b{1,}c{,100}{x}")
    check(choice=["a", "{999999999}"])


def test_a_property_may_be_called_like_a_keyword():
    check(json={"type": "object", "properties": {"not": {"type": "string"}, "$ref": {"type": "string"}}})


@pytest.mark.parametrize("reference", ["http://h/s.json", "other.json#/a", "#anchor", "file:///etc/passwd", 3])
def test_a_reference_to_elsewhere_is_refused(reference: object):
    schema = {"type": "array", "items": [{"anyOf": [{"$ref": reference}]}]}
    assert problem_of(json=schema).startswith("spec.inference.guided.json.items[0].anyOf[0].$ref is ")


@pytest.mark.parametrize("key", ["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"])
def test_counts_are_limited(key: str):
    schema = {"properties": {"a": {key: 100_001}}}
    assert f"json.properties.a.{key} is 100001; expected at most 100000" in problem_of(json=schema)


@pytest.mark.parametrize("braces", ["{100001}", "{1,100001}", "{ 5 , 999999999999999999999 }"])
def test_repetitions_are_limited(braces: str):
    assert problem_of(regex=f"a{braces}").startswith("spec.inference.guided.regex repeats {")
    assert problem_of(grammar=f'root ::= "a"{braces}').startswith("spec.inference.guided.grammar repeats {")
    assert "json.pattern repeats" in problem_of(json={"type": "string", "pattern": f"a{braces}"})


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
def test_what_would_not_be_enforced_is_refused(key: str, value: object):
    message = problem_of(json={"properties": {"a": {key: value}}})
    assert message.startswith(f"spec.inference.guided.json.properties.a has {key!r}")
    assert "cannot be enforced" in message


def test_a_null_character_is_refused():
    assert "holds a null character" in problem_of(regex="a\0b")

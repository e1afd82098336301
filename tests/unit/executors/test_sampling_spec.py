import json
from typing import Any

import pytest
from pydantic import ValidationError

from executors.inference.sampling_spec import GuidedOutput, InferenceOptions
from executors.task_spec import TaskSpec, unknown_keys

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


class InferenceSpecLike(TaskSpec):
    inference: InferenceOptions


def options(**given: object) -> InferenceOptions:
    return InferenceOptions.model_validate(given)


def errors_of(**given: object) -> dict[tuple[int | str, ...], str]:
    with pytest.raises(ValidationError) as caught:
        InferenceOptions.model_validate(given)
    return {error["loc"]: error["msg"] for error in caught.value.errors()}


def guided_of(found: InferenceOptions) -> GuidedOutput:
    assert found.guided is not None
    return found.guided


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels - 1):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("given", "expected"), [(None, None), (False, None), (True, 0), (0, 0), (5, 5), (20, 20)], ids=str
)
def test_logprobs_is_a_number_or_a_switch(given: object, expected: int | None):
    assert options(logprobs=given).logprobs == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"n": 65},
        {"n": 1.5},
        {"logprobs": -1},
        {"logprobs": 21},
        {"logprobs": "many"},
        {"repetition_penalty": 1e-30},
        {"repetition_penalty": 1e30},
    ],
    ids=str,
)
def test_numbers_out_of_range_are_named(wrong: dict[str, object]):
    assert list(errors_of(**wrong)) == [tuple(wrong)]


@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"temperature": 9e-6}, {"do_sample": False}], ids=str)
def test_several_outputs_need_sampling(greedy: dict[str, object]):
    assert "'n' is 3" in errors_of(n=3, **greedy)[()]
    assert options(n=1, **greedy).greedy
    assert options(n=3, temperature=1e-5).n == 3


@pytest.mark.parametrize("name", ["json", "json_schema", "schema"])
@pytest.mark.parametrize("section", ["guided", "structured_outputs"])
def test_a_schema_under_each_of_its_names_as_object_or_text(section: str, name: str):
    for schema in (SCHEMA, json.dumps(SCHEMA)):
        found = guided_of(options(**{section: {name: schema}}))
        assert found.json_schema == SCHEMA
        assert found.field == "spec.inference.guided.json"
        assert unknown_keys(InferenceSpecLike.model_validate({"inference": {section: {name: schema}}})) == []


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"json_object": True}, "json_object"),
        ({"regex": "a+"}, "regex"),
        ({"choice": ["a", "b"]}, "choice"),
        ({"grammar": 'root ::= "a"'}, "grammar"),
        ({"regex": "a+", "json": None, "json_object": False}, "regex"),
    ],
    ids=str,
)
def test_each_kind_knows_its_name(given: dict[str, object], field: str):
    assert guided_of(options(guided=given)).field == f"spec.inference.guided.{field}"


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({}, "gives none; expected exactly one"),
        ({"json_object": False}, "gives none"),
        ({"regex": "a", "choice": ["a"]}, "gives regex and choice"),
    ],
    ids=str,
)
def test_exactly_one_kind_is_given(given: dict[str, object], part: str):
    assert part in errors_of(guided=given)["guided",]


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"json": "{"}, "text that is no JSON"),
        ({"json": "[1]"}, "expected a JSON schema: an object"),
        ({"json": True}, "expected a JSON schema: an object"),
        ({"json": {"description": "x" * 1024**2}}, "longer than 1 MiB"),
        ({"regex": ""}, "at least 1 character"),
        ({"choice": []}, "at least 1 item"),
        ({"choice": ["a", ""]}, "at least 1 character"),
        ({"choice": ["a"] * 10_001}, "at most 10000 items"),
        ({"grammar": "x" * (1024**2 + 1)}, "at most 1048576 characters"),
        ({"regex": "x" * 10_001}, "has 10001 characters; expected at most 10000"),
        ({"json": {"type": "integer", "not": {"const": 5}}}, "has 'not', which cannot be enforced"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_a_grammar_is_refused(given: dict[str, object], part: str):
    (message,) = errors_of(guided=given).values()
    assert part in message


def test_the_depth_of_a_schema_is_limited():
    assert guided_of(options(guided={"json": nested(64)})).json_schema == nested(64)
    for deeper in (nested(65), nested(900), json.dumps(nested(65)), "[" * 500_000):
        errors = errors_of(guided={"json": deeper})
        assert list(errors) == [("guided", "json")]
        assert "nested too deeply; expected at most 64 levels" in errors["guided", "json"]


def test_openais_response_format():
    assert options(response_format={"type": "text"}).guided is None
    assert guided_of(options(response_format={"type": "json_object"})).json_object
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    assert guided_of(options(response_format=wrapped)).json_schema == SCHEMA
    assert guided_of(options(response_format=None, guided={"regex": "a"})).regex == "a"


@pytest.mark.parametrize("wrong", [{"type": "xml"}, {"type": "json_schema"}, "json_object", {}], ids=str)
def test_another_response_format_is_refused(wrong: object):
    assert "is not understood" in errors_of(response_format=wrong)[()]


def test_two_ways_to_guide_are_refused():
    for name in ("guided", "structured_outputs"):
        given = {"response_format": {"type": "json_object"}, name: {"regex": "a"}}
        assert "beside 'guided'" in errors_of(**given)[()]


def test_an_unknown_key_beside_the_grammar_is_warned_about():
    spec = InferenceSpecLike.model_validate({"inference": {"guided": {"regex": "a", "whitespace": 1}}})
    assert unknown_keys(spec) == ["unknown key 'spec.inference.guided.whitespace' is ignored"]

"""Decoding what comes in: tolerant of what does not matter, exact about what does."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from orchestrator_client.errors import EnvelopeError
from orchestrator_client.messages import TaskEnvelope, TaskEvent, decode_envelope, decode_head, safe_task_id
from orchestrator_client.validation_text import validation_text


def envelope(**changes: object) -> bytes:
    whole = {"task_id": "t1", "task": {"spec": {"taskType": "echo"}}, "assigned_worker": "w1", **changes}
    return json.dumps(whole).encode()


def decode(raw: bytes) -> TaskEnvelope:
    return decode_envelope(raw, decode_head(raw))


def test_unknown_keys_are_tolerated():
    assert decode(envelope(surprise=1, shard_index=0)).task_id == "t1"


@pytest.mark.parametrize("name", ["merged_children", "merge_children"])
def test_merged_children_have_two_spellings(name: str):
    children = [{"task_id": "c1", "spec": {"taskType": "echo"}, "metadata": {"x": 1}}]

    assert [child.task_id for child in decode(envelope(**{name: children})).merged_children] == ["c1"]


@pytest.mark.parametrize(
    ("spec", "task_type", "kind"),
    [
        ({"taskType": " ECHO "}, None, "echo"),
        ({}, "Inference", "inference"),
        ({}, None, ""),
        ({"taskType": 5}, None, "5"),
    ],
)
def test_the_kind_comes_from_the_spec_else_from_the_envelope(spec: dict[str, object], task_type: str | None, kind: str):
    assert decode(envelope(task={"spec": spec}, task_type=task_type)).kind == kind


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task_id": "../x"}, "envelope.task_id is '../x'"),
        ({"task": None}, "envelope.task"),
        ({"task": {"spec": [1]}}, "envelope.task.spec is [1]"),
        ({"task": {}}, "envelope.task.spec is missing"),
        ({"merged_children": [{"task_id": "a/b"}]}, "envelope.merged_children[0].task_id is 'a/b'"),
        ({"task": {"spec": {"a": [1, {"b": float("nan")}]}}}, "task.spec.a[1].b is NaN"),
        ({"task": {"spec": {"a": float("inf")}}}, "task.spec.a is NaN or infinite"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(changes: dict[str, object], words: str):
    with pytest.raises(EnvelopeError) as caught:
        decode(envelope(**changes))

    assert words in str(caught.value)
    assert caught.value.task_id == changes.get("task_id", "t1")
    assert caught.value.assigned_worker == "w1"


@pytest.mark.parametrize(("raw", "words"), [(b"nonsense", "not JSON"), (b"[1]", "no object"), (b"", "not JSON")])
def test_what_is_no_object_is_told_from_what_is_no_json(raw: bytes, words: str):
    with pytest.raises(EnvelopeError, match=words):
        decode_head(raw)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_head_or_an_envelope_error(raw: bytes):
    try:
        head = decode_head(raw)
    except EnvelopeError:
        return
    assert isinstance(json.loads(raw), dict)
    assert set(type(head).model_fields) == {"task_id", "assigned_worker"}


@given(st.text(max_size=300))
def test_a_safe_id_is_one_plain_path_component(task_id: str):
    if safe_task_id(task_id):
        assert task_id.isascii()
        assert not task_id.startswith(".")
        assert not set(task_id) & set("/\\\0\n :")
        assert len(task_id) <= 200


def test_an_event_is_one_json_object_with_the_types_the_orchestrator_demands():
    sent = json.loads(TaskEvent(type="TASK_FAILED", task_id="t1", worker_id="w1", error="x").encode())

    assert isinstance(sent["ts"], str)
    assert sent["payload"] == {}
    assert sent["status"] is None


def test_an_id_cannot_be_the_name_of_another_tasks_claim():
    assert safe_task_id("t1")
    assert not safe_task_id("t1:claim")


class Login(BaseModel):
    headers: dict[str, str]
    api_key: int
    size: int


def test_what_may_be_a_secret_is_not_repeated():
    with pytest.raises(ValidationError) as caught:
        Login.model_validate({"headers": "Bearer sk-1", "api_key": "sk-2", "size": "big"})

    text = validation_text(caught.value, "spec")

    assert "sk-" not in text
    assert "spec.headers is (hidden)" in text
    assert "spec.size is 'big'" in text


class Place(BaseModel):
    url: str
    values: dict[str, int] = {}


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"url": ["http://u:hunter2@h/x"]}, "spec.url is ['http://h/x']"),
        ({"url": {"a": [{"b": "see http://h/x?sig=hunter2"}]}}, "see http://h/x?sig=***"),
        ({"url": {"Authorization": "hunter2", "X-Api-Key": ["hunter2"], "Cookie": 7}}, "'Authorization': '(hidden)'"),
        ({"url": [[[[["hunter2"]]]]]}, "spec.url is [[[['…']]]]"),
        ({"url": list(range(1000))}, "6, 7, '…']"),
        ({"url": ["x" * 10**6]}, "x… (list)"),
        ({"url": "x", "values": {"http://u:hunter2@h": "a"}}, "spec.values.http://h is 'a'"),
        ({"url": "x", "values": {"access-key": "hunter2"}}, "spec.values.access-key is (hidden)"),
        ({"url": "x", "values": {"k" * 10**6: "a"}}, "kkk is 'a'"),
        ({"url": "x", "values": "http://u:hunter2@h"}, "spec.values is 'http://h'"),
    ],
)
def test_a_wrong_value_is_short_and_holds_no_secret(given: dict[str, object], shown: str):
    with pytest.raises(ValidationError) as caught:
        Place.model_validate(given)

    text = validation_text(caught.value, "spec")

    assert shown in text
    assert "hunter2" not in text
    assert len(text) < 300

"""The sections of a spec that name something elsewhere (WIRE 4.3, 4.4, 4.9)."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from executors.input_spec import AdapterEntry, CheckpointLoad, InputRequest, JsonlSource
from executors.task_spec import TaskSpec, unknown_keys
from orchestrator_client.messages import TASK_ID_PATTERN
from orchestrator_client.validation_text import validation_text

DIGEST = "0123456789abcdef" * 4


class Spec(TaskSpec):
    """Holds one of each."""

    load: CheckpointLoad | None = None
    adapter: AdapterEntry | None = None
    jsonl: JsonlSource | None = None


def checkpoint(**keys: object) -> InputRequest:
    return CheckpointLoad.model_validate(keys).request("checkpoint.load")


def jsonl(**keys: object) -> InputRequest:
    return JsonlSource.model_validate(keys).request("data.jsonl")


def error_text(section: type[BaseModel], keys: object) -> str:
    with pytest.raises(ValidationError) as caught:
        section.model_validate(keys)
    return validation_text(caught.value, "spec.x")


def test_everything_of_a_checkpoint_reaches_the_request():
    request = checkpoint(
        type="HTTP",
        path="/data/w/77aa/final_lora",
        taskId="77aa",
        url="https://orch.example/a.tar.gz?x=1",
        filename="a.tar.gz",
        base_url="https://orch.example",
        headers={"X-Key": "secret"},
        timeoutSec=5,
        archive_format="TAR.GZ",
        subdir="inner/model",
        sha256=f"sha256:{DIGEST.upper()}",
    )
    assert request == InputRequest(
        name="checkpoint.load",
        kind="checkpoint",
        paths=("/data/w/77aa/final_lora",),
        task_id="77aa",
        url="https://orch.example/a.tar.gz?x=1",
        filename="a.tar.gz",
        base_url="https://orch.example",
        headers={"X-Key": "secret"},
        timeout_sec=5,
        archive_format="tar.gz",
        subdir="inner/model",
        sha256=DIGEST,
    )


def test_null_and_blank_count_as_absent():
    request = checkpoint(path=None, taskId=None, task_id="77aa", url="  ", headers=None, archive_format=None, sha256="")
    assert request == InputRequest(name="checkpoint.load", kind="checkpoint", task_id="77aa")


def test_uri_is_another_word_for_path():
    assert checkpoint(type="local", uri="/data/model").paths == ("/data/model",)
    assert checkpoint(path="/data/a", uri="/data/b").paths == ("/data/a", "/data/b")


def test_an_address_in_place_of_a_path_is_a_url():
    assert checkpoint(path="http://h/a") == InputRequest(name="checkpoint.load", kind="checkpoint", url="http://h/a")
    assert checkpoint(path="http://h/a", url="http://h/b").url == "http://h/b"


@pytest.mark.parametrize("section", [CheckpointLoad, AdapterEntry, JsonlSource])
@pytest.mark.parametrize("keys", [{}, {"url": None, "path": ""}, {"type": "lora"}, {"headers": {"X-Key": "secret-1"}}])
def test_nothing_given_is_an_error_that_names_the_keys(section: type[BaseModel], keys: dict[str, object]):
    if section is CheckpointLoad:
        keys = {key: value for key, value in keys.items() if key != "type"}
    text = error_text(section, keys)
    assert text.startswith("spec.x: names no")
    assert "path" in text
    assert "url" in text
    assert "secret-1" not in text


def test_a_plain_string_is_an_error_without_its_text():
    text = error_text(CheckpointLoad, "http://user:secret-1@host/x")
    assert text == "spec.x: expected an object, for instance with path, taskId or url"


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("filename", "../x", "no file name"),
        ("filename", "a/b", "no file name"),
        ("filename", "a\\b", "no file name"),
        ("filename", "..", "no file name"),
        ("filename", "a\nb", "control character"),
        ("filename", "a\x00", "control character"),
        ("filename", "x" * 201, "no file name"),
        ("taskId", "../77aa", "no task id"),
        ("taskId", ".worker", "no task id"),
        ("task_id", "a/b", "no task id"),
        ("taskId", "a\n", "no task id"),
        ("subdir", "../x", "leaves the archive"),
        ("subdir", "/etc", "leaves the archive"),
        ("subdir", "a\\..\\b", "leaves the archive"),
        ("path", "/a\x00b", "control character"),
        ("url", "http://h/a\r\nX: y", "control character"),
        ("sha256", "abc", "64 hex digits"),
        ("archive_format", "rar", "input should be"),
        ("timeoutSec", 0, "greater than 0"),
        ("type", "ftp", "input should be"),
        ("headers", {"X-Key": 5}, "(hidden)"),
    ],
)
def test_hostile_and_wrong_values_are_refused(key: str, value: object, part: str):
    text = error_text(CheckpointLoad, {"path": "/x", key: value})
    assert part in text
    assert f"spec.x.{'taskId' if key == 'task_id' else key}" in text


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "a\tb"])
def test_an_adapters_name_is_safe(name: str):
    for key in ("name", "id", "adapter_id"):
        assert "spec.x.name" in error_text(AdapterEntry, {"path": "/x", key: name})


def test_the_secret_of_a_bad_url_is_not_repeated():
    text = error_text(CheckpointLoad, {"url": "http://user:secret-1@h/\x01"})
    assert "secret-1" not in text
    assert "spec.x.url" in text


def test_the_task_ids_rule_is_that_of_the_wire():
    assert error_text(CheckpointLoad, {"taskId": "a" * 201})
    assert checkpoint(taskId="A_9.-@=+" + "a" * 192).task_id
    assert TASK_ID_PATTERN == r"^[A-Za-z0-9_][A-Za-z0-9._@=+-]{0,199}$"


def test_an_adapter():
    entry = AdapterEntry.model_validate({"type": "LoRA", "id": 3, "taskId": "77aa", "scale": 0.5, "apply": "Merge"})
    assert (entry.name, entry.scale, entry.apply) == ("3", 0.5, "merge")
    assert entry.request("model.adapters[0]") == InputRequest(name="model.adapters[0]", kind="adapter", task_id="77aa")
    assert AdapterEntry.model_validate({"name": "a", "adapter_id": "b", "path": "/x"}).name == "a"


def test_an_adapter_of_another_type_needs_nothing():
    assert AdapterEntry.model_validate({"type": "ia3"}).type == "ia3"


def test_jsonl_takes_paths_before_urls_and_the_first_url():
    request = jsonl(path="out/x.jsonl", worker_path="/data/x.jsonl", url="http://h/b", download_url="http://h/a")
    assert (request.paths, request.url) == (("out/x.jsonl", "/data/x.jsonl"), "http://h/a")
    assert (request.kind, request.archive_format) == ("file", "none")


def test_what_an_orchestrator_makes_of_a_jsonl_export():
    """It rewrites `path` to its own disk and `url` to a relative one (WIRE 6)."""
    request = jsonl(
        path="http://h/files/x.jsonl", worker_path="/data/x.jsonl", url="/api/v1/results/77aa/files/x.jsonl"
    )
    assert (request.paths, request.url) == (("/data/x.jsonl",), "/api/v1/results/77aa/files/x.jsonl")


@pytest.mark.parametrize(
    ("keys", "seconds"),
    [
        ({"download_timeoutSec": 1, "timeoutSec": 2, "timeout": 3}, 1),
        ({"timeoutSec": 2, "timeout": 3}, 2),
        ({"timeout": 3}, 3),
        ({}, None),
    ],
)
def test_names_of_the_jsonl_timeout(keys: dict[str, object], seconds: float | None):
    assert jsonl(path="x", **keys).timeout_sec == seconds


def test_download_headers_win():
    request = jsonl(path="x", download_headers={"A": "1"}, headers={"A": "2"})
    assert request.headers == {"A": "1"}


def test_jsonl_of_a_task_needs_a_file_name():
    assert "taskId with filename" in error_text(JsonlSource, {"taskId": "77aa"})
    assert jsonl(taskId="77aa", filename="x.jsonl").filename == "x.jsonl"


def test_unknown_keys_are_told_and_second_names_are_not():
    spec = Spec.model_validate(
        {
            "load": {"path": "/x", "taskId": "a", "task_id": "a", "ulr": "http://h"},
            "jsonl": {"path": "x", "timeout": 3, "timeoutSec": 3},
        }
    )
    assert unknown_keys(spec) == ["unknown key 'spec.load.ulr' is ignored; did you mean 'spec.load.url'?"]


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"path": "/data/w/77aa/final_model/"}, "final_model"),
        ({"path": "/data/a", "url": "http://h/b"}, "a"),
        ({"url": "http://user:pw@h/x/final%20model.tar.gz?token=s"}, "final model.tar.gz"),
        ({"url": "http://user:pw@h"}, "checkpoint"),
        ({"url": "http://user:pw@h", "taskId": "77aa"}, "77aa"),
        ({"taskId": "77aa", "filename": "m.gguf"}, "m.gguf"),
    ],
)
def test_a_checkpoints_name_for_people(keys: dict[str, object], name: str):
    assert CheckpointLoad.model_validate(keys).shown_name == name


def test_the_identity_knows_what_matters_and_no_secret():
    base = {"path": "/x", "taskId": "a", "url": "http://h/a", "sha256": DIGEST, "subdir": "m"}

    def identity(**changes: object) -> str:
        return CheckpointLoad.model_validate({**base, **changes}).identity

    assert identity() == identity(headers={"Authorization": "x"}, timeoutSec=3, type="http")
    changed = [
        {"path": "/y"}, {"taskId": "b"}, {"url": "http://h/b"}, {"sha256": "f" * 64}, {"subdir": "n"},
        {"archive_format": "none"}, {"filename": "f"}, {"base_url": "http://h"},
    ]  # fmt: skip
    assert len({identity(), *(identity(**change) for change in changed)}) == len(changed) + 1


@pytest.mark.parametrize(
    ("given", "headers"), [(None, {}), ({"X-Key": None}, {}), ({"X-Key": None, "X-Trace": "7"}, {"X-Trace": "7"})]
)
def test_a_null_header_is_not_sent(given: object, headers: dict[str, str]):
    assert checkpoint(url="http://h/x", headers=given, timeoutSec=None).headers == headers
    assert jsonl(url="http://h/x", headers=given, timeoutSec=None).headers == headers
    assert jsonl(url="http://h/x", download_headers=given, download_timeoutSec=None).headers == headers
    spec = Spec.model_validate({"output": {"destination": {"url": "http://h/x", "headers": given, "timeoutSec": None}}})
    assert (spec.output.destination.headers, spec.output.destination.timeout_sec) == (headers, None)


def test_a_null_takes_a_value_back_everywhere():
    plain = Spec.model_validate({})
    for taken_back in (
        {"output": None},
        {"output": {"destination": None, "artifacts": None}},
        {"output": {"destination": {"type": None, "path": None, "url": None, "method": None}}},
        {"resources": None, "enforce_cpu": None, "timeoutSec": None, "_upstreamResults": None, "taskType": None},
    ):
        spec = Spec.model_validate(taken_back)
        assert (spec.output, spec.timeout_sec, spec.enforce_cpu) == (plain.output, None, False), taken_back
        assert unknown_keys(spec) == []
    assert Spec.model_validate({"resources": {"hardware": None, "replicas": None}}).resources is not None

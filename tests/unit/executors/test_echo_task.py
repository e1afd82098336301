"""The smallest executor gives back what it got, but for secrets."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import JsonValue
from recording_report import RecordingReport

from executors.contract import EnginePolicy, ExecutorTask, JsonObject
from executors.echo_task import EchoSpec, EchoTask


def echo_of(sent: JsonObject, folder: Path) -> JsonValue:
    task = ExecutorTask("t1", EchoSpec(), (), folder, EnginePolicy(), RecordingReport(), sent)
    return EchoTask().run(task).result["echo"]


def test_secrets_are_masked_wherever_they_stand(tmp_path: Path):
    sent: JsonObject = {
        "taskType": "echo",
        "max_tokens": 5,
        "tokenizer": "bpe",
        "author": "me",
        "qdrant": {"url": "http://q", "api_key": "k-1"},
        "output": {"destination": {"headers": {"Authorization": "Bearer k-2", "X-Trace": "k-3", "Accept": ["k-4"]}}},
        "data": {"download_headers": ["Cookie: k-5"], "HEADERS": None},
        "list": [{"password": "k-6"}],
    }

    assert echo_of(sent, tmp_path) == {
        "taskType": "echo",
        "max_tokens": 5,
        "tokenizer": "bpe",
        "author": "me",
        "qdrant": {"url": "http://q", "api_key": "***"},
        "output": {"destination": {"headers": {"Authorization": "***", "X-Trace": "***", "Accept": ["***"]}}},
        "data": {"download_headers": ["***"], "HEADERS": "***"},
        "list": [{"password": "***"}],
    }


@pytest.mark.parametrize(
    "key",
    [
        "X-API-Key", "api-key", "apiKey", "Cookie", "Set-Cookie", "X-Auth", "auth", "access_key", "AWS-Access-Key-Id",
        "aws_secret_access_key", "PRIVATE-TOKEN", "hf_token", "privateKey", "PassPhrase", "Password", "credentials",
        "proxy-authorization", "signature", "tokenValue", "pass",
    ],
)  # fmt: skip
def test_a_key_of_a_secret_is_known_in_any_spelling(key: str, tmp_path: Path):
    assert echo_of({"deep": [{key: {"value": "hunter2"}}]}, tmp_path) == {"deep": [{key: "***"}]}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://u:hunter2@h:8/x", "http://***@h:8/x"),
        ("https://h/x?sig=hunter2&y=hunter2#hunter2", "https://h/x?sig=***&y=***#***"),
        ("https://h/x?hunter2", "https://h/x?***"),
        ("get http://u:hun ter2@h/x?a=hunter2 b", "get http://***@h/x?a=***"),
        ("http://a/ then http://u:hunter2@h/", "http://***@h/"),
        ("http://a/?q to http://u:hunter2@h/x?q=1", "http://a/?***?q=***"),
        ("http://u:hun/ter2@h/x", "http://***@h/x"),
        ("mail me@example.org, why not? a=b", "mail me@example.org, why not? a=b"),
        ("http://h/x", "http://h/x"),
    ],
)
def test_urls_are_given_back_without_their_secrets(text: str, shown: str, tmp_path: Path):
    assert echo_of({"data": [{"url": text}], text: 1}, tmp_path) == {"data": [{"url": shown}], shown: 1}

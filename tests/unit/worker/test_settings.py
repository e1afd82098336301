"""Settings: read once, checked, and a wrong one is named with its value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from worker.settings import (
    Settings,
    SettingsError,
    described,
    engine_environment,
    help_text,
    read_settings,
    suspicious_names,
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("REDIS_URL", "redis://user:hunter22@127.0.0.1:6379/0")
    monkeypatch.chdir(tmp_path)


def test_the_defaults_are_those_of_the_contract(tmp_path: Path):
    settings = read_settings()

    assert settings.task_topic == "tasks"
    assert settings.heartbeat_interval_sec == 30
    assert settings.worker_cost_per_hour == 1.0
    assert settings.results_dir == tmp_path / "results_workers"
    assert settings.model_archive_compression_level is None
    assert settings.task_min_turnaround_ms == 200
    assert settings.worker_tags == ()
    assert settings.model_cleanup_after_upload is False


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("WORKER_TAGS", " a, b ,,c", "worker_tags", ("a", "b", "c")),
        ("LOG_LEVEL", "debug", "log_level", "DEBUG"),
        ("LOG_LEVEL", "loud", "log_level", "INFO"),
        ("MODEL_ARCHIVE_USE_PIGZ", "off", "model_archive_use_pigz", False),
        ("MODEL_ARCHIVE_USE_PIGZ", "yes", "model_archive_use_pigz", True),
        ("MODEL_ARCHIVE_COMPRESSION_LEVEL", "42", "model_archive_compression_level", 9),
        ("MODEL_ARCHIVE_COMPRESSION_LEVEL", "-3", "model_archive_compression_level", 0),
        ("MODEL_ARCHIVE_COMPRESSION_LEVEL", "best", "model_archive_compression_level", None),
        ("MODEL_CLEANUP_AFTER_UPLOAD", "", "model_cleanup_after_upload", False),
        ("MODEL_CLEANUP_AFTER_UPLOAD", "1", "model_cleanup_after_upload", True),
        ("WORKER_COST_PER_HOUR", "", "worker_cost_per_hour", 1.0),
        ("WORKER_ID", "  wk-1 ", "worker_id", "wk-1"),
        ("WORKER_ALLOWED_ROOTS", "/a:/b/../c", "worker_allowed_roots", (Path("/a"), Path("/c"))),
        (
            "ORCHESTRATOR_BASE_URL",
            " http://u:p@orch.example:8000/ ",
            "orchestrator_base_url",
            "http://u:p@orch.example:8000",
        ),
        ("RESULTS_UPLOAD_URL", "HTTPS://[::1]:8/r?key=1", "results_upload_url", "HTTPS://[::1]:8/r?key=1"),
        ("ORCHESTRATOR_TOKEN", "  tok-1\n", "orchestrator_token", SecretStr("tok-1")),
        ("ORCHESTRATOR_TOKEN", " \n", "orchestrator_token", None),
        (
            "WORKER_ALLOWED_HOSTS",
            "a.b, *.c.d:80,[::1]:9, ::1 ,H_x:8",
            "worker_allowed_hosts",
            ("a.b", "*.c.d:80", "[::1]:9", "::1", "H_x:8"),
        ),
    ],
)
def test_values_are_read_as_the_contract_says(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, field: str, expected: object
):
    monkeypatch.setenv(name, value)

    assert getattr(read_settings(), field) == expected


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("HEARTBEAT_INTERVAL_SEC", "0", "greater than or equal to 1"),
        ("HEARTBEAT_INTERVAL_SEC", "soon", "integer"),
        ("WORKER_COST_PER_HOUR", "-1", "greater than or equal to 0"),
        ("WORKER_COST_PER_HOUR", "nan", "finite"),
        ("WORKER_COST_PER_HOUR", "inf", "finite"),
        ("WORKER_NETWORK_BANDWIDTH_BYTES_PER_SEC", "0", "greater than 0"),
        ("WORKER_ID", "a/b", "letters, digits"),
        ("WORKER_ID", "../x", "letters, digits"),
        ("REDIS_URL", "http://x", "redis://HOST:PORT/DB"),
        ("REDIS_URL", "redis://x:port", "ort"),
        ("REDIS_URL", "redis://x/abc", "'abc' is no number"),
        ("REDIS_URL", "redis://x?decode_responses=true", "'decode_responses' is not supported"),
        ("REDIS_URL", "redis://x?max_connections=y", "'max_connections' is not supported"),
        ("REDIS_URL", "redis://x?db=y", "no connection can be made"),
        ("LOG_FORMAT", "xml", "'auto', 'pretty' or 'json'"),
        ("MODEL_ARCHIVE_PIGZ_THREADS", "none", "integer"),
        ("ORCHESTRATOR_BASE_URL", "orch.example:8000/x", "only these are called"),
        ("ORCHESTRATOR_BASE_URL", "ftp://h", "only these are called"),
        ("ORCHESTRATOR_BASE_URL", "http://host:99999", "correct its host or port"),
        ("RESULTS_UPLOAD_URL", "http://ho st/x", "no usable host"),
        ("RESULTS_UPLOAD_URL", "http:///x", "no host"),
        ("WORKER_ALLOWED_HOSTS", "h/x", "expected `name`, `name:port` or `*.domain`"),
        ("WORKER_ALLOWED_HOSTS", "a,h:port", "'h:port' is no host"),
        ("WORKER_ALLOWED_HOSTS", "h:99999", "orch.example:8000"),
        ("WORKER_ALLOWED_HOSTS", "*", "without http:// and path"),
        ("WORKER_ALLOWED_HOSTS", "*.*.h", "without http:// and path"),
        ("WORKER_ALLOWED_HOSTS", "a b", "without http:// and path"),
    ],
)
def test_a_wrong_value_is_one_line_with_name_value_and_expectation(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, wanted: str
):
    monkeypatch.setenv(name, value)

    with pytest.raises(SettingsError) as caught:
        read_settings()

    text = str(caught.value)
    shown = value.partition("?")[0]  # options of a URL may be secrets
    assert text.startswith(f"{name}={shown!r} is not valid: ")
    assert wanted in text
    assert "\n" not in text


def test_a_wrong_url_is_shown_without_its_password(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REDIS_URL", "amqp://me:hunter22@broker")

    with pytest.raises(SettingsError) as caught:
        read_settings()

    assert "amqp://broker" in str(caught.value)
    assert "hunter22" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ORCHESTRATOR_BASE_URL", "ftp://u:hunter22@h"),
        ("ORCHESTRATOR_BASE_URL", "u_x:hunter22@h/x"),
        ("ORCHESTRATOR_BASE_URL", "http://u:hunter22/x@h/y"),
        ("RESULTS_UPLOAD_URL", "http://u:hunter22@[::1"),
        ("RESULTS_UPLOAD_URL", "http:/u:hunter22@h"),
        ("RESULTS_UPLOAD_URL", "http://h:99999/?sig=hunter22"),
        ("WORKER_ALLOWED_HOSTS", "a, https://u:hunter22@h/"),
        ("WORKER_ALLOWED_HOSTS", "u:hunter22@h"),
        ("ORCHESTRATOR_TOKEN", "hunter22 x"),
        ("ORCHESTRATOR_TOKEN", "hunter22\ny"),
        ("ORCHESTRATOR_TOKEN", "hunter22…"),
    ],
)
def test_a_wrong_value_is_shown_without_its_secrets(monkeypatch: pytest.MonkeyPatch, name: str, value: str):
    monkeypatch.setenv(name, value)

    with pytest.raises(SettingsError) as caught:
        read_settings()

    assert str(caught.value).startswith(f"{name}=")
    assert "hunter22" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_broker_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("REDIS_URL")

    with pytest.raises(SettingsError, match=r"REDIS_URL is not set.*make demo KEEP=1"):
        read_settings()


def test_settings_are_frozen_and_hide_secrets():
    settings = read_settings()

    assert "hunter22" not in repr(settings)
    with pytest.raises(ValueError, match="frozen"):
        settings.task_topic = "other"


def test_engines_do_not_inherit_secrets(monkeypatch: pytest.MonkeyPatch):
    for name in (
        "REDIS_URL", "ORCHESTRATOR_TOKEN", "orchestrator_token", "ORCHESTRATOR_BASE_URL", "ORCHESTRATOR_PASSWORD",
        "RESULTS_UPLOAD_URL", "results_upload_url",
    ):  # fmt: skip
        monkeypatch.setenv(name, "http://u:hunter22@h")
    monkeypatch.setenv("HF_HOME", "/cache")

    environment = engine_environment(task_tag="x")

    assert [name for name, value in environment.items() if "hunter22" in value] == []
    assert environment["HF_HOME"] == "/cache"


def test_unread_names_get_the_nearest_read_one():
    sentences = suspicious_names({"WORKER_TAG": "x", "WORKER_ID": "y", "OTHER": "z"})

    assert sentences == ["WORKER_TAG is set but not read; did you mean WORKER_TAGS?"]


def test_help_lists_every_variable_with_default_and_meaning():
    text = help_text()

    for name, default, meaning in described():
        assert name in text
        assert default in text
        assert meaning.split()[0] in text

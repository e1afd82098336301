"""The command line where no broker is needed: dispatch, bad input, bad settings, no broker at all."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from worker import exit_codes
from worker.commands import command_line, doctor_checks
from worker.commands.client_commands import EXIT_CODES, run_client
from worker.commands.text_screen import duration


@pytest.fixture
def dead_broker(monkeypatch: pytest.MonkeyPatch) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("REDIS_URL", f"redis://someone:s3cret@{address}/0")
    return address


def test_importing_the_entry_point_loads_no_client_code():
    code = (
        "import sys, worker.commands.command_line; print(sorted({'typer', 'rich', 'redis', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_other_commands_go_to_the_client(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["flowmesh-worker", "--help"])
    assert command_line.main() == exit_codes.OK
    text = capsys.readouterr().out
    for command in ("run", "demo", "submit", "workers", "task", "cancel", "doctor"):
        assert f"  {command} " in text
    for code, meaning in EXIT_CODES:
        assert f"{code:<4} {meaning}" in text


def test_every_exit_code_is_explained():
    named = {value for name, value in vars(exit_codes).items() if name.isupper()}
    assert {code for code, _ in EXIT_CODES} == named


@pytest.mark.parametrize("arguments", [["workers"], ["task", "t"], ["cancel", "t"], ["submit", "FILE"]])
def test_no_broker_is_one_line(
    arguments: list[str], dead_broker: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "t.json"
    file.write_text('{"taskType": "echo"}')
    code = run_client([str(file) if word == "FILE" else word for word in arguments])
    err = capsys.readouterr().err
    assert code == exit_codes.UNAVAILABLE
    assert err.count("\n") == 1
    assert f"redis://{dead_broker}/0" in err
    assert "doctor" in err
    assert "s3cret" not in err


def test_no_address_at_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.delenv("REDIS_URL", raising=False)
    assert run_client(["workers"]) == exit_codes.BAD_CONFIG
    err = capsys.readouterr().err
    assert "REDIS_URL is not set" in err
    assert "make demo KEEP=1" in err


@pytest.mark.parametrize("url", ["http://host", "redis://[half", "redis://h:port/0"])
def test_bad_address(url: str, capsys: pytest.CaptureFixture[str]):
    assert run_client(["workers", "--broker", url]) == exit_codes.BAD_CONFIG
    assert "REDIS_URL=" in capsys.readouterr().err


def test_other_settings_do_not_concern_a_client(
    dead_broker: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("HEARTBEAT_INTERVAL_SEC", "often")
    assert run_client(["workers"]) == exit_codes.UNAVAILABLE
    assert dead_broker in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["task", "../../x"], ["cancel", "a b"], ["nonsense"], ["submit"]])
def test_wrong_usage(arguments: list[str], dead_broker: str, capsys: pytest.CaptureFixture[str]):
    assert run_client(arguments) == exit_codes.USAGE
    err = capsys.readouterr().err
    assert "Error" in err
    assert dead_broker not in err


def test_a_task_file_is_checked_before_the_broker_is_asked(
    dead_broker: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "t.yaml"
    file.write_text("- a list\n")
    assert run_client(["submit", str(file)]) == exit_codes.USAGE
    err = capsys.readouterr().err
    assert "holds a list" in err
    assert dead_broker not in err


def test_a_fault_of_the_program_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def broken(_url: str) -> list[doctor_checks.Finding]:
        raise RuntimeError("boom")

    monkeypatch.setattr(doctor_checks, "examine", broken)
    assert run_client(["doctor"]) == exit_codes.CRASHED
    assert "a fault of the program itself" in capsys.readouterr().err


def test_doctor_without_settings_and_broker(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dead_broker: str
):
    monkeypatch.setenv("HEARTBEAT_INTERVAL_SEC", "0")
    assert run_client(["doctor", "--json"]) == exit_codes.FAILED
    findings = json.loads(capsys.readouterr().out)
    failed = {found["subject"]: found for found in findings if found["level"] == "FAIL"}
    assert set(failed) == {"settings", "broker"}
    assert "HEARTBEAT_INTERVAL_SEC" in failed["settings"]["message"]
    assert dead_broker in failed["broker"]["message"]
    assert all(found["fix"] for found in failed.values())


def test_doctor_names_what_a_missing_extra_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dead_broker: str
):
    monkeypatch.setattr(doctor_checks.catalog, "missing_libraries", lambda entry: list(entry.requires))
    run_client(["doctor", "--json"])
    found = {one["subject"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["type inference"]["level"] == "WARN"
    assert "torch" in found["type inference"]["message"]
    assert "--extra inference" in found["type inference"]["fix"]
    assert found["broker"]["level"] == "FAIL"
    assert dead_broker in found["broker"]["message"]


def test_doctor_on_disks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, dead_broker: str
):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("RESULTS_DIR", str(blocked / "results"))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(doctor_checks, "_MODEL_BYTES", 2**70)
    assert run_client(["doctor", "--json"]) == exit_codes.FAILED
    found = {one["subject"]: one for one in json.loads(capsys.readouterr().out)}
    assert (found["results"]["level"], found["model cache"]["level"]) == ("FAIL", "WARN")
    assert "RESULTS_DIR" in found["results"]["fix"]
    assert dead_broker in found["broker"]["message"]


def test_durations():
    assert [duration(value) for value in (None, 5, 600, 7200, 400_000)] == ["-", "5 s", "10 min", "2.0 h", "5 d"]

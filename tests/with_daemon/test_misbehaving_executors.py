"""Whatever an executor does, its task ends with a clear answer and the daemon runs the next one."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
from daemon_world import TaskEnd, World
from waiting_until import wait_until

CRASHES = [
    ("sys_exit", "engine_crash", "exited with status 3"),
    ("os_exit", "engine_crash", "exited with status 4"),
    ("kill", "engine_crash", "SIGKILL"),
    ("segfault", "engine_crash", "SIGSEGV"),
    ("interrupt", "engine_crash", "SIGINT"),
    ("close", "engine_crash", "status 1"),
    ("garbage", "engine_protocol", "no message"),
    ("half_close", "engine_protocol", "closed its channel"),
]
ERRORS = [
    ("raise", "executor_error", "ValueError: the subject"),
    ("executor_error", "bad_data", "has no rows"),
    ("not_output", "executor_error", "returned dict, expected a TaskOutput"),
    ("not_json", "executor_error", "result.value"),
    ("surrogate", "executor_error", "surrogate"),
]


def act(name: str, **fields: object) -> dict[str, object]:
    return {"taskType": "subject", "act": name, **fields}


def engine_pid(world: World) -> int:
    return int(world.run(act("fine")).result["pid"])


def check_failure(world: World, end: TaskEnd, reason: str, text: str) -> None:
    """The same answer everywhere: in the event, in the hash and in the result; and the logs are kept."""
    task_id = end.event["task_id"]
    assert not end.ok
    assert end.reason == reason
    assert text in end.error
    assert end.hint
    result = end.result
    assert result["ok"] is False
    assert result["task_id"] == task_id
    assert result["error"] == end.error
    assert (result["reason"], result["hint"]) == (reason, end.hint)
    assert (end.folder / "logs").is_dir()
    assert (end.folder / "manifest.json").is_file()
    seen = world.hash_of(task_id, "FAILED")
    assert (seen["error"], seen["reason"], seen["hint"]) == (end.error, reason, end.hint)


@pytest.mark.parametrize(("name", "reason", "text"), CRASHES)
def test_an_engine_that_breaks_is_replaced(busy_world: World, name: str, reason: str, text: str):
    before = engine_pid(busy_world)
    end = busy_world.run(act(name))
    check_failure(busy_world, end, reason, text)
    assert engine_pid(busy_world) != before
    assert not psutil.pid_exists(before)


@pytest.mark.parametrize(("name", "reason", "text"), ERRORS)
def test_an_exception_leaves_the_engine_warm(busy_world: World, name: str, reason: str, text: str):
    before = engine_pid(busy_world)
    end = busy_world.run(act(name))
    check_failure(busy_world, end, reason, text)
    assert engine_pid(busy_world) == before


def test_a_thread_that_was_left_behind_does_not_keep_a_broken_engine_alive(busy_world: World):
    assert busy_world.run(act("thread")).ok  # it never ends, and the interpreter would wait for it
    before = engine_pid(busy_world)

    end = busy_world.run(act("close"))

    assert not end.ok
    assert not psutil.pid_exists(before)


def test_the_last_words_are_in_the_error(busy_world: World):
    end = busy_world.run(act("sys_exit"))
    assert "last words before the exit" in end.error
    assert "last words before the exit" in end.result["log_tail"]
    assert "last words before the exit" in (end.folder / "logs" / "engine.log").read_text()


def test_a_traceback_is_kept_in_the_tasks_log(busy_world: World):
    end = busy_world.run(act("raise"))
    assert "Traceback" in (end.folder / "logs" / "engine.log").read_text()


def test_want_of_memory_replaces_the_engine(busy_world: World):
    before = engine_pid(busy_world)
    end = busy_world.run(act("no_memory"))
    check_failure(busy_world, end, "host_oom", "MemoryError")
    assert engine_pid(busy_world) != before


@pytest.mark.parametrize("name", ["hang", "hang_gil", "signal_handler", "stopped"])
def test_a_hanging_task_is_ended_by_its_time_limit(busy_world: World, name: str):
    before = engine_pid(busy_world)
    end = busy_world.run(act(name, timeoutSec=0.5))
    check_failure(busy_world, end, "timeout", "limit of 0.5 s")
    assert not psutil.pid_exists(before)


def test_a_silent_task_is_ended(busy_world: World):
    end = busy_world.run(act("hang", noProgressTimeoutSec=0.3))
    check_failure(busy_world, end, "no_progress", "nothing for 0.3 s")


def test_printing_counts_as_a_sign_of_life(busy_world: World):
    assert busy_world.run(act("chatty", seconds=1.0, noProgressTimeoutSec=0.6)).ok


def test_a_flood_of_output_drowns_nobody(busy_world: World):
    end = busy_world.run(act("flood"), within_sec=60)
    assert end.ok
    log = (end.folder / "logs" / "engine.log").read_text()
    assert log.count("from C") == 20_000
    assert log.count("flood") == 20 * 60_000 + 1
    assert "the last line of the flood" in log
    (daemon,) = busy_world.daemons
    forwarded = daemon.logged("engine_output", task_id=end.event["task_id"])
    assert 0 < len(forwarded) < 2_000


def test_output_without_newlines_and_without_text(busy_world: World):
    end = busy_world.run(act("long_line"))
    assert end.ok
    assert (end.folder / "logs" / "engine.log").stat().st_size >= 16 * 1024**2


def test_a_grandchild_ends_with_the_engine(busy_world: World):
    end = busy_world.run(act("grandchild_exit"))
    check_failure(busy_world, end, "engine_crash", "status 5")
    left = int((end.folder / "artifacts" / "grandchild").read_text())
    assert not psutil.pid_exists(left)


def test_a_grandchild_does_not_hinder_the_next_task(busy_world: World):
    end = busy_world.run(act("grandchild"))
    assert end.ok
    left = int((end.folder / "artifacts" / "grandchild").read_text())
    assert busy_world.run(act("fine")).ok
    busy_world.run(act("os_exit"))
    assert not psutil.pid_exists(left)


def test_a_thread_left_behind_does_not_hinder_the_next_task(busy_world: World):
    before = engine_pid(busy_world)
    assert busy_world.run(act("thread")).ok
    assert engine_pid(busy_world) == before


def test_numbers_that_json_does_not_know_become_null(busy_world: World):
    end = busy_world.run(act("nan"))
    assert end.ok
    assert end.result["nan"] is None
    assert end.result["list"] == [None, 1.5]
    events = "".join(busy_world.events.raw)
    assert "NaN" not in events
    assert "Infinity" not in events


def test_a_large_result_arrives_whole(busy_world: World):
    end = busy_world.run(act("huge"))
    assert len(end.result["value"]) == 5 * 1024**2


def test_words_in_the_name_of_another_task_change_nothing(busy_world: World):
    end = busy_world.run(act("impostor", seconds=0.2))
    assert end.ok
    assert end.result["act"] == "impostor"
    assert not busy_world.events.of_task("another")
    assert not busy_world.redis.exists("task:another")


def test_a_task_that_hangs_does_not_delay_the_heartbeat(busy_world: World):
    task_id = busy_world.send(act("hang_gil", timeoutSec=3))
    busy_world.started(task_id)
    beats = len(busy_world.events.on("workers.events", "HEARTBEAT"))
    wait_until(
        lambda: len(busy_world.events.on("workers.events", "HEARTBEAT")) >= beats + 2,
        "two heartbeats while the engine holds its interpreter",
        within_sec=2.8,
    )
    assert not busy_world.ended(task_id).ok


def test_files_lie_in_the_tasks_folder_and_in_its_manifest(busy_world: World):
    end = busy_world.run(act("files", output={"artifacts": ["summary.csv", "missing.bin"]}))
    assert end.ok
    assert (end.folder / "artifacts" / "note.txt").read_text() == "a note"
    assert Path(end.result["cwd"]) != end.folder
    entries = {entry["name"]: entry for entry in _manifest(end)["entries"]}
    assert entries["summary.csv"]["status"] == "present"
    assert len(entries["summary.csv"]["sha256"]) == 64
    assert entries["missing.bin"]["status"] == "missing"
    assert entries["artifacts"]["file_count"] == 1


def _manifest(end: TaskEnd) -> dict[str, list[dict[str, object]]]:
    loaded: dict[str, list[dict[str, object]]] = json.loads((end.folder / "manifest.json").read_text())
    return loaded

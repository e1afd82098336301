"""The daemon is killed at every step of a delivery, the broker goes away: nothing is lost, sent twice, or run again."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from daemon_process import DaemonProcess
from daemon_world import World
from delivered_model import check_delivered
from event_log import FINAL
from http_orchestrator import HttpOrchestrator
from waiting_until import wait_until

Json = dict[str, Any]
_SIZE = 3_000_000


@pytest.fixture
def orchestrator(tmp_path: Path) -> Iterator[HttpOrchestrator]:
    with HttpOrchestrator(tmp_path / "orchestrator") as made:
        yield made


def producing(orchestrator: HttpOrchestrator, size: int = _SIZE) -> Json:
    destination = {"type": "http", "url": orchestrator.results_url, "timeoutSec": 20}
    return {"taskType": "producing", "output": {"destination": destination}, "size": size}


def restart(world: World, **environment: str) -> DaemonProcess:
    """Start the same worker again; the engine must not."""
    return world.start(WORKER_EXECUTOR_MASK="echo", **environment)  # what would run the task anew is switched off


def test_killed_while_archiving(world: World, orchestrator: HttpOrchestrator, tmp_path: Path):
    slow = tmp_path / "slow-pigz"  # a compressor that has to be waited for: the kill comes in the middle for certain
    slow.write_text(
        f'#!/bin/sh\ntouch {tmp_path}/archiving\nwhile [ ! -e {tmp_path}/go ]; do sleep 0.05; done\npigz "$@"\n'
    )
    slow.chmod(0o755)
    daemon = world.start(MODEL_ARCHIVE_PIGZ_BIN=str(slow), MODEL_ARCHIVE_COMPRESSION_LEVEL="1")
    task_id = world.send(producing(orchestrator))
    wait_until((tmp_path / "archiving").exists, "the archive is being made")
    helpers = psutil.Process(daemon.pid).children(recursive=True)

    world.kill(daemon)

    (tmp_path / "go").touch()
    wait_until(
        lambda: not any(each.is_running() and each.name() in {"tar", "pigz"} for each in helpers), "tar and pigz end"
    )
    assert not world.events.ends(task_id)
    restart(world)
    check_delivered(world, orchestrator, task_id, _SIZE)
    assert len(orchestrator.seen("upload")) == 1


def test_killed_while_uploading(world: World, orchestrator: HttpOrchestrator):
    daemon = world.start(WORKER_NETWORK_BANDWIDTH_BYTES_PER_SEC="500000")
    task_id = world.send(producing(orchestrator))
    wait_until(
        lambda: any(call.body_bytes > 200_000 for call in orchestrator.seen("upload")), "the upload is under way"
    )

    world.kill(daemon)

    assert orchestrator.file(task_id, "final_model.tar.gz") is None
    restart(world)
    check_delivered(world, orchestrator, task_id, _SIZE)
    assert len(orchestrator.seen("upload")) == 2


def test_killed_between_upload_and_result(world: World, orchestrator: HttpOrchestrator):
    orchestrator.hang("result")
    daemon = world.start()
    task_id = world.send(producing(orchestrator))
    wait_until(lambda: orchestrator.seen("result"), "the result is being sent")

    world.kill(daemon)
    orchestrator.forget_faults()

    restart(world)
    check_delivered(world, orchestrator, task_id, _SIZE)
    assert len(orchestrator.seen("upload")) == 1, "the file was sent again to a peer that had it"


def test_killed_between_result_and_event(world: World, orchestrator: HttpOrchestrator):
    daemon = world.start(TASK_MIN_TURNAROUND_MS="60000")  # the event is held back, so the kill comes before it
    task_id = world.send(producing(orchestrator))
    wait_until(lambda: orchestrator.result(task_id), "the result is there")
    wait_until(lambda: _state(world, task_id) == "succeeded", "the end is in the journal")

    world.kill(daemon)

    assert not world.events.ends(task_id)
    restart(world)
    check_delivered(world, orchestrator, task_id, _SIZE)
    assert len(orchestrator.seen("upload")) == 1
    assert len(orchestrator.seen("result")) == 1


def _state(world: World, task_id: str) -> str | None:
    (journal,) = (world.folder / "results" / ".worker").glob("*/journal.sqlite3")
    with contextlib.closing(sqlite3.connect(journal)) as db:
        row = db.execute("SELECT state FROM tasks WHERE task_id = ?", (task_id,)).fetchone()
    return row[0] if row else None


def test_killed_after_the_answer_was_lost(world: World, orchestrator: HttpOrchestrator):
    orchestrator.hang("result", stored=True)
    daemon = world.start()
    task_id = world.send(producing(orchestrator))
    wait_until(lambda: orchestrator.result(task_id), "the result is stored, but the answer hangs")

    world.kill(daemon)
    orchestrator.forget_faults()

    restart(world)
    check_delivered(world, orchestrator, task_id, _SIZE)


def test_stopped_while_uploading_it_goes_on_after_the_next_start(world: World, orchestrator: HttpOrchestrator):
    orchestrator.hang("upload")
    daemon = world.start(SHUTDOWN_GRACE_SEC="0.5")
    task_id = world.send(producing(orchestrator))
    wait_until(lambda: orchestrator.seen("upload"), "the upload is under way")

    assert daemon.stop() == 0
    orchestrator.forget_faults()

    assert not world.events.ends(task_id)
    restart(world)
    check_delivered(world, orchestrator, task_id, _SIZE)


def test_a_stop_waits_for_a_delivery_that_ends_within_the_grace(world: World, orchestrator: HttpOrchestrator):
    orchestrator.hang("upload")
    daemon = world.start()
    task_id = world.send(producing(orchestrator))
    wait_until(lambda: orchestrator.seen("upload"), "the upload is under way")
    daemon.signal(signal.SIGTERM)
    wait_until(lambda: daemon.logged("shutdown"), "it is shutting down")
    orchestrator.release()

    assert daemon.wait() == 0
    check_delivered(world, orchestrator, task_id, _SIZE)


def test_a_broker_away_for_30_s_at_the_end_gets_all_ends_in_order(world: World, orchestrator: HttpOrchestrator):
    """Done-when 4 of the delivery issue: the 30 seconds are the demand itself."""
    world.start(WORKER_MAX_QUEUE_SKIPS="0")  # else the third would overtake the second: its engine is warm
    first = world.send(producing(orchestrator, 1000))
    second = world.send({"taskType": "subject", "act": "sleep", "seconds": 2})
    third = world.send(producing(orchestrator, 2000))
    world.ended(first)
    world.started(second)
    world.server.stop()
    down = time.monotonic()
    wait_until(lambda: orchestrator.result(third), "the third was delivered without the broker", within_sec=30)
    wait_until(lambda: time.monotonic() - down > 30, "the broker has been away for 30 s", within_sec=40)

    world.restart_server()
    world.events.wait_listening()

    check_delivered(world, orchestrator, third, 2000)
    assert world.ended(second).ok
    ends = [event["task_id"] for event in world.events.on("tasks.events") if event["type"] in FINAL]
    assert ends == [first, second, third]

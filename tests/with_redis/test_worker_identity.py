"""One id, one live process: by lock on this host, by heartbeat across hosts."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator_client.channels import WORKER_EVENTS, WORKER_IDS, heartbeat_key, worker_key
from orchestrator_client.connection import command_client, sync_client
from orchestrator_client.errors import BrokerRefusedError
from worker.journal_tables import Arrival
from worker.settings import Settings
from worker.task_journal import TaskJournal
from worker.worker_identity import IdInUseError, process_home, take_identity, take_over


def settings(tmp_path: Path, worker_id: str = "") -> Settings:
    return Settings.model_validate({"redis_url": "redis://x", "results_dir": tmp_path, "worker_id": worker_id})


def test_a_pinned_id_is_locked_against_a_second_process(tmp_path: Path):
    first = take_identity(settings(tmp_path, "w1"))

    with pytest.raises(IdInUseError, match=f"'w1'.*{os.getpid()}"):
        take_identity(settings(tmp_path, "w1"))
    first.release()
    take_identity(settings(tmp_path, "w1")).release()


def test_without_a_pinned_id_each_process_gets_its_own(tmp_path: Path):
    first, second = take_identity(settings(tmp_path)), take_identity(settings(tmp_path))

    assert len(first.worker_id) == 16
    assert first.worker_id != second.worker_id
    first.release()
    second.release()


async def test_a_random_id_that_owes_something_is_taken_over_and_one_that_does_not_is_cleared(tmp_path: Path):
    owing, idle = take_identity(settings(tmp_path)), take_identity(settings(tmp_path))
    for state in (owing, idle):
        journal = TaskJournal(state.journal)
        if state is owing:
            await journal.accept([Arrival("t1", b"{}", 1.0)])
        await journal.close()
        state.release()

    third = take_identity(settings(tmp_path))
    fourth = take_identity(settings(tmp_path))

    assert third.worker_id == owing.worker_id
    assert fourth.worker_id not in {owing.worker_id, idle.worker_id}
    assert not idle.path.exists()
    third.release()
    fourth.release()


async def test_a_pinned_id_is_not_taken_over_by_others(tmp_path: Path):
    pinned = take_identity(settings(tmp_path, "w1"))
    journal = TaskJournal(pinned.journal)
    await journal.accept([Arrival("t1", b"{}", 1.0)])
    await journal.close()
    pinned.release()

    other = take_identity(settings(tmp_path))

    assert other.worker_id != "w1"
    assert pinned.journal.exists()
    other.release()


def registration(pid: int, host: str, last_seen: str = "2031-04-02T09:00:00+00:00") -> dict[str, str]:
    return {"pid": str(pid), "host_id": host, "last_seen": last_seen, "heartbeat_interval_sec": "1"}


def ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("owner", ["ended here", "this pid", "silent elsewhere", "no heartbeat key"])
async def test_a_dead_owner_is_unregistered_first(broker_url: str, owner: str):
    pid = {"ended here": ended_pid(), "this pid": os.getpid()}.get(owner, 1)
    host = process_home() if owner in {"ended here", "this pid"} else "elsewhere:boot"
    client = command_client(broker_url)
    await client.sadd(WORKER_IDS, "w1")
    await client.hset(worker_key("w1"), mapping=registration(pid, host))
    if owner != "no heartbeat key":
        await client.set(heartbeat_key("w1"), "x", ex=120)
    listener = client.pubsub()
    await listener.subscribe(WORKER_EVENTS)
    await listener.get_message(timeout=5)

    await take_over(client, "w1")

    message = await listener.get_message(timeout=5)
    assert message is not None
    assert b'"type":"UNREGISTER"' in message["data"]
    assert await client.exists(worker_key("w1"), heartbeat_key("w1"), WORKER_IDS) == 0
    await listener.aclose()
    await client.aclose()


async def test_an_owner_whose_heartbeat_goes_on_keeps_its_id(broker_url: str):
    client = command_client(broker_url)
    await client.hset(worker_key("w1"), mapping=registration(4242, "elsewhere:boot"))
    await client.set(heartbeat_key("w1"), "x", ex=120)
    beat = (
        "import redis, sys, itertools\n"
        "r = redis.Redis.from_url(sys.argv[1])\n"
        "for n in itertools.count(): r.hset('worker:w1', 'last_seen', n)\n"
    )
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", beat, broker_url)
    try:
        with pytest.raises(IdInUseError, match=r"'w1'.*4242 on elsewhere"):
            await take_over(client, "w1")
    finally:
        owner.kill()
        await owner.wait()
        await client.aclose()
    with sync_client(broker_url) as check:
        assert check.exists(worker_key("w1"))


async def test_a_free_id_needs_nothing(broker_url: str):
    client = command_client(broker_url)

    await take_over(client, "w1")

    assert await client.keys("*") == []
    await client.aclose()


async def test_a_key_that_another_system_uses_is_named(broker_url: str):
    client = command_client(broker_url)
    await client.set(worker_key("w1"), "{}", ex=60)

    with pytest.raises(BrokerRefusedError, match=r"worker:w1.*another WORKER_ID"):
        await take_over(client, "w1")
    await client.aclose()


def test_a_damaged_journal_of_a_dead_random_id_is_skipped(tmp_path: Path):
    first = take_identity(settings(tmp_path))
    first.journal.write_bytes(b"no database, and long enough to be taken for one" * 100)
    first.release()

    second = take_identity(settings(tmp_path))

    assert second.worker_id != first.worker_id
    assert first.journal.exists()
    second.release()

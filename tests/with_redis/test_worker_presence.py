"""The heartbeat beats on time, also when a driver hangs (promise 5), and carries what WIRE 2.3 names."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from orchestrator_client.channels import heartbeat_key, worker_key
from orchestrator_client.connection import batch_client, command_client
from worker import worker_presence
from worker.event_publisher import EventPublisher
from worker.gpu_facts import GpuFacts, GpuPower, GpuReader
from worker.host_facts import read_hardware
from worker.task_journal import TaskJournal
from worker.worker_presence import Identity, WorkerPresence


class HangingReader(GpuReader):
    """A GPU whose driver stops answering."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = threading.Event()

    def power(self) -> tuple[GpuPower, ...]:
        self.answer.wait(60)
        return ()


@pytest.fixture
async def publisher(broker_url: str, tmp_path: Path) -> AsyncIterator[EventPublisher]:
    client = batch_client(broker_url)
    journal = TaskJournal(tmp_path / "journal.sqlite3")
    publisher = EventPublisher(client, journal)
    running = asyncio.create_task(publisher.run())
    yield publisher
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await journal.close()
    await client.aclose()


def presence(publisher: EventPublisher, gpus: GpuReader) -> WorkerPresence:
    identity = Identity.describe("w1", ("a",), 3.6, 1)
    return WorkerPresence(identity, publisher, gpus, read_hardware(GpuFacts()))


async def test_a_hanging_driver_delays_no_heartbeat_and_no_farewell(
    publisher: EventPublisher, broker_url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(worker_presence, "_MEASURE_WITHIN_SEC", 0.2)
    gpus = HangingReader()
    worker = presence(publisher, gpus)
    client = command_client(broker_url)
    try:
        assert await worker.register()
        async with asyncio.timeout(5):
            await worker.beat()
            await worker.beat()
            assert await client.ttl(heartbeat_key("w1")) == pytest.approx(120, abs=2)
            await worker.unregister()
        assert await client.exists(worker_key("w1"), heartbeat_key("w1")) == 0
    finally:
        gpus.answer.set()
        await client.aclose()


async def test_a_beat_carries_load_cost_and_power(publisher: EventPublisher, broker_url: str):
    worker = presence(publisher, GpuReader())
    client = command_client(broker_url)
    listener = client.pubsub()
    await worker.register()
    await listener.subscribe("workers.events")
    await listener.get_message(timeout=5)

    await worker.beat()

    message = await listener.get_message(timeout=5)
    assert message is not None
    event = json.loads(message["data"])
    metrics = event["metrics"]
    assert event["type"] == "HEARTBEAT"
    assert metrics["accrued_cost_usd"] == pytest.approx(metrics["uptime_sec"] * 3.6 / 3600, rel=0.5, abs=1e-5)
    assert set(metrics["loadavg"]) == {"1m", "5m", "15m"}
    assert set(metrics["power"]) == {"timestamp", "cpu_watts", "gpu_watts"}
    assert metrics["power"]["gpu_watts"] == {"total": None, "per_gpu": []}
    assert metrics["power_summary"]["samples"]["gpu"] == 0
    assert metrics["estimated_energy_kwh"] >= 0
    await worker.unregister()
    await listener.aclose()
    await client.aclose()

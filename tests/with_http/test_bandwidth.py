"""The cap on what is sent: exact, smooth, fair."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from pathlib import Path

import pytest
from http_orchestrator import HttpOrchestrator

from orchestrator_client.transfers.bandwidth import Bandwidth
from orchestrator_client.transfers.http_link import HttpLink, HttpPolicy, Target
from orchestrator_client.transfers.uploads import ResultBody, post_result, upload_file


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 1000.0

    async def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds

    def bucket(self, rate: float | None) -> Bandwidth:
        return Bandwidth(rate, now=lambda: self.now, sleep=self.sleep)


@pytest.mark.parametrize("rate", [1, 1000, 64_000, 1e6, 1e9])
async def test_the_rate_holds_over_twenty_seconds(rate: float):
    clock = Clock()
    bucket = clock.bucket(rate)
    sent = 0
    while sent < 20 * rate:
        size = bucket.piece(1024**2)
        await bucket.take(size)
        sent += size
    assert clock.now - 1000 == pytest.approx(20, rel=0.1)


@pytest.mark.parametrize("rate", [1000, 64_000, 1e6])
async def test_no_tenth_of_a_second_lets_more_through_than_two_tenths_worth(rate: float):
    clock = Clock()
    bucket = clock.bucket(rate)
    sends = []
    for _ in range(200):
        size = bucket.piece(1024**2)
        await bucket.take(size)
        sends.append((clock.now, size))
    for start, _ in sends:
        assert sum(size for at, size in sends if start <= at < start + 0.1) <= 0.2 * rate


async def test_there_is_no_burst_after_an_idle_hour():
    clock = Clock()
    bucket = clock.bucket(10_000)
    await bucket.take(400)
    clock.now += 3600
    idle_until = clock.now
    for _ in range(5):
        await bucket.take(400)
    assert 5 * 400 - (clock.now - idle_until) * 10_000 <= 0.11 * 10_000


async def test_no_cap_costs_nothing():
    clock = Clock()
    bucket = clock.bucket(None)
    assert bucket.piece(12345) == 12345
    assert await bucket.take(10**12) == 0.0
    assert clock.now == 1000.0


async def test_two_senders_share_evenly():
    bucket = Bandwidth(400_000)
    sent = [0, 0]
    stop = asyncio.Event()

    async def send(who: int) -> None:
        while not stop.is_set():
            size = bucket.piece(1024**2)
            await bucket.take(size)
            sent[who] += size

    senders = [asyncio.create_task(send(0)), asyncio.create_task(send(1))]
    async with asyncio.timeout(20):
        while sum(sent) < 200_000:
            await asyncio.sleep(0.01)
    stop.set()
    await asyncio.gather(*senders)
    assert abs(sent[0] - sent[1]) <= 4 * bucket.piece(1024**2)


async def test_real_uploads_together_hold_the_cap_over_twenty_seconds(orch: HttpOrchestrator, tmp_path: Path):
    rate = 1_000_000
    link = HttpLink(HttpPolicy(bandwidth_bytes_per_sec=rate))
    target = Target(orch.results_url)
    file = tmp_path / "model.tar.gz"
    file.write_bytes(b"m" * 10 * rate)
    done = asyncio.Event()
    samples: list[tuple[float, int]] = []

    async def sample() -> None:
        while not done.is_set():
            samples.append((time.monotonic(), sum(call.body_bytes for call in orch.seen("upload"))))
            await asyncio.sleep(0.1)

    started = time.monotonic()
    sampler = asyncio.create_task(sample())
    await asyncio.gather(
        *(upload_file(link, target, task, file, "model.tar.gz", lambda _sent, _total: None) for task in ("a", "b"))
    )
    took = time.monotonic() - started
    done.set()
    await sampler
    await link.aclose()
    assert took == pytest.approx(20, rel=0.1)
    # Smooth too: the server sees no second with more than a little above the cap.
    seconds = [samples[number] for number in range(0, len(samples), 10)]
    for (start, before), (end, after) in pairwise(seconds):
        assert after - before <= rate * (end - start) * 1.1 + 0.1 * rate + 65536


async def test_results_are_under_the_cap_too(orch: HttpOrchestrator, tmp_path: Path):
    link = HttpLink(HttpPolicy(bandwidth_bytes_per_sec=200_000))
    file = tmp_path / "responses.json"
    file.write_text('{"text": "' + "x" * 100_000 + '"}')
    started = time.monotonic()
    await post_result(link, Target(orch.results_url), ResultBody("t", "w", file))
    assert time.monotonic() - started > 0.4
    await link.aclose()


async def test_waiting_for_the_cap_is_no_stall(orch: HttpOrchestrator, tmp_path: Path):
    link = HttpLink(HttpPolicy(bandwidth_bytes_per_sec=10_000))
    file = tmp_path / "a.bin"
    file.write_bytes(b"a" * 6_000)
    await upload_file(link, Target(orch.results_url, timeout_sec=0.3), "t", file, "a.bin", lambda _sent, _total: None)
    assert orch.file("t", "a.bin") == file.read_bytes()
    await link.aclose()

"""Which engines live beside each other. The processes are stand-ins here; tests/with_daemon has the real ones."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from executors.contract import EnginePolicy
from worker import engine_pool
from worker.engine_pool import EnginePool
from worker.engine_process import EngineSetup

SETUP = EngineSetup("tag/", Path("unused"), EnginePolicy())


class StandIn:
    """Counts how many exclusive engines live at once; its end takes some turns of the loop."""

    living: set[str] = set()  # noqa: RUF012 - shared on purpose, emptied by the fixture

    def __init__(self, key: str) -> None:
        self.key = key
        self.alive = True
        StandIn.living.add(key)
        assert len({name for name in StandIn.living if name.startswith("model")}) <= 1

    @classmethod
    async def start(cls, key: str, target: str, setup: EngineSetup) -> StandIn:
        del target, setup
        await asyncio.sleep(0)
        return cls(key)

    async def stop(self, *, gently: bool = True) -> None:
        del gently
        self.alive = False
        for _ in range(5):
            await asyncio.sleep(0)
        StandIn.living.discard(self.key)

    def rest(self) -> None: ...


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch):
    StandIn.living.clear()
    monkeypatch.setattr(engine_pool, "EngineProcess", StandIn)


async def used(pool: EnginePool, key: str, *, exclusive: bool) -> None:
    engine, _ = await pool.acquire(key, "m:C", exclusive=exclusive)
    await pool.release(engine, keep=True)


async def test_an_exclusive_engine_starts_only_when_the_other_is_gone():
    pool = EnginePool(SETUP, 0)
    await used(pool, "light", exclusive=False)
    await used(pool, "model-1", exclusive=True)
    await used(pool, "model-2", exclusive=True)

    assert StandIn.living == {"light", "model-2"}
    await pool.close()


async def test_an_engine_that_expires_while_another_is_wanted_never_overlaps_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_pool, "_LONGEST_IDLE_CHECK_SEC", 0.0)
    pool = EnginePool(SETUP, 1e-9)
    await used(pool, "light", exclusive=False)
    await used(pool, "model-1", exclusive=True)
    idling = asyncio.create_task(pool.end_idle())
    while "light" in pool._slots:
        await asyncio.sleep(0)
    assert "light" in StandIn.living  # it is being ended, and model-1 is next

    engine, warm = await pool.acquire("model-2", "m:C", exclusive=True)

    assert not warm
    assert engine.alive
    assert StandIn.living & {"model-1", "model-2"} == {"model-2"}
    assert not idling.done()
    idling.cancel()
    await pool.close()


async def test_a_dead_engine_that_is_also_the_stalest_is_ended_once():
    pool = EnginePool(SETUP, 0)
    for number in range(4):
        await used(pool, f"light-{number}", exclusive=False)
    stalest, _ = await pool.acquire("light-0", "m:C", exclusive=False)
    await pool.release(stalest, keep=True)
    pool._slots["light-0"].idle_since = 0.0
    stalest.alive = False

    _, warm = await pool.acquire("light-0", "m:C", exclusive=False)

    assert not warm
    await pool.close()

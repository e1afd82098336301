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
        self.pids = frozenset({len(key)})
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
    while pool._slots["light"].engine.alive:
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


async def entered(pool: EnginePool, key: str = "model-1", *, concurrent: bool = True) -> StandIn:
    engine, _ = await pool.acquire(key, "m:C", exclusive=True, concurrent=concurrent)
    assert isinstance(engine, StandIn)
    return engine


async def settled(task: asyncio.Task[object] | None = None) -> None:
    """Let everything go on that can."""
    for _ in range(50):
        await asyncio.sleep(0)
    assert task is None or not task.done()


async def test_a_concurrent_engine_takes_several_tasks_and_idles_when_the_last_has_left():
    pool = EnginePool(SETUP, 0)
    first, second = await asyncio.gather(entered(pool), entered(pool))
    assert first is second
    await pool.release(first, keep=True)
    waiting = asyncio.create_task(entered(pool, "model-2"))
    await settled(waiting)
    assert first.alive

    await pool.release(second, keep=True)

    assert (await waiting).key == "model-2"
    assert not first.alive
    await pool.close()


async def test_an_engine_of_one_task_at_a_time_is_waited_for():
    pool = EnginePool(SETUP, 0)
    first = await entered(pool, concurrent=False)
    waiting = asyncio.create_task(entered(pool, concurrent=False))
    await settled(waiting)

    await pool.release(first, keep=True)

    assert await waiting is first
    await pool.close()


async def test_the_others_in_a_broken_engine_have_a_moment_and_nobody_enters_it():
    pool = EnginePool(SETUP, 0)
    broken = await entered(pool)
    await entered(pool)
    releasing = asyncio.create_task(pool.release(broken, keep=False))
    await settled(releasing)
    assert pool.warm_keys() == set()
    joining = asyncio.create_task(entered(pool))
    await settled(joining)
    assert broken.alive

    await pool.release(broken, keep=True)
    await releasing

    assert not broken.alive
    fresh = await joining
    assert fresh is not broken
    assert pool.warm_keys() == {"model-1"}
    await pool.close()


async def test_each_of_them_has_that_moment():
    pool = EnginePool(SETUP, 0)
    broken = await entered(pool)
    await entered(pool)
    await entered(pool)

    first = asyncio.create_task(pool.release(broken, keep=False))
    await settled(first)
    second = asyncio.create_task(pool.release(broken, keep=False))
    await settled(second)
    assert broken.alive  # the third has not heard yet

    await pool.release(broken, keep=False)
    await asyncio.gather(first, second)
    assert not broken.alive


async def test_the_moment_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_pool, "_LAST_WORDS_SEC", 0.0)
    pool = EnginePool(SETUP, 0)
    broken = await entered(pool)
    await entered(pool)

    await pool.release(broken, keep=False)

    assert not broken.alive
    await pool.release(broken, keep=False)  # the other one has heard of it now
    assert pool.warm_keys() == set()


async def test_an_engine_that_breaks_while_another_is_wanted_is_not_waited_for_longer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_pool, "_LAST_WORDS_SEC", 0.0)
    pool = EnginePool(SETUP, 0)
    broken = await entered(pool)
    await entered(pool)
    waiting = asyncio.create_task(entered(pool, "model-2"))
    await settled(waiting)

    await pool.release(broken, keep=False)

    assert (await waiting).key == "model-2"
    assert not broken.alive
    await pool.close()


async def test_who_wants_to_know_hears_of_each_engine_that_is_gone_before_the_next_starts():
    gone: list[tuple[str, frozenset[int], set[str]]] = []

    async def on_engine_gone(key: str, pids: frozenset[int]) -> None:
        gone.append((key, pids, {*StandIn.living}))

    pool = EnginePool(SETUP, 0, on_engine_gone)
    await used(pool, "model-1", exclusive=True)
    await used(pool, "model-22", exclusive=True)
    broken, _ = await pool.acquire("model-22", "m:C", exclusive=True)
    await pool.release(broken, keep=False)

    assert gone == [("model-1", frozenset({7}), set()), ("model-22", frozenset({8}), set())]
    await pool.close()


async def test_an_engine_whose_end_breaks_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch):
    pool = EnginePool(SETUP, 0)
    await used(pool, "model-1", exclusive=True)
    real_stop = StandIn.stop

    async def stop(engine: StandIn, *, gently: bool = True) -> None:
        await real_stop(engine, gently=gently)
        raise OSError("no descriptors")

    monkeypatch.setattr(StandIn, "stop", stop)
    await used(pool, "model-2", exclusive=True)

    assert pool.warm_keys() == {"model-2"}
    await pool.close()
    assert StandIn.living == set()


async def test_an_engine_that_nobody_waits_for_any_more_is_kept_warm():
    pool = EnginePool(SETUP, 0)
    holder = await entered(pool)
    acquiring = asyncio.create_task(pool.acquire("model-2", "m:C", exclusive=True))
    await settled(acquiring)
    pool.give_back_later(acquiring)

    await pool.release(holder, keep=True)
    await acquiring
    await settled()

    assert pool.warm_keys() == {"model-2"}
    assert (await entered(pool, "model-3")).key == "model-3"  # which waits until no task is in the other one
    await pool.close()


async def test_closing_does_not_wait_for_an_engine_that_nobody_waits_for():
    pool = EnginePool(SETUP, 0)
    await entered(pool)
    acquiring = asyncio.create_task(pool.acquire("model-2", "m:C", exclusive=True))
    await settled(acquiring)
    pool.give_back_later(acquiring)

    await pool.close()

    assert acquiring.cancelled()
    assert StandIn.living == set()

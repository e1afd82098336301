"""Keeps engines warm: one process for each engine key; at most one that uses the accelerator."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import structlog

from worker.engine_process import EngineProcess, EngineSetup

_MOST_LIGHT_ENGINES: Final = 4
_LONGEST_IDLE_CHECK_SEC: Final = 5.0
_LAST_WORDS_SEC: Final = 5.0
"""How long the other tasks in a broken engine may wait for their own end, which may be on its way."""

log = structlog.get_logger()


@dataclass
class _Slot:
    """An engine and how many tasks are in it.

    Attributes:
        closing: no new task gets it.
        changed: set when the last task has left it, and when it is to be closed.
    """

    engine: EngineProcess
    exclusive: bool
    concurrent: bool
    users: int = 0
    closing: bool = False
    idle_since: float = field(default_factory=time.monotonic)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def sound(self) -> bool:
        return self.engine.alive and not self.closing

    @property
    def open_to_more(self) -> bool:
        return self.sound and (self.concurrent or not self.users)

    def enter(self) -> EngineProcess:
        self.users += 1
        self.changed.clear()
        return self.engine

    def leave(self) -> None:
        self.users -= 1
        if not self.users:
            self.idle_since = time.monotonic()
            self.changed.set()

    def close(self) -> None:
        self.closing = True
        self.changed.set()


async def _nothing_to_do(key: str, pids: frozenset[int]) -> None:
    del key, pids


class EnginePool:
    """Hands out engines.

    Args:
        setup: what all engine processes share.
        idle_ttl_sec: an engine without a task for this long is ended; 0 is never.
        on_engine_gone: called with an engine's key and the processes that it consisted of, after they have been ended
            and before another engine starts; not when the pool closes. It must not raise.
    """

    def __init__(
        self,
        setup: EngineSetup,
        idle_ttl_sec: float,
        on_engine_gone: Callable[[str, frozenset[int]], Awaitable[None]] = _nothing_to_do,
    ) -> None:
        self._setup = setup
        self._idle_ttl_sec = idle_ttl_sec
        self._on_engine_gone = on_engine_gone
        self._slots: dict[str, _Slot] = {}
        self._changing = asyncio.Lock()
        """Held while engines start or end: the accelerator's memory is free only when the old process is gone."""
        self._unwanted: set[asyncio.Task[tuple[EngineProcess, bool]]] = set()
        """Wait for engines whose tasks have gone."""

    def warm_keys(self) -> set[str]:
        """Keys of the engines that can take a task, now or after those that are in them."""
        return {key for key, slot in self._slots.items() if slot.sound}

    async def acquire(
        self, key: str, target: str, *, exclusive: bool, concurrent: bool = False
    ) -> tuple[EngineProcess, bool]:
        """Give an engine to one task, and say whether it is warm. Replaces others where it has to.

        Waits while tasks are in an engine that would have to go, or in the wanted one if it takes one at a time.

        Args:
            key: what it has loaded, or shall load.
            target: the executor as "module:Class".
            exclusive: see `Executor.exclusive`.
            concurrent: see `Executor.concurrent`.

        Raises:
            OSError: no process can be started.
        """
        slot = self._slots.get(key)
        if slot is not None and slot.open_to_more:
            return slot.enter(), True
        async with self._changing:
            while (slot := self._slots.get(key)) is not None and slot.sound:
                if slot.open_to_more:
                    return slot.enter(), True
                await slot.changed.wait()
            await self._make_room(key, exclusive=exclusive)
            engine = await EngineProcess.start(key, target, self._setup)
            slot = self._slots[key] = _Slot(engine, exclusive, concurrent)
            return slot.enter(), False

    async def release(self, engine: EngineProcess, *, keep: bool) -> None:
        """Take an engine back from one task; end it unless it is to be kept.

        When it is not, no other task gets it any more, and those that are in it have a moment to hear how they ended.
        """
        slot = self._slots.get(engine.key)
        if slot is None or slot.engine is not engine:
            return
        slot.leave()
        if keep and engine.alive:
            return
        slot.close()
        async with self._changing:
            if self._slots.get(engine.key) is slot:  # else somebody else has ended it meanwhile
                await self._end(slot)

    async def end_idle(self) -> None:
        """End engines whose time is up, for ever; run it as a task of its own."""
        ttl_sec = self._idle_ttl_sec or math.inf
        while True:
            await asyncio.sleep(min(_LONGEST_IDLE_CHECK_SEC, ttl_sec / 4))
            oldest_allowed = time.monotonic() - ttl_sec
            for key in list(self._slots):
                async with self._changing:
                    slot = self._slots.get(key)
                    if slot is None or slot.users or (slot.idle_since >= oldest_allowed and slot.engine.alive):
                        continue
                    log.info("engine was idle", action="engine_idle", engine=key, ttl_sec=self._idle_ttl_sec)
                    await self._end(slot)

    def give_back_later(self, acquiring: asyncio.Task[tuple[EngineProcess, bool]]) -> None:
        """The task for which `acquiring` gets an engine has gone: keep the engine warm when it comes."""
        self._unwanted.add(acquiring)
        acquiring.add_done_callback(self._give_back)

    def _give_back(self, acquired: asyncio.Task[tuple[EngineProcess, bool]]) -> None:
        self._unwanted.discard(acquired)
        if acquired.cancelled():
            return
        if (error := acquired.exception()) is not None:
            log.warning("no engine process can be started", action="engine_start", error=str(error))
            return
        engine, _ = acquired.result()
        slot = self._slots.get(engine.key)
        if slot is not None and slot.engine is engine:
            slot.leave()

    async def close(self) -> None:
        """End all engines."""
        for unwanted in self._unwanted:
            unwanted.cancel()
        await asyncio.gather(*self._unwanted, return_exceptions=True)
        slots = list(self._slots.values())
        self._slots.clear()
        await asyncio.gather(*(self._stop(slot.engine) for slot in slots))

    async def _make_room(self, key: str, *, exclusive: bool) -> None:
        """End what must not live beside a new engine: a dead one, another exclusive one, the stalest light one."""
        ending = {k: slot for k, slot in self._slots.items() if k == key or (exclusive and slot.exclusive)}
        light = [(slot.idle_since, k) for k, slot in self._slots.items() if not slot.exclusive and not slot.users]
        if not exclusive and len(light) >= _MOST_LIGHT_ENGINES:
            stalest = min(light)[1]
            ending[stalest] = self._slots[stalest]
        for slot in ending.values():
            await self._end(slot)

    async def _end(self, slot: _Slot) -> None:
        """End an engine once its tasks have left it; if it is broken they get only a moment. Needs `_changing`."""
        while slot.users and slot.sound:
            await slot.changed.wait()
        slot.closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_SEC):
                while slot.users:
                    slot.changed.clear()
                    await slot.changed.wait()
        await self._stop(slot.engine)
        self._slots.pop(slot.engine.key, None)
        await self._on_engine_gone(slot.engine.key, slot.engine.pids)

    async def _stop(self, engine: EngineProcess) -> None:
        try:
            await engine.stop(gently=engine.alive)
        except Exception:  # it is logged; its processes were sent SIGKILL, and the next engine must not wait for ever
            log.exception("an engine could not be ended as it should", action="engine_stop", engine=engine.key)

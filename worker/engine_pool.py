"""Keeps engines warm: one process for each engine key; at most one that uses the accelerator."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field
from typing import Final

import structlog

from worker.engine_process import EngineProcess, EngineSetup

_MOST_LIGHT_ENGINES: Final = 4
_LONGEST_IDLE_CHECK_SEC: Final = 5.0

log = structlog.get_logger()


@dataclass
class _Slot:
    engine: EngineProcess
    exclusive: bool
    busy: bool = True
    idle_since: float = field(default_factory=time.monotonic)


class EnginePool:
    """Hands out engines.

    Args:
        setup: what all engine processes share.
        idle_ttl_sec: an engine without a task for this long is ended; 0 is never.
    """

    def __init__(self, setup: EngineSetup, idle_ttl_sec: float) -> None:
        self._setup = setup
        self._idle_ttl_sec = idle_ttl_sec
        self._slots: dict[str, _Slot] = {}
        self._changing = asyncio.Lock()
        """Held while engines start or end: the accelerator's memory is free only when the old process is gone."""

    async def acquire(self, key: str, target: str, *, exclusive: bool) -> tuple[EngineProcess, bool]:
        """Give an engine to one task, and say whether it is warm. Replaces others where it has to.

        Args:
            key: what it has loaded, or shall load.
            target: the executor as "module:Class".
            exclusive: see `Executor.exclusive`.

        Raises:
            OSError: no process can be started.
        """
        slot = self._slots.get(key)
        if slot is not None and slot.engine.alive:
            slot.busy = True
            return slot.engine, True
        async with self._changing:
            await self._make_room(key, exclusive=exclusive)
            engine = await EngineProcess.start(key, target, self._setup)
            self._slots[key] = _Slot(engine, exclusive)
        return engine, False

    async def release(self, engine: EngineProcess, *, keep: bool) -> None:
        """Take an engine back after its task; end it unless it is to be kept."""
        slot = self._slots.get(engine.key)
        if slot is None or slot.engine is not engine:
            return
        if keep and engine.alive:
            engine.rest()
            slot.busy = False
            slot.idle_since = time.monotonic()
        else:
            del self._slots[engine.key]
            async with self._changing:
                await engine.stop(gently=engine.alive)

    async def end_idle(self) -> None:
        """End engines whose time is up, for ever; run it as a task of its own."""
        ttl_sec = self._idle_ttl_sec or math.inf
        while True:
            await asyncio.sleep(min(_LONGEST_IDLE_CHECK_SEC, ttl_sec / 4))
            oldest_allowed = time.monotonic() - ttl_sec
            for key in list(self._slots):
                async with self._changing:
                    slot = self._slots.get(key)
                    if slot is None or slot.busy or (slot.idle_since >= oldest_allowed and slot.engine.alive):
                        continue
                    del self._slots[key]
                    log.info("engine was idle", action="engine_idle", engine=key, ttl_sec=self._idle_ttl_sec)
                    await slot.engine.stop()

    async def close(self) -> None:
        """End all engines."""
        slots = list(self._slots.values())
        self._slots.clear()
        await asyncio.gather(*(slot.engine.stop() for slot in slots))

    async def _make_room(self, key: str, *, exclusive: bool) -> None:
        """End what must not live beside a new engine: a dead one, another exclusive one, the stalest light one."""
        ending = {k for k, slot in self._slots.items() if k == key or (exclusive and slot.exclusive)}
        light = sorted((slot.idle_since, k) for k, slot in self._slots.items() if not slot.exclusive and not slot.busy)
        if not exclusive and len(light) >= _MOST_LIGHT_ENGINES:
            ending.add(light[0][1])
        for each in ending:
            await self._slots.pop(each).engine.stop()

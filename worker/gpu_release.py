"""Makes sure that an engine that has ended holds no GPU memory any more, and writes down what is free."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Sequence
from typing import Final

import structlog

from executors.gpu_memory import GpuMemory, describe, describe_holder, gib, gpu_memory
from executors.nvml_api import Nvml

_POLL_SEC: Final = 0.1
_MOST_SEC: Final = 10.0
_SLACK_BYTES: Final = 512 * 1024**2
"""Growth that proves nothing: the driver takes a little more or less."""

log = structlog.get_logger()


class GpuRelease:
    """Waits until an ended engine has given its GPU memory back, and says so only if that can be seen.

    Two things are looked at: NVML lists none of the engine's processes any more, and no more memory is in use than
    before the engine, but for what processes hold that came since. The second counts in a container with process ids
    of its own, where NVML may show no process at all.

    Args:
        nvml: a stand-in for the module `pynvml`.
    """

    def __init__(self, nvml: Nvml | None = None) -> None:
        self._nvml = nvml
        self._devices: tuple[str, ...] = ()
        self._at_rest: dict[str, int] = {}
        """Bytes of each GPU that were in use, by nobody who is listed, when no engine lived."""

    async def watch(self, devices: Iterable[str]) -> None:
        """Name the GPUs that engines may use, by their NVML UUIDs, before the first engine starts."""
        self._devices = tuple(devices)
        if self._devices:
            gpus, _ = await self._last_reading(frozenset())
            self._at_rest = {gpu.uuid: _unexplained(gpu) for gpu in gpus}

    async def engine_gone(self, key: str, pids: frozenset[int]) -> None:
        """Wait until the GPUs are free of an engine, some seconds at most; log what is free. Never raises.

        Args:
            key: the engine's key.
            pids: the processes it had.
        """
        if not self._devices or not pids:
            return
        try:
            began = time.monotonic()
            gpus, free = await self._last_reading(pids)
            self._report(key, pids, gpus, round(time.monotonic() - began, 2), free=free)
            self._at_rest |= {gpu.uuid: _unexplained(gpu) for gpu in gpus}
        except Exception:  # a fault of ours: it is logged, and the next engine starts as if nothing had been asked
            log.exception("cannot tell whether an engine's GPU memory is free", action="gpu_unknown", engine=key)

    async def _last_reading(self, pids: frozenset[int]) -> tuple[tuple[GpuMemory, ...], bool]:
        """The first reading that shows the memory free, or the last before time was up; and which of both it is."""
        gpus: tuple[GpuMemory, ...] = ()
        with contextlib.suppress(TimeoutError):  # also a driver that hangs must not keep the next engine waiting
            async with asyncio.timeout(_MOST_SEC):
                while True:
                    gpus = await asyncio.to_thread(gpu_memory, self._devices, self._nvml)
                    if not _held(gpus, pids) and not self._grown(gpus):
                        return gpus, True
                    await asyncio.sleep(_POLL_SEC)
        return gpus, False

    def _grown(self, gpus: Sequence[GpuMemory]) -> list[str]:
        """What is in use on GPUs beyond what was before the engine, one sentence for each."""
        more = {gpu.index: _unexplained(gpu) - self._at_rest.get(gpu.uuid, _unexplained(gpu)) for gpu in gpus}
        return [
            f"{gib(count)} GiB on GPU {index} by processes that NVML does not show"
            for index, count in more.items()
            if count > _SLACK_BYTES
        ]

    def _report(
        self, key: str, pids: frozenset[int], gpus: Sequence[GpuMemory], waited_sec: float, *, free: bool
    ) -> None:
        facts = {"engine": key, "gpus": [describe(gpu) for gpu in gpus], "waited_sec": waited_sec}
        silent = sorted(set(self._devices) - {gpu.uuid for gpu in gpus})
        others = _held(gpus, {holder.pid for gpu in gpus for holder in gpu.holders} - pids)
        if held := [*_held(gpus, pids), *self._grown(gpus)]:
            log.error("an engine has ended, but its GPU memory is still held", action="gpu_held", held=held, **facts)
        elif silent or not free:
            text = "an engine has ended; whether its GPU memory is free, some GPUs do not tell"
            log.warning(text, action="gpu_unknown", silent=silent, **facts)
        else:
            log.info("an engine has ended; its GPU memory is free", action="gpu_free", **facts)
        if others:
            log.info("other processes hold GPU memory", action="gpu_others", engine=key, holders=others)


def _unexplained(gpu: GpuMemory) -> int:
    """Bytes in use by nobody who is listed: the driver's own, and those of processes that cannot be seen from here."""
    return gpu.total_bytes - gpu.free_bytes - sum(holder.used_bytes or 0 for holder in gpu.holders)


def _held(gpus: Sequence[GpuMemory], pids: Iterable[int]) -> list[str]:
    """What these processes hold, one sentence for each of them and each GPU."""
    wanted = frozenset(pids)
    return [
        f"{describe_holder(holder)} on GPU {gpu.index}"
        for gpu in gpus
        for holder in gpu.holders
        if holder.pid in wanted
    ]

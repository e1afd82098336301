"""Makes sure that an engine that has ended holds no GPU memory any more, and writes down what is free."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Sequence
from typing import Final

import structlog

from executors.gpu_memory import GpuMemory, describe, describe_holder, gpu_memory
from executors.nvml_api import Nvml

_POLL_SEC: Final = 0.1
_MOST_SEC: Final = 10.0

log = structlog.get_logger()


class GpuRelease:
    """Waits until NVML shows no process of an ended engine on the GPUs of this worker.

    It knows processes by their ids. In a container with ids of its own NVML may hide them; then the amount that is
    free, which is logged with every end, is all there is to see.

    Args:
        nvml: a stand-in for the module `pynvml`.
    """

    def __init__(self, nvml: Nvml | None = None) -> None:
        self._nvml = nvml
        self._devices: tuple[str, ...] = ()

    def watch(self, devices: Iterable[str]) -> None:
        """Name the GPUs that engines may use, by their NVML UUIDs. Before this there is nothing to wait for."""
        self._devices = tuple(devices)

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
            gpus = await self._last_reading(pids)
            _report(key, pids, gpus, self._devices, round(time.monotonic() - began, 2))
        except Exception:  # a fault of ours: it is logged, and the next engine starts as if nothing had been asked
            log.exception("cannot tell whether an engine's GPU memory is free", action="gpu_unknown", engine=key)

    async def _last_reading(self, pids: frozenset[int]) -> tuple[GpuMemory, ...]:
        """The first reading without the engine's processes, or the last before time was up; empty if there is none."""
        gpus: tuple[GpuMemory, ...] = ()
        with contextlib.suppress(TimeoutError):  # also a driver that hangs must not keep the next engine waiting
            async with asyncio.timeout(_MOST_SEC):
                while True:
                    gpus = await asyncio.to_thread(gpu_memory, self._devices, self._nvml)
                    if not _held(gpus, pids):
                        break
                    await asyncio.sleep(_POLL_SEC)
        return gpus


def _report(
    key: str, pids: frozenset[int], gpus: Sequence[GpuMemory], devices: Sequence[str], waited_sec: float
) -> None:
    facts = {"engine": key, "gpus": [describe(gpu) for gpu in gpus], "waited_sec": waited_sec}
    silent = sorted(set(devices) - {gpu.uuid for gpu in gpus})
    others = _held(gpus, {holder.pid for gpu in gpus for holder in gpu.holders} - pids)
    if held := _held(gpus, pids):
        log.error("an engine has ended, but its GPU memory is still held", action="gpu_held", held=held, **facts)
    elif silent:
        text = "an engine has ended; whether its GPU memory is free, some GPUs do not tell"
        log.warning(text, action="gpu_unknown", silent=silent, **facts)
    else:
        log.info("an engine has ended; its GPU memory is free", action="gpu_free", **facts)
    if others:
        log.info("other processes hold GPU memory", action="gpu_others", engine=key, holders=others)


def _held(gpus: Sequence[GpuMemory], pids: Iterable[int]) -> list[str]:
    """What these processes hold, one sentence for each of them and each GPU."""
    wanted = frozenset(pids)
    return [
        f"{describe_holder(holder)} on GPU {gpu.index}"
        for gpu in gpus
        for holder in gpu.holders
        if holder.pid in wanted
    ]

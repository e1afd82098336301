"""How much memory of each GPU is free, and which processes hold the rest, read through NVML without torch.

A light helper beside the contract: executors use it in engine processes, and the daemon imports it too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import psutil

from executors.nvml_api import Nvml, import_nvml

_GIB: Final = 1024**3


@dataclass(frozen=True)
class MemoryHolder:
    """A process that holds memory of a GPU.

    Attributes:
        pid: its id as NVML tells it.
        used_bytes: bytes; None where the driver does not tell.
        command: its name; empty if it has ended or cannot be seen from here.
    """

    pid: int
    used_bytes: int | None
    command: str


@dataclass(frozen=True)
class GpuMemory:
    """The memory of one GPU, or of one MIG slice.

    Attributes:
        index: NVML's number of the card, as nvidia-smi shows it; a slice has the number of its card.
        uuid: `GPU-…` of a card, `MIG-…` of a slice.
        name: the product name.
        total_bytes: bytes; 0 where the hardware has no memory of its own to count.
        free_bytes: bytes that nobody holds.
        holders: the processes that hold some, by pid; in a container NVML may not show those outside of it.
    """

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    holders: tuple[MemoryHolder, ...]


def gpu_memory(devices: Sequence[str], nvml: Nvml | None = None) -> tuple[GpuMemory, ...]:
    """Read the memory of some GPUs; may block for as long as the driver does.

    Args:
        devices: NVML UUIDs (`GPU-…`, `MIG-…`), or NVML's numbers as text.
        nvml: a stand-in for the module `pynvml`.

    Returns:
        One reading for each device that answers, in the given order; nothing without a driver.
    """
    if not devices:
        return ()
    module = nvml or import_nvml()
    try:
        module.nvmlInit()
    except module.NVMLError:
        return ()
    try:
        found = [_read(module, device) for device in devices]
    finally:
        _shut_down(module)
    return tuple(memory for memory in found if memory is not None)


def describe(memory: GpuMemory) -> str:
    """Say in one line how much is free and who holds the rest."""
    free = f"{gib(memory.free_bytes)} of {gib(memory.total_bytes)} GiB free" if memory.total_bytes else "not countable"
    return "; ".join([f"GPU {memory.index} ({memory.name}): {free}", *(describe_holder(h) for h in memory.holders)])


def describe_holder(holder: MemoryHolder) -> str:
    """Say which process holds how much."""
    command = f" ({holder.command})" if holder.command else ""
    amount = "an unknown amount" if holder.used_bytes is None else f"{gib(holder.used_bytes)} GiB"
    return f"pid {holder.pid}{command} holds {amount}"


def gib(count: int) -> str:
    """Bytes as GiB, one decimal."""
    return f"{count / _GIB:.1f}"


def _read(nvml: Nvml, device: str) -> GpuMemory | None:
    """One device's memory; None if it does not exist or does not answer."""
    try:
        by_number = device.isdecimal()
        handle = nvml.nvmlDeviceGetHandleByIndex(int(device)) if by_number else nvml.nvmlDeviceGetHandleByUUID(device)
        card = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle) if device.startswith("MIG-") else handle
        holders = _holders(nvml, handle)
        total, free = _amounts(nvml, handle)  # after the holders: what one of them gives back meanwhile counts as free
        return GpuMemory(
            index=nvml.nvmlDeviceGetIndex(card),
            uuid=nvml.nvmlDeviceGetUUID(handle),
            name=nvml.nvmlDeviceGetName(handle),
            total_bytes=total,
            free_bytes=free,
            holders=holders,
        )
    except nvml.NVMLError:
        return None


def _amounts(nvml: Nvml, handle: object) -> tuple[int, int]:
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError_NotSupported:  # boards whose GPU shares the host's memory
        return 0, 0
    return memory.total, memory.free


def _holders(nvml: Nvml, handle: object) -> tuple[MemoryHolder, ...]:
    """All processes with memory on a device; one that is in several of NVML's lists counts once."""
    listed = list(nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    for more in (nvml.nvmlDeviceGetMPSComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        with contextlib.suppress(nvml.NVMLError):  # a slice has no graphics, an old card or driver no MPS
            listed += more(handle)
    amounts: dict[int, int | None] = {}
    for process in listed:
        told = [used for used in (amounts.get(process.pid), process.usedGpuMemory) if used is not None]
        amounts[process.pid] = max(told, default=None)
    return tuple(MemoryHolder(pid, used, _command(pid)) for pid, used in sorted(amounts.items()))


def _command(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return ""


def _shut_down(nvml: Nvml) -> None:
    with contextlib.suppress(nvml.NVMLError):  # the readings are there; what is left of NVML ends with the process
        nvml.nvmlShutdown()

"""What GPUs this worker may use, and what they draw and hold right now, read through NVML without torch.

The daemon reports only usable GPUs (WIRE 9.44), so the list is cut the way CUDA itself cuts it by
`CUDA_VISIBLE_DEVICES`. A host without GPUs or without the driver library is a normal case: every answer is then empty.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import structlog

from executors.nvml_api import Nvml, import_nvml

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class GpuDevice:
    """One GPU, or one MIG slice of a GPU.

    Attributes:
        index: NVML's number of the card, as nvidia-smi shows it; a slice has the number of its card.
        uuid: `GPU-…` of a card, `MIG-…` of a slice.
        name: the product name, as `gpu.type` is matched against it (WIRE 1.3).
        memory_total_bytes: bytes; 0 where the hardware has no memory of its own to count.
        is_mig: whether this is a slice.
    """

    index: int
    uuid: str
    name: str
    memory_total_bytes: int
    is_mig: bool = False


@dataclass(frozen=True)
class GpuFacts:
    """The usable GPUs in CUDA's order, with the versions the driver states (None without a driver)."""

    driver_version: str | None = None
    cuda_version: str | None = None
    devices: tuple[GpuDevice, ...] = ()


@dataclass(frozen=True)
class GpuPower:
    """The draw of one GPU in watts; None where it cannot be read (a MIG slice has no meter of its own)."""

    index: int
    watts: float | None


@dataclass(frozen=True)
class GpuUsage:
    """Memory in use (bytes) and utilisation (0 to 100 %) of one GPU; None where it cannot be read."""

    index: int
    memory_used_bytes: int | None
    utilisation_percent: int | None


@dataclass(frozen=True, eq=False)
class _Slot:
    """Something `CUDA_VISIBLE_DEVICES` can name. `device` is None when it exists but cannot be used."""

    names: tuple[str, ...]
    device: GpuDevice | None
    handle: object


class GpuReader:
    """Reads GPUs through NVML. Calls may block for as long as the driver does; use it from one thread at a time.

    Args:
        visible_devices: the value of `CUDA_VISIBLE_DEVICES`, None when it is not set. Its numbers are taken in NVML's
            order, which is CUDA's too for equal cards and with `CUDA_DEVICE_ORDER=PCI_BUS_ID`.
        nvml: a stand-in for the module `pynvml`, which is otherwise imported by `open`.
    """

    def __init__(self, visible_devices: str | None = None, nvml: Nvml | None = None) -> None:
        self._visible_devices = visible_devices
        self._given_nvml = nvml
        self._nvml: Nvml | None = None
        self._readable: tuple[tuple[GpuDevice, object], ...] | None = None
        self._reported: tuple[GpuDevice, ...] | None = None
        self._failing: set[tuple[str, str]] = set()

    def open(self) -> bool:
        """Start NVML once. False when there is no usable driver; trying again later is allowed."""
        if self._nvml is not None:
            return True
        nvml = self._given_nvml or import_nvml()
        try:
            nvml.nvmlInit()
        except (nvml.NVMLError_LibraryNotFound, nvml.NVMLError_DriverNotLoaded) as error:
            log.debug("no NVIDIA driver on this host", error=str(error))
            return False
        except nvml.NVMLError as error:
            log.warning("the NVIDIA driver is present but does not answer; no GPU is reported", error=str(error))
            return False
        self._nvml = nvml
        return True

    def close(self) -> None:
        """End NVML; a second call, or one without `open`, does nothing."""
        nvml, self._nvml, self._readable = self._nvml, None, None
        if nvml is None:
            return
        try:
            nvml.nvmlShutdown()
        except nvml.NVMLError as error:
            log.debug("NVML did not shut down cleanly", error=str(error))

    def facts(self) -> GpuFacts:
        """List the usable GPUs afresh. A card that fails is left out (and logged once); the others stay."""
        nvml = self._nvml
        if nvml is None:
            return GpuFacts()
        cards, slices = self._slots(nvml)
        chosen = _visible_slots(self._visible_devices, cards, slices)
        self._readable = tuple((slot.device, slot.handle) for slot in chosen if slot.device is not None)
        devices = tuple(device for device, _ in self._readable)
        if devices != self._reported:
            self._reported = devices
            level = logging.INFO if cards else logging.DEBUG
            uuids = [device.uuid for device in devices]
            log.log(level, "usable GPUs", cards=len(cards), visible_devices=self._visible_devices, usable=uuids)
        cuda = self._read("system", "cuda_version", nvml.nvmlSystemGetCudaDriverVersion_v2)
        return GpuFacts(
            driver_version=self._read("system", "driver_version", nvml.nvmlSystemGetDriverVersion),
            cuda_version=None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
            devices=devices,
        )

    def power(self) -> tuple[GpuPower, ...]:
        """Watts of each GPU that the last `facts` listed."""
        return tuple(GpuPower(device.index, self._watts(device, handle)) for device, handle in self._listed())

    def usage(self) -> tuple[GpuUsage, ...]:
        """Memory in use and utilisation of each GPU that the last `facts` listed."""
        return tuple(self._usage(device, handle) for device, handle in self._listed())

    def _listed(self) -> tuple[tuple[GpuDevice, object], ...]:
        if self._readable is None:
            self.facts()
        return self._readable or ()

    def _watts(self, device: GpuDevice, handle: object) -> float | None:
        nvml = self._nvml
        if nvml is None:
            return None
        milliwatts = self._read(device.uuid, "power", lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        return None if milliwatts is None else milliwatts / 1000

    def _usage(self, device: GpuDevice, handle: object) -> GpuUsage:
        nvml = self._nvml
        if nvml is None:
            return GpuUsage(device.index, None, None)
        memory = self._read(device.uuid, "memory", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used)
        busy = self._read(device.uuid, "utilisation", lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        return GpuUsage(device.index, memory, busy)

    def _slots(self, nvml: Nvml) -> tuple[list[_Slot], list[_Slot]]:
        """All cards in NVML's order, and all MIG slices; a MIG card stands for its first slice, as in CUDA."""
        cards: list[_Slot] = []
        slices: list[_Slot] = []
        for index in range(self._read("system", "gpu_count", nvml.nvmlDeviceGetCount) or 0):
            card, own_slices = self._card(nvml, index)
            cards.append(card)
            slices += own_slices
        return cards, slices

    def _card(self, nvml: Nvml, index: int) -> tuple[_Slot, list[_Slot]]:
        owner = f"gpu {index}"
        handle = self._read(owner, "handle", lambda: nvml.nvmlDeviceGetHandleByIndex(index))
        uuid = None if handle is None else self._read(owner, "uuid", lambda: nvml.nvmlDeviceGetUUID(handle))
        if uuid is None:
            return _Slot((), None, None), []
        mig_mode = self._read(owner, "mig_mode", lambda: nvml.nvmlDeviceGetMigMode(handle))
        if mig_mode is None or not mig_mode[0]:
            device = self._read(owner, "facts", lambda: _describe(nvml, index, handle))
            return _Slot((uuid,), device, handle), []
        slices = self._slices(nvml, index, handle, uuid)
        usable = next((part for part in slices if part.device is not None), _Slot((), None, None))
        return _Slot((uuid,), usable.device, usable.handle), slices

    def _slices(self, nvml: Nvml, index: int, card: object, card_uuid: str) -> list[_Slot]:
        count = self._read(card_uuid, "mig_count", lambda: nvml.nvmlDeviceGetMaxMigDeviceCount(card)) or 0
        reads = [
            self._read(f"{card_uuid} slice {position}", "facts", partial(_slice, nvml, index, card, position))
            for position in range(count)
        ]
        return [slot for slot in reads if slot is not None]

    def _read(self, owner: str, what: str, call: Callable[[], T]) -> T | None:
        """Ask NVML one thing; None when it fails. A failure is logged when it begins, not at every reading."""
        nvml = self._nvml
        if nvml is None:
            return None
        try:
            value = call()
        except nvml.NVMLError as error:
            if (owner, what) not in self._failing:
                self._failing.add((owner, what))
                level = logging.DEBUG if isinstance(error, nvml.NVMLError_NotSupported) else logging.WARNING
                log.log(level, "a GPU reading fails", gpu=owner, reading=what, error=str(error))
            return None
        self._failing.discard((owner, what))
        return value


def _describe(nvml: Nvml, index: int, handle: object, *, is_mig: bool = False) -> GpuDevice:
    try:
        memory_total_bytes = nvml.nvmlDeviceGetMemoryInfo(handle).total
    except nvml.NVMLError_NotSupported:  # boards whose GPU shares the host's memory
        memory_total_bytes = 0
    return GpuDevice(index, nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle), memory_total_bytes, is_mig)


def _slice(nvml: Nvml, index: int, card: object, position: int) -> _Slot | None:
    """The MIG slice at a position of a card, None when that position is empty."""
    try:
        handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, position)
    except nvml.NVMLError_NotFound:
        return None
    device = _describe(nvml, index, handle, is_mig=True)
    instance = f"{nvml.nvmlDeviceGetGpuInstanceId(handle)}/{nvml.nvmlDeviceGetComputeInstanceId(handle)}"
    return _Slot((device.uuid, f"MIG-{nvml.nvmlDeviceGetUUID(card)}/{instance}"), device, handle)


def _visible_slots(visible_devices: str | None, cards: list[_Slot], slices: list[_Slot]) -> list[_Slot]:
    """What a CUDA process would enumerate, in its order.

    The list ends at the first name that means nothing or is of another kind than the first one; a repeated name
    empties it. A process gets one MIG slice at most, and with it no whole card (NVIDIA MIG User Guide, "CUDA Device
    Enumeration"), so a second slice would be a GPU that no task can use.
    """
    chosen = list(cards) if visible_devices is None else _named_slots(visible_devices, cards, slices)
    usable = [slot for slot in chosen if slot.device is not None]
    first_slice = next((slot for slot in usable if slot.device is not None and slot.device.is_mig), None)
    return usable if first_slice is None else [first_slice]


def _named_slots(visible_devices: str, cards: list[_Slot], slices: list[_Slot]) -> list[_Slot]:
    names = [name.strip() for name in visible_devices.split(",")]
    chosen: list[_Slot] = []
    for name in names:
        slot = _find(name, cards, slices) if _kind(name) == _kind(names[0]) else None
        if slot is None:
            return chosen
        if slot in chosen:
            return []
        chosen.append(slot)
    return chosen


def _kind(name: str) -> str:
    return name[:4] if name.startswith(("GPU-", "MIG-")) else "number"


def _find(name: str, cards: list[_Slot], slices: list[_Slot]) -> _Slot | None:
    """The card of this number or the only one whose UUID begins like this; None when there is none or are several."""
    if _kind(name) == "number":
        number = re.match(r"\+?([0-9]+)", name)  # CUDA reads the leading digits and ignores the rest
        return cards[int(number[1])] if number and int(number[1]) < len(cards) else None
    pool = slices if _kind(name) == "MIG-" else cards
    exact = [slot for slot in pool if name in slot.names]
    matches = exact or [slot for slot in pool if slot.names and slot.names[0].startswith(name)]
    return matches[0] if len(matches) == 1 else None

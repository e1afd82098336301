"""A stand-in for NVML that raises the real module's errors."""
# ruff: noqa: N802, ARG002 -- it repeats NVML's names and arguments

from dataclasses import dataclass, field
from types import SimpleNamespace

import pynvml

GIB = 1024**3


@dataclass
class Process:
    """An entry in NVML's lists of processes."""

    pid: int
    usedGpuMemory: int | None  # noqa: N815 -- NVML's name


@dataclass
class Card:
    """A card or a slice, which is its own handle. A reading that is an exception is raised."""

    uuid: object
    name: str = "NVIDIA H100 80GB HBM3"
    total: object = 80 * GIB
    used: int = 3 * GIB
    milliwatts: object = 288_500
    busy: object = 97
    mig_slices: "list[Card | None] | None" = None
    instance: tuple[int, int] = (0, 0)
    processes: "list[Process] | Exception" = field(default_factory=list)
    graphics: "list[Process] | Exception" = field(default_factory=list)


def answer(value: object) -> object:
    if isinstance(value, Exception):
        raise value
    return value


@dataclass
class FakeNvml:
    """Stands in for the module `pynvml`, and raises its errors."""

    cards: list[object] = field(default_factory=list)
    init_error: Exception | None = None
    shutdown_error: Exception | None = None
    calls: list[str] = field(default_factory=list)

    NVMLError = pynvml.NVMLError
    NVMLError_DriverNotLoaded = pynvml.NVMLError_DriverNotLoaded
    NVMLError_LibraryNotFound = pynvml.NVMLError_LibraryNotFound
    NVMLError_NotFound = pynvml.NVMLError_NotFound
    NVMLError_NotSupported = pynvml.NVMLError_NotSupported

    def nvmlInit(self) -> None:
        self.calls.append("init")
        answer(self.init_error)

    def nvmlShutdown(self) -> None:
        self.calls.append("shutdown")
        answer(self.shutdown_error)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.95.05"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 13020

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int):
        return answer(self.cards[index])

    def nvmlDeviceGetHandleByUUID(self, uuid: str):
        parts = [part for card in self.cards for part in card.mig_slices or [] if part is not None]
        found = [each for each in (*self.cards, *parts) if each.uuid == uuid]
        if not found:
            raise pynvml.NVMLError_NotFound(pynvml.NVML_ERROR_NOT_FOUND)
        return found[0]

    def nvmlDeviceGetIndex(self, handle: Card):
        return self.cards.index(handle)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: Card):
        return next(card for card in self.cards if handle in (card.mig_slices or []))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Card):
        self.calls.append("processes")
        return answer(handle.processes)

    def nvmlDeviceGetMPSComputeRunningProcesses(self, handle: Card):
        raise pynvml.NVMLError_NotSupported(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: Card):
        return answer(handle.graphics)

    def nvmlDeviceGetUUID(self, handle: Card):
        return answer(handle.uuid)

    def nvmlDeviceGetName(self, handle: Card):
        return handle.name

    def nvmlDeviceGetMemoryInfo(self, handle: Card):
        total = answer(handle.total)
        return SimpleNamespace(total=total, used=handle.used, free=total - handle.used)

    def nvmlDeviceGetMigMode(self, handle: Card):
        if handle.mig_slices is None and "H100" not in handle.name:
            raise pynvml.NVMLError_NotSupported(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(handle.mig_slices is not None)] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Card):
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Card, index: int):
        slices = [*handle.mig_slices, *[None] * 7]
        if slices[index] is None:
            raise pynvml.NVMLError_NotFound(pynvml.NVML_ERROR_NOT_FOUND)
        return slices[index]

    def nvmlDeviceGetGpuInstanceId(self, handle: Card):
        return handle.instance[0]

    def nvmlDeviceGetComputeInstanceId(self, handle: Card):
        return handle.instance[1]

    def nvmlDeviceGetPowerUsage(self, handle: Card):
        return answer(handle.milliwatts)

    def nvmlDeviceGetUtilizationRates(self, handle: Card):
        return SimpleNamespace(gpu=answer(handle.busy))


def error(code: int) -> Exception:
    return pynvml.NVMLError(code)


def mig_card(first: str = "a") -> Card:
    """An H100 in MIG mode: a gap at position 1, slices at 0 and 2."""
    unsupported = error(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def part(uuid: str, instance: tuple[int, int]) -> Card:
        name = "NVIDIA H100 80GB HBM3 MIG 3g.40gb"
        return Card(uuid, name, 40 * GIB, GIB, unsupported, unsupported, instance=instance)

    return Card(
        f"GPU-{first}3b1c0de-0000-4106-c12f-20bd9faed9f6",
        mig_slices=[part(f"MIG-{first}11f05e2-1", (1, 0)), None, part(f"MIG-{first}22f05e2-2", (2, 0))],
    )

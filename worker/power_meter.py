"""How much power this host draws: the `power` and `power_summary` objects of WIRE 2.3, and the cost of the time.

CPU power comes from RAPL, whose counters hold energy: power is the difference of two readings over the time between.
GPU power comes from NVML as watts: energy is the area under them (trapezoids between readings). What cannot be
measured is null in `power` and adds nothing to the sums; `samples` tells how much stands behind each average.
"""

import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import structlog
from pydantic import BaseModel, ConfigDict, FiniteFloat

from worker.gpu_facts import GpuPower

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_JOULES_PER_KWH = 3_600_000
_PACKAGE_FOLDER = re.compile(r"intel-rapl:[0-9]+")  # AMD processors appear under this name too


class GpuPowerSource(Protocol):
    """Whoever reads GPU watts: `worker.gpu_facts.GpuReader`."""

    def power(self) -> tuple[GpuPower, ...]:
        """Watts of each GPU now."""
        ...


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GpuWatts(_Report):
    """One of `gpu_watts.per_gpu[]`."""

    index: int
    power_w: FiniteFloat | None


class GpuWattsReport(_Report):
    """`gpu_watts`; `total` is the sum of what could be read, null when nothing could."""

    total: FiniteFloat | None
    per_gpu: tuple[GpuWatts, ...]


class PowerSample(_Report):
    """`HEARTBEAT.metrics.power` (WIRE 2.3); `timestamp` is ISO 8601 in UTC."""

    timestamp: str
    cpu_watts: FiniteFloat | None
    gpu_watts: GpuWattsReport


class EnergyBreakdown(_Report):
    """`estimated_energy_breakdown`, in kWh."""

    cpu_kwh: FiniteFloat
    gpu_kwh: FiniteFloat


class SampleCounts(_Report):
    """`samples`: how many readings each average stands on; 0 means that the average says nothing."""

    cpu: int
    gpu: int


class PowerSummary(_Report):
    """`power_summary` (WIRE 2.3), over the whole uptime. The contract has no null here: unmeasured is 0."""

    uptime_sec: FiniteFloat
    avg_cpu_watts: FiniteFloat
    avg_gpu_watts: FiniteFloat
    per_gpu_avg_watts: dict[str, FiniteFloat]
    estimated_energy_kwh: FiniteFloat
    estimated_energy_breakdown: EnergyBreakdown
    samples: SampleCounts


class PowerMeter:
    """Samples power and adds up energy. Call `sample` once a beat; RAPL counters wrap after some minutes of full load.

    Args:
        gpus: reads GPU watts.
        rapl_root: the folder with `intel-rapl:<n>`.
        monotonic: seconds of a clock that never goes back; the uptime counts from construction.
        now: the time of day, with its zone.
    """

    def __init__(
        self,
        gpus: GpuPowerSource,
        rapl_root: Path = Path("/sys/class/powercap"),
        *,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._gpus = gpus
        self._monotonic = monotonic
        self._now = now
        self._started = monotonic()
        self._last_sample = self._started
        self._packages = [_RaplPackage(folder) for folder in _package_folders(rapl_root)]
        self._cpu = _Mean()
        self._gpu = _Mean()
        self._per_gpu: defaultdict[int, _Mean] = defaultdict(_Mean)
        self._cpu_joules = 0.0
        self._gpu_joules = 0.0
        self._last_gpu_watts: dict[int, float] = {}

    def sample(self) -> PowerSample:
        """Read all meters now. `cpu_watts` is the mean since the last call, GPU watts are of the moment."""
        moment = self._monotonic()
        seconds = max(0.0, moment - self._last_sample)
        self._last_sample = moment
        return PowerSample(
            timestamp=self._now().isoformat(),
            cpu_watts=self._sample_cpu(seconds),
            gpu_watts=self._sample_gpus(seconds),
        )

    def summary(self) -> PowerSummary:
        """Sum up all samples so far; takes none itself."""
        cpu_kwh = round(self._cpu_joules / _JOULES_PER_KWH, 9)
        gpu_kwh = round(self._gpu_joules / _JOULES_PER_KWH, 9)
        return PowerSummary(
            uptime_sec=round(self.uptime_sec(), 3),
            avg_cpu_watts=self._cpu.value(),
            avg_gpu_watts=self._gpu.value(),
            per_gpu_avg_watts={str(index): mean.value() for index, mean in sorted(self._per_gpu.items())},
            estimated_energy_kwh=round(cpu_kwh + gpu_kwh, 9),
            estimated_energy_breakdown=EnergyBreakdown(cpu_kwh=cpu_kwh, gpu_kwh=gpu_kwh),
            samples=SampleCounts(cpu=self._cpu.count, gpu=self._gpu.count),
        )

    def estimated_energy_kwh(self) -> float:
        """Energy of CPU and GPUs since the start, in kWh (WIRE 2.3, beside `power_summary`)."""
        return self.summary().estimated_energy_kwh

    def uptime_sec(self) -> float:
        """Seconds since construction."""
        return max(0.0, self._monotonic() - self._started)

    def _sample_cpu(self, seconds: float) -> float | None:
        used = [joules for package in self._packages if (joules := package.joules_since_last_reading()) is not None]
        if not used:
            return None
        self._cpu_joules += sum(used)
        if seconds == 0:
            return None
        watts = round(sum(used) / seconds, 3)
        self._cpu.add(watts)
        return watts

    def _sample_gpus(self, seconds: float) -> GpuWattsReport:
        readings = [GpuWatts(index=gpu.index, power_w=_plausible(gpu.watts)) for gpu in self._gpus.power()]
        watts = {reading.index: reading.power_w for reading in readings if reading.power_w is not None}
        for index, power in watts.items():
            self._per_gpu[index].add(power)
            if index in self._last_gpu_watts:
                self._gpu_joules += (self._last_gpu_watts[index] + power) / 2 * seconds
        self._last_gpu_watts = watts
        total = round(sum(watts.values()), 3) if watts else None
        if total is not None:
            self._gpu.add(total)
        return GpuWattsReport(total=total, per_gpu=tuple(readings))


def accrued_cost_usd(cost_per_hour: float, uptime_sec: float) -> float:
    """Cost so far in US dollars: cost_per_hour / 3600 * uptime (WIRE 2.3); always a finite number.

    Raises:
        ValueError: an argument is negative, NaN or infinite.
    """
    for name, value in (("cost_per_hour", cost_per_hour), ("uptime_sec", uptime_sec)):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} is {value}, expected a finite number of at least 0")
    return round(min(cost_per_hour / 3600 * uptime_sec, sys.float_info.max), 6)


class _Mean:
    """The mean of what was added; 0 before the first."""

    def __init__(self) -> None:
        self.count = 0
        self._total = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self._total += value

    def value(self) -> float:
        return round(self._total / self.count, 3) if self.count else 0.0


class _RaplPackage:
    """One processor package: a counter of microjoules that starts again at 0 after `max_energy_range_uj`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reported = False
        self._last = self._read("energy_uj")

    def joules_since_last_reading(self) -> float | None:
        """Energy used since the last call; None when either of the two readings failed."""
        last, self._last = self._last, self._read("energy_uj")
        if last is None or self._last is None:
            return None
        used = self._last - last
        if used < 0:
            span = self._read("max_energy_range_uj")
            if span is None or used + span < 0:
                return None
            used += span
        return used / 1e6

    def _read(self, name: str) -> int | None:
        try:
            return int((self._folder / name).read_text(encoding="ascii"))
        except (OSError, ValueError) as error:  # since 2020 kernels let only root read it; a container may hide it
            if not self._reported:
                self._reported = True
                log.info("CPU power cannot be measured", path=str(self._folder / name), error=str(error))
            return None


def _package_folders(root: Path) -> list[Path]:
    """The processor packages. Their parts (core, dram) and the whole platform (psys) would be counted twice."""
    return sorted(
        folder
        for folder in root.glob("intel-rapl:*")
        if _PACKAGE_FOLDER.fullmatch(folder.name) and _zone_name(folder).startswith("package")
    )


def _zone_name(folder: Path) -> str:
    try:
        return (folder / "name").read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        log.info("a RAPL zone has no name and is left out", path=str(folder), error=str(error))
        return ""


def _plausible(watts: float | None) -> float | None:
    """The reading, or None when it is no power at all."""
    return round(watts, 3) if watts is not None and math.isfinite(watts) and watts >= 0 else None

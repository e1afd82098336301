"""What this host is and how busy it is: the `hardware_json` object of WIRE 1.3, the load, and a name for the boot.

Limits that a container sets (cgroup v2) win over what the host has: tasks placed by the host's figures would be killed.
"""

import ipaddress
import os
import platform
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import structlog
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from worker.gpu_facts import GpuDevice, GpuFacts

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Addresses reserved for documentation (RFC 5737, RFC 3849): routed like any other, and nobody is there.
_ELSEWHERE = ("192.0.2.1", "2001:db8::1")


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CpuSection(_Facts):
    """`cpu` of WIRE 1.3; `logical_cores` is what this process may use."""

    logical_cores: int = Field(ge=1)
    model: str


class MemorySection(_Facts):
    """`memory` of WIRE 1.3, in bytes."""

    total_bytes: int = Field(gt=0)


class GpuEntry(_Facts):
    """One of `gpu.gpus[]`: the matcher reads `memory_total_bytes`, the scorer `memory_bytes`; they are equal."""

    index: int
    uuid: str
    name: str
    memory_total_bytes: int
    memory_bytes: int


class GpuSection(_Facts):
    """`gpu` of WIRE 1.3; present, with an empty list, on hosts without a GPU."""

    driver_version: str | None
    cuda_version: str | None
    gpus: tuple[GpuEntry, ...]


class NetworkSection(_Facts):
    """`network` of WIRE 1.3; the bandwidth (bytes per second) appears only when throttling is configured."""

    ip: str | None
    bandwidth_bytes_per_sec: FiniteFloat | None = Field(default=None, gt=0, exclude_if=lambda value: value is None)


class Hardware(_Facts):
    """The whole `hardware_json` object (WIRE 1.3). No section is ever null, which would stop all dispatch."""

    cpu: CpuSection
    memory: MemorySection
    gpu: GpuSection
    network: NetworkSection

    def to_json(self) -> str:
        """Write the text for the hash field `hardware_json`."""
        return self.model_dump_json()


@dataclass(frozen=True)
class CgroupLimits:
    """The tightest cgroup v2 limits above this process: bytes, and CPUs as a fraction; None where there is none."""

    memory_bytes: int | None = None
    cpus: float | None = None


def read_hardware(
    gpus: GpuFacts,
    *,
    redis_host: str | None = None,
    bandwidth_bytes_per_sec: float | None = None,
    root: Path = Path("/"),
) -> Hardware:
    """Describe this host as WIRE 1.3 asks.

    Args:
        gpus: what `GpuReader.facts` answered.
        redis_host: host of `REDIS_URL`, only used to choose which of our addresses to show; it is not resolved.
        bandwidth_bytes_per_sec: the configured throttle, bytes per second.
        root: the folder that holds `proc` and `sys`.
    """
    limits = read_cgroup_limits(root)
    memory = psutil.virtual_memory().total
    return Hardware(
        cpu=CpuSection(logical_cores=_usable_cores(limits.cpus), model=_cpu_model(root)),
        memory=MemorySection(total_bytes=min(memory, limits.memory_bytes or memory)),
        gpu=GpuSection(
            driver_version=gpus.driver_version,
            cuda_version=gpus.cuda_version,
            gpus=tuple(_gpu_entry(device) for device in gpus.devices),
        ),
        network=NetworkSection(ip=own_address(redis_host), bandwidth_bytes_per_sec=bandwidth_bytes_per_sec),
    )


def read_cgroup_limits(root: Path = Path("/")) -> CgroupLimits:
    """Read `memory.max` and `cpu.max` of this process's cgroup and of all above it; the smallest one binds."""
    memory: list[int] = []
    cpus: list[float] = []
    for folder in _cgroup_folders(root):
        memory += [int(word) for word in _words(folder / "memory.max") if word.isdecimal()]
        match _words(folder / "cpu.max"):
            case [quota, period] if quota.isdecimal() and period.isdecimal() and int(period) > 0:
                cpus.append(int(quota) / int(period))
    return CgroupLimits(memory_bytes=min(memory, default=None), cpus=min(cpus, default=None))


def own_address(peer: str | None) -> str | None:
    """Which of our addresses faces `peer`; None when the host has no route.

    Connecting a UDP socket only asks the routing table; nothing is sent. A name would need a DNS query and a loopback
    peer says nothing about how others reach us: both then mean the address of the default route.
    """
    candidates = [peer] if peer is not None and _is_remote_address(peer) else []
    for candidate in (*candidates, *_ELSEWHERE):
        family = socket.AF_INET6 if ":" in candidate else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((candidate, 9))
                address = str(probe.getsockname()[0])
        except OSError as error:
            log.debug("no route", towards=candidate, error=str(error))
            continue
        if _is_remote_address(address):
            return address
    return None


def load_average() -> dict[str, float]:
    """`loadavg` of WIRE 2.3: runnable processes over 1, 5 and 15 minutes; empty when the system does not tell."""
    try:
        one, five, fifteen = os.getloadavg()
    except OSError:
        return {}
    return {"1m": round(one, 2), "5m": round(five, 2), "15m": round(fifteen, 2)}


def host_id(root: Path = Path("/")) -> str:
    """`<hostname>:<boot id>`: the same as long as process ids found here still mean the same processes."""
    try:
        boot = (root / "proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError as error:
        log.warning("this boot has no id; a reboot will go unnoticed", error=str(error))
        boot = "unknown-boot"
    return f"{socket.gethostname()}:{boot}"


def _gpu_entry(device: GpuDevice) -> GpuEntry:
    return GpuEntry(
        index=device.index,
        uuid=device.uuid,
        name=device.name,
        memory_total_bytes=device.memory_total_bytes,
        memory_bytes=device.memory_total_bytes,
    )


def _usable_cores(quota: float | None) -> int:
    """Whole cores: those that the affinity mask leaves, cut by the quota; a worker with half a core still has one."""
    allowed = len(os.sched_getaffinity(0))
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def _cpu_model(root: Path) -> str:
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        log.debug("no CPU description", error=str(error))
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next((name for name in named if name), platform.machine())  # ARM kernels name no model


def _cgroup_folders(root: Path) -> Iterator[Path]:
    """The cgroup v2 folder of this process and those above it, up to the mount."""
    mount = root / "sys/fs/cgroup"
    own = next((line[3:] for line in _lines(root / "proc/self/cgroup") if line.startswith("0::/")), "/")
    parts = [part for part in own.split("/") if part]
    if ".." in parts:  # seen from inside a nested cgroup namespace: only the mount's own root is known
        parts = []
    for depth in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:depth])


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:  # the cgroup root, a host without cgroup v2, a controller that is off
        return []
    except OSError as error:
        log.warning("a cgroup limit cannot be read", path=str(path), error=str(error))
        return []


def _is_remote_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified)

"""Host facts from planted proc and cgroup files."""

import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import pytest
from pydantic import ValidationError

from worker import host_facts
from worker.gpu_facts import GpuDevice, GpuFacts
from worker.host_facts import CgroupLimits, host_id, load_average, own_address, read_cgroup_limits, read_hardware

GIB = 1024**3


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with 16 usable cores and 64 GiB, on cgroup v2 without limits."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(host_facts.psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB))
    plant(tmp_path, "proc/cpuinfo", "processor\t: 0\nmodel name\t: AMD EPYC 9354\n\nmodel name\t: other\n")
    plant(tmp_path, "proc/self/cgroup", "0::/system.slice/worker.service\n")
    plant(tmp_path, "proc/sys/kernel/random/boot_id", "1b0e4c9e-5f0f-4d3f-8a58-2a53e8a0b7d1\n")
    return tmp_path


def plant(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_hardware_has_the_shape_of_wire_1_3(host: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host_facts, "own_address", lambda peer: f"faces {peer}")
    gpus = GpuFacts("580.95.05", "13.0", (GpuDevice(3, "GPU-8932f937", "NVIDIA H100 80GB HBM3", 80 * GIB),))
    text = read_hardware(gpus, redis_host="10.0.0.9", bandwidth_bytes_per_sec=1.25e6, root=host).to_json()
    assert json.loads(text) == {
        "cpu": {"logical_cores": 16, "model": "AMD EPYC 9354"},
        "memory": {"total_bytes": 64 * GIB},
        "gpu": {
            "driver_version": "580.95.05",
            "cuda_version": "13.0",
            "gpus": [
                {
                    "index": 3,
                    "uuid": "GPU-8932f937",
                    "name": "NVIDIA H100 80GB HBM3",
                    "memory_total_bytes": 80 * GIB,
                    "memory_bytes": 80 * GIB,
                }
            ],
        },
        "network": {"ip": "faces 10.0.0.9", "bandwidth_bytes_per_sec": 1.25e6},
    }


def test_a_host_without_gpu_and_throttle_has_every_section_and_no_bandwidth(
    host: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(host_facts, "own_address", lambda _: None)
    hardware = read_hardware(GpuFacts(), root=host)
    document = json.loads(hardware.to_json())
    assert document == hardware.model_dump(mode="json")
    assert document["gpu"] == {"driver_version": None, "cuda_version": None, "gpus": []}
    assert document["network"] == {"ip": None}


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bandwidth_that_is_none_is_refused(host: Path, bandwidth: float):
    with pytest.raises(ValidationError, match="bandwidth_bytes_per_sec"):
        read_hardware(GpuFacts(), bandwidth_bytes_per_sec=bandwidth, root=host)


def test_a_container_limit_wins_over_the_host(host: Path):
    plant(host, "sys/fs/cgroup/system.slice/worker.service/memory.max", f"{8 * GIB}\n")
    plant(host, "sys/fs/cgroup/system.slice/worker.service/cpu.max", "250000 100000\n")
    hardware = read_hardware(GpuFacts(), root=host)
    assert hardware.memory.total_bytes == 8 * GIB
    assert hardware.cpu.logical_cores == 2


def test_a_limit_above_the_host_changes_nothing(host: Path):
    plant(host, "sys/fs/cgroup/system.slice/memory.max", f"{1024 * GIB}\n")
    plant(host, "sys/fs/cgroup/system.slice/cpu.max", "6400000 100000\n")
    hardware = read_hardware(GpuFacts(), root=host)
    assert (hardware.memory.total_bytes, hardware.cpu.logical_cores) == (64 * GIB, 16)


def test_less_than_one_cpu_still_counts_as_one(host: Path):
    plant(host, "sys/fs/cgroup/system.slice/cpu.max", "50000 100000\n")
    assert read_hardware(GpuFacts(), root=host).cpu.logical_cores == 1


def test_the_tightest_limit_on_the_way_to_the_mount_binds(host: Path):
    plant(host, "sys/fs/cgroup/system.slice/worker.service/memory.max", "max\n")
    plant(host, "sys/fs/cgroup/system.slice/worker.service/cpu.max", "max 100000\n")
    plant(host, "sys/fs/cgroup/system.slice/memory.max", f"{4 * GIB}\n")
    plant(host, "sys/fs/cgroup/memory.max", f"{6 * GIB}\n")
    plant(host, "sys/fs/cgroup/cpu.max", "150000 100000\n")
    assert read_cgroup_limits(host) == CgroupLimits(memory_bytes=4 * GIB, cpus=1.5)


@pytest.mark.parametrize(
    "membership", ["0::/\n", "0::/../../other\n", "4:memory:/docker/abc\n0::/\n", "", "0::/gone\n"]
)
def test_inside_a_namespace_the_mounts_own_files_hold(host: Path, membership: str):
    plant(host, "proc/self/cgroup", membership)
    plant(host, "sys/fs/cgroup/memory.max", f"{2 * GIB}\n")
    assert read_cgroup_limits(host) == CgroupLimits(memory_bytes=2 * GIB, cpus=None)


@pytest.mark.parametrize("text", ["", "max 100000", "100000", "100000 0", "x y", "-5 100000"])
def test_a_cpu_limit_that_says_nothing_is_no_limit(host: Path, text: str):
    plant(host, "sys/fs/cgroup/cpu.max", text)
    assert read_cgroup_limits(host) == CgroupLimits()


def test_no_cgroup_files_at_all_mean_no_limits(tmp_path: Path):
    assert read_cgroup_limits(tmp_path) == CgroupLimits(None, None)


def test_a_cpu_without_model_name_shows_its_architecture(host: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host_facts.platform, "machine", lambda: "aarch64")
    plant(host, "proc/cpuinfo", "processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert read_hardware(GpuFacts(), root=host).cpu.model == "aarch64"
    (host / "proc/cpuinfo").unlink()
    assert read_hardware(GpuFacts(), root=host).cpu.model == "aarch64"


class FakeNetwork:
    """Stands in for `socket.socket`: knows routes, remembers what was asked, and cannot send."""

    def __init__(self, routes: dict[str, str]) -> None:
        self.routes = routes
        self.asked: list[tuple[int, int, str]] = []

    def __call__(self, family: int, kind: int) -> Self:
        self.opened = (family, kind)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def connect(self, address: tuple[str, int]) -> None:
        self.asked.append((*self.opened, address[0]))
        if address[0] not in self.routes:
            raise OSError(101, "Network is unreachable")
        self.local = self.routes[address[0]]

    def getsockname(self) -> tuple[str, int]:
        return self.local, 40000


@pytest.mark.parametrize(
    ("peer", "routes", "address", "asked"),
    [
        ("10.1.2.3", {"10.1.2.3": "10.1.9.9", "192.0.2.1": "172.17.0.2"}, "10.1.9.9", ["10.1.2.3"]),
        ("fd00::5", {"fd00::5": "fd00::1"}, "fd00::1", ["fd00::5"]),
        ("redis.example.org", {"192.0.2.1": "172.17.0.2"}, "172.17.0.2", ["192.0.2.1"]),
        ("127.0.0.1", {"192.0.2.1": "172.17.0.2"}, "172.17.0.2", ["192.0.2.1"]),
        (None, {"2001:db8::1": "2001:678::7"}, "2001:678::7", ["192.0.2.1", "2001:db8::1"]),
        ("10.1.2.3", {"10.1.2.3": "0.0.0.0"}, None, ["10.1.2.3", "192.0.2.1", "2001:db8::1"]),
        ("localhost", {}, None, ["192.0.2.1", "2001:db8::1"]),
    ],
)
def test_own_address_asks_the_routing_table_only(
    monkeypatch: pytest.MonkeyPatch, peer: str | None, routes: dict[str, str], address: str | None, asked: list[str]
):
    network = FakeNetwork(routes)
    monkeypatch.setattr(socket, "socket", network)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("a name was resolved"))
    assert own_address(peer) == address
    assert [host for _, _, host in network.asked] == asked
    assert {kind for _, kind, _ in network.asked} == {socket.SOCK_DGRAM}
    assert all((family == socket.AF_INET6) == (":" in host) for family, _, host in network.asked)


def test_load_average_names_its_three_windows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (2.104, 1.9, 1.2))
    assert load_average() == {"1m": 2.1, "5m": 1.9, "15m": 1.2}


def test_load_average_is_empty_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch):
    def refuse() -> None:
        raise OSError("Load averages are unobtainable")

    monkeypatch.setattr(os, "getloadavg", refuse)
    assert load_average() == {}


def test_host_id_joins_hostname_and_boot(host: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "ember")
    assert host_id(host) == "ember:1b0e4c9e-5f0f-4d3f-8a58-2a53e8a0b7d1"
    (host / "proc/sys/kernel/random/boot_id").unlink()
    assert host_id(host) == "ember:unknown-boot"


def test_this_very_host_can_be_described():
    hardware = read_hardware(GpuFacts(), redis_host="localhost")
    assert 1 <= hardware.cpu.logical_cores <= len(os.sched_getaffinity(0))
    assert hardware.memory.total_bytes > 64 * 1024**2
    assert hardware.cpu.model
    assert host_id().startswith(socket.gethostname() + ":")

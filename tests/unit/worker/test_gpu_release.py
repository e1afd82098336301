"""After an engine has ended: wait until NVML shows none of its processes, and say what is free."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pynvml
import pytest
from fake_nvml import GIB, Card, FakeNvml, Process, error
from structlog.testing import capture_logs

from worker import gpu_release
from worker.gpu_release import GpuRelease

ENGINE = frozenset({2**22 + 1, 2**22 + 2})
"""Ids that no process has: they are above the largest that Linux gives."""
FIRST, SECOND = sorted(ENGINE)
STRANGER = 2**22 + 3


class ScriptedNvml(FakeNvml):
    """Shows other processes at each reading; the last ones for ever."""

    def __init__(self, *readings: list[Process] | Exception) -> None:
        super().__init__([Card("GPU-a", used=70 * GIB)])
        self.readings: Iterator[list[Process] | Exception] = iter(readings)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Card) -> list[Process]:  # noqa: N802 -- NVML's name
        handle.processes = next(self.readings, handle.processes)
        if isinstance(handle.processes, list) and not handle.processes:
            handle.used = 2 * GIB
        return super().nvmlDeviceGetComputeRunningProcesses(handle)


def engine_gone(
    nvml: FakeNvml, *, devices: tuple[str, ...] = ("GPU-a",), pids: frozenset[int] = ENGINE
) -> list[dict[str, object]]:
    """What is logged at the end of an engine."""

    async def main() -> None:
        release = GpuRelease(nvml)
        release._devices = devices  # without the reading before the engine
        await release.engine_gone("k", pids)

    with capture_logs() as logs:
        asyncio.run(main())
    return [dict(entry) for entry in logs]


def levels(logs: list[dict[str, object]]) -> list[tuple[object, object]]:
    return [(entry["log_level"], entry["action"]) for entry in logs]


def test_it_waits_until_the_engines_processes_are_gone_and_says_what_is_free(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_release, "_POLL_SEC", 0.001)
    nvml = ScriptedNvml([Process(FIRST, 60 * GIB), Process(SECOND, GIB)], [Process(SECOND, GIB)], [])

    (entry,) = engine_gone(nvml)

    assert (entry["log_level"], entry["action"], entry["engine"]) == ("info", "gpu_free", "k")
    assert entry["gpus"] == ["GPU 0 (NVIDIA H100 80GB HBM3): 78.0 of 80.0 GiB free"]
    assert isinstance(entry["waited_sec"], float)
    assert nvml.calls.count("processes") == 3


def test_memory_that_stays_held_is_an_error_that_names_process_and_amount(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_release, "_POLL_SEC", 0.001)
    monkeypatch.setattr(gpu_release, "_MOST_SEC", 0.1)

    held, others = engine_gone(ScriptedNvml([Process(FIRST, 60 * GIB), Process(STRANGER, None)]))

    assert (held["log_level"], held["action"]) == ("error", "gpu_held")
    assert held["held"] == [f"pid {FIRST} holds 60.0 GiB on GPU 0"]
    assert (others["log_level"], others["action"]) == ("info", "gpu_others")


def test_other_holders_are_named_and_not_waited_for():
    nvml = ScriptedNvml([Process(STRANGER, 9 * GIB)])

    logs = engine_gone(nvml)

    assert levels(logs) == [("info", "gpu_free"), ("info", "gpu_others")]
    assert logs[1]["holders"] == [f"pid {STRANGER} holds 9.0 GiB on GPU 0"]
    assert nvml.calls.count("processes") == 1


@pytest.mark.parametrize(("devices", "pids"), [((), ENGINE), (("GPU-a",), frozenset[int]())])
def test_without_gpus_or_processes_nothing_is_read(devices: tuple[str, ...], pids: frozenset[int]):
    nvml = ScriptedNvml([Process(FIRST, GIB)])

    assert engine_gone(nvml, devices=devices, pids=pids) == []
    assert nvml.calls == []


def test_before_the_gpus_are_known_nothing_is_read():
    nvml = ScriptedNvml([Process(FIRST, GIB)])

    asyncio.run(GpuRelease(nvml).engine_gone("k", ENGINE))

    assert nvml.calls == []


@pytest.mark.parametrize(
    "nvml",
    [
        FakeNvml(init_error=error(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)),
        ScriptedNvml(error(pynvml.NVML_ERROR_GPU_IS_LOST)),
    ],
)
def test_a_gpu_that_does_not_answer_is_not_called_free(nvml: FakeNvml):
    (entry,) = engine_gone(nvml)

    assert (entry["log_level"], entry["action"], entry["silent"]) == ("warning", "gpu_unknown", ["GPU-a"])


def test_a_driver_that_hangs_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_release, "_MOST_SEC", 0.05)
    answers = threading.Event()
    nvml = FakeNvml([Card("GPU-a")])
    monkeypatch.setattr(nvml, "nvmlInit", lambda: answers.wait(30))

    async def main() -> None:
        release = GpuRelease(nvml)
        release._devices = ("GPU-a",)
        await release.engine_gone("k", ENGINE)
        answers.set()  # the thread must end before the loop can

    with capture_logs() as logs:
        asyncio.run(main())
    assert levels([dict(entry) for entry in logs]) == [("warning", "gpu_unknown")]


def test_a_fault_of_ours_is_logged_and_stops_nothing():
    (entry,) = engine_gone(ScriptedNvml(RuntimeError("boom")))

    assert (entry["log_level"], entry["action"]) == ("error", "gpu_unknown")


def test_cancelling_ends_the_wait():
    async def main() -> None:
        nvml = ScriptedNvml([Process(FIRST, GIB)])
        release = GpuRelease(nvml)
        release._devices = ("GPU-a",)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(release.engine_gone("k", ENGINE), 0.05)

    with capture_logs() as logs:
        asyncio.run(main())
    assert logs == []


def test_memory_that_nobody_is_seen_to_hold_is_not_called_free(monkeypatch: pytest.MonkeyPatch):
    """In a container NVML may show no process."""
    monkeypatch.setattr(gpu_release, "_POLL_SEC", 0.001)
    monkeypatch.setattr(gpu_release, "_MOST_SEC", 0.1)
    card = Card("GPU-a", used=2 * GIB)
    nvml = FakeNvml([card])

    async def main() -> None:
        release = GpuRelease(nvml)
        await release.watch(("GPU-a",))
        card.used = 72 * GIB
        await release.engine_gone("k", ENGINE)
        await release.engine_gone("next", ENGINE)
        card.used = 2 * GIB
        await release.engine_gone("last", ENGINE)

    with capture_logs() as logs:
        asyncio.run(main())
    assert levels([dict(entry) for entry in logs]) == [
        ("error", "gpu_held"),
        ("info", "gpu_free"),
        ("info", "gpu_free"),
    ]
    assert logs[0]["held"] == ["70.0 GiB on GPU 0 by processes that NVML does not show"]

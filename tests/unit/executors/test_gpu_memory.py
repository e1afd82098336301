"""What is free on a GPU and who holds the rest, against a stand-in for NVML."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pynvml
import pytest
from fake_nvml import GIB, Card, FakeNvml, Process, error, mig_card

from executors.gpu_memory import GpuMemory, MemoryHolder, describe, gpu_memory

NOBODY = 2**22 + 1
"""No process has this id: it is above the largest that Linux gives."""


def test_free_memory_and_holders_of_the_named_gpus():
    me = psutil.Process().name()
    busy = Card("GPU-b", used=70 * GIB, processes=[Process(NOBODY, None), Process(os.getpid(), 69 * GIB)])
    nvml = FakeNvml([Card("GPU-a"), busy])

    memory = gpu_memory(("GPU-b", "0"), nvml)

    assert memory == (
        GpuMemory(
            index=1,
            uuid="GPU-b",
            name="NVIDIA H100 80GB HBM3",
            total_bytes=80 * GIB,
            free_bytes=10 * GIB,
            holders=(MemoryHolder(os.getpid(), 69 * GIB, me), MemoryHolder(NOBODY, None, "")),
        ),
        GpuMemory(0, "GPU-a", "NVIDIA H100 80GB HBM3", 80 * GIB, 77 * GIB, ()),
    )
    assert (nvml.calls[0], nvml.calls[-1]) == ("init", "shutdown")


def test_a_slice_has_the_number_of_its_card_and_its_own_holders():
    card = mig_card()
    slices = [part for part in card.mig_slices or [] if part is not None]
    slices[1].processes = [Process(NOBODY, GIB)]

    (memory,) = gpu_memory((str(slices[1].uuid),), FakeNvml([Card("GPU-plain"), card]))

    assert (memory.index, memory.uuid, memory.free_bytes) == (1, slices[1].uuid, 39 * GIB)
    assert [holder.pid for holder in memory.holders] == [NOBODY]


@pytest.mark.parametrize(
    ("compute", "graphics", "used"),
    [(GIB, None, GIB), (None, GIB, GIB), (GIB, 2 * GIB, 2 * GIB), (None, None, None), (0, None, 0), (None, 0, 0)],
)
def test_a_process_in_two_lists_counts_once(compute: int | None, graphics: int | None, used: int | None):
    card = Card("GPU-a", processes=[Process(NOBODY, compute)], graphics=[Process(NOBODY, graphics)])

    (memory,) = gpu_memory(("0",), FakeNvml([card]))

    assert memory.holders == (MemoryHolder(NOBODY, used, ""),)


def test_a_list_that_the_hardware_does_not_have_is_left_out():
    card = Card("GPU-a", processes=[Process(NOBODY, GIB)], graphics=error(pynvml.NVML_ERROR_NOT_SUPPORTED))

    (memory,) = gpu_memory(("0",), FakeNvml([card]))

    assert [holder.pid for holder in memory.holders] == [NOBODY]


def test_without_a_driver_or_without_devices_there_is_nothing():
    without = FakeNvml(init_error=error(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    unasked = FakeNvml([Card("GPU-a")])

    assert gpu_memory(("0",), without) == ()
    assert gpu_memory((), unasked) == ()
    assert (without.calls, unasked.calls) == (["init"], [])


def test_a_device_that_does_not_answer_hides_no_other():
    lost = error(pynvml.NVML_ERROR_GPU_IS_LOST)
    nvml = FakeNvml([Card("GPU-a", total=lost), Card("GPU-b", processes=lost), Card("GPU-c")], shutdown_error=lost)

    assert [memory.uuid for memory in gpu_memory(("GPU-a", "GPU-b", "GPU-none", "GPU-c"), nvml)] == ["GPU-c"]


def test_a_board_that_shares_the_hosts_memory_still_shows_its_holders():
    unsupported = error(pynvml.NVML_ERROR_NOT_SUPPORTED)
    card = Card("GPU-s", "NVIDIA GB10", total=unsupported, processes=[Process(NOBODY, GIB)])

    (memory,) = gpu_memory(("0",), FakeNvml([card]))

    assert describe(memory) == f"GPU 0 (NVIDIA GB10): not countable; pid {NOBODY} holds 1.0 GiB"


def test_one_line_for_people():
    holders = (MemoryHolder(4711, int(70.2 * GIB), "python"), MemoryHolder(4712, None, "Xorg"))
    memory = GpuMemory(0, "GPU-a", "NVIDIA H100", int(79.6 * GIB), int(3.1 * GIB), holders)

    assert describe(memory) == (
        "GPU 0 (NVIDIA H100): 3.1 of 79.6 GiB free; pid 4711 (python) holds 70.2 GiB; "
        "pid 4712 (Xorg) holds an unknown amount"
    )


def test_importing_the_helper_does_not_import_nvml():
    script = "import sys, executors.gpu_memory, worker.gpu_release; sys.exit('pynvml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0


def test_the_real_library_or_its_absence_is_tolerated():
    assert gpu_memory(("GPU-of-nobody",)) == ()

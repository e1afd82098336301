"""GPU facts against a stand-in for NVML that raises the real module's errors."""

import subprocess
import sys

import pynvml
import pytest
from fake_nvml import GIB, Card, FakeNvml, error, mig_card
from structlog.testing import capture_logs

from executors.nvml_api import Nvml, import_nvml
from worker.gpu_facts import GpuFacts, GpuPower, GpuReader, GpuUsage


def opened(cards: list[object], visible: str | None = None) -> GpuReader:
    reader = GpuReader(visible, FakeNvml(cards))
    assert reader.open()
    return reader


def eight_cards() -> list[object]:
    return [Card(f"GPU-{digit}932f937-d72c-4106-c12f-20bd9faed9f6") for digit in range(8)]


def visible_indexes(cards: list[object], visible: str | None) -> list[int]:
    return [device.index for device in opened(cards, visible).facts().devices]


def test_no_driver_is_a_normal_case_and_hardly_logged():
    for code in (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED):
        reader = GpuReader(None, FakeNvml(init_error=error(code)))
        with capture_logs() as logs:
            assert not reader.open()
            assert reader.facts() == GpuFacts(None, None, ())
            assert reader.power() == ()
            assert reader.usage() == ()
            reader.close()
        assert {entry["log_level"] for entry in logs} == {"debug"}


def test_a_driver_that_does_not_answer_is_a_warning_and_may_be_tried_again():
    nvml = FakeNvml([Card("GPU-a")], init_error=error(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH))
    reader = GpuReader(None, nvml)
    with capture_logs() as logs:
        assert not reader.open()
    assert [entry["log_level"] for entry in logs] == ["warning"]
    nvml.init_error = None
    assert reader.open()
    assert len(reader.facts().devices) == 1


def test_opens_and_closes_once_and_survives_a_bad_shutdown():
    nvml = FakeNvml([], shutdown_error=error(pynvml.NVML_ERROR_UNINITIALIZED))
    reader = GpuReader(None, nvml)
    assert reader.open()
    assert reader.open()
    reader.close()
    reader.close()
    assert nvml.calls == ["init", "shutdown"]
    assert reader.facts() == GpuFacts()


def test_a_driver_without_cards_reports_its_versions():
    assert opened([]).facts() == GpuFacts("580.95.05", "13.2", ())


def test_one_card_with_all_its_readings():
    reader = opened([Card("GPU-8932f937", "Tesla T4", 16 * GIB, 2 * GIB, 61_250, 40)])
    device = reader.facts().devices[0]
    assert (device.index, device.uuid, device.name) == (0, "GPU-8932f937", "Tesla T4")
    assert (device.memory_total_bytes, device.is_mig) == (16 * GIB, False)
    assert reader.power() == (GpuPower(0, 61.25),)
    assert reader.usage() == (GpuUsage(0, 2 * GIB, 40),)


def test_readings_need_no_call_of_facts_before_them():
    assert opened([Card("GPU-a")]).power() == (GpuPower(0, 288.5),)


@pytest.mark.parametrize(
    ("visible", "indexes"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("", []),
        ("  ", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("all", []),
        ("3", [3]),
        ("5, 2 ,7", [5, 2, 7]),
        ("0,1,-1,2", [0, 1]),
        ("1,8,2", [1]),
        ("1,,2", [1]),
        ("1,x,2", [1]),
        ("2,2", []),
        ("1gpu", [1]),
        ("GPU-4932f", [4]),
        ("GPU-6932f937-d72c-4106-c12f-20bd9faed9f6,GPU-1", [6, 1]),
        ("GPU-3,GPU-,GPU-2", [3]),
        ("GPU-3,GPU-ffff,GPU-2", [3]),
        ("GPU-3,GPU-3932", []),
        ("GPU-3,2", [3]),
        ("2,GPU-3", [2]),
        ("MIG-GPU-3932f937-d72c-4106-c12f-20bd9faed9f6/1/0", []),
    ],
)
def test_visible_devices_cut_the_list_as_cuda_does(visible: str | None, indexes: list[int]):
    assert visible_indexes(eight_cards(), visible) == indexes


def test_an_exact_uuid_wins_over_a_longer_one():
    assert visible_indexes([Card("GPU-12"), Card("GPU-1")], "GPU-1") == [1]


@pytest.mark.parametrize(
    ("visible", "uuid"),
    [
        (None, "MIG-a11f05e2-1"),
        ("1", "MIG-a11f05e2-1"),
        ("0,1", "MIG-a11f05e2-1"),
        ("GPU-a3b1c0de", "MIG-a11f05e2-1"),
        ("MIG-a22f05e2-2", "MIG-a22f05e2-2"),
        ("MIG-a22", "MIG-a22f05e2-2"),
        ("MIG-a22f05e2-2,MIG-a11f05e2-1", "MIG-a22f05e2-2"),
        ("MIG-GPU-a3b1c0de-0000-4106-c12f-20bd9faed9f6/2/0", "MIG-a22f05e2-2"),
        ("0", "GPU-plain"),
    ],
)
def test_a_process_gets_one_slice_and_then_no_whole_card(visible: str | None, uuid: str):
    devices = opened([Card("GPU-plain"), mig_card()], visible).facts().devices
    assert [device.uuid for device in devices] == [uuid]
    assert [device.is_mig for device in devices] == [uuid.startswith("MIG-")]


@pytest.mark.parametrize("visible", ["MIG-a", "MIG-ffff", "MIG-GPU-a3b1c0de-0000-4106-c12f-20bd9faed9f6/9/0"])
def test_an_ambiguous_or_unknown_slice_is_nothing(visible: str | None):
    assert visible_indexes([mig_card()], visible) == []


def test_a_slice_has_its_own_memory_and_no_power_meter():
    reader = opened([mig_card()])
    with capture_logs() as logs:
        device = reader.facts().devices[0]
        assert (device.index, device.memory_total_bytes) == (0, 40 * GIB)
        assert "MIG 3g.40gb" in device.name
        assert reader.power() == (GpuPower(0, None),)
        assert reader.usage() == (GpuUsage(0, GIB, None),)
    assert not [entry for entry in logs if entry["log_level"] in ("warning", "error")]


def test_a_mig_card_without_slices_cannot_be_used_and_hides_nothing():
    assert visible_indexes([Card("GPU-empty", mig_slices=[]), Card("GPU-b")], None) == [1]
    assert visible_indexes([Card("GPU-empty", mig_slices=[]), Card("GPU-b")], "0,1") == [1]


def test_a_lost_card_keeps_its_number_and_hides_nothing():
    cards = eight_cards()
    cards[2] = error(pynvml.NVML_ERROR_GPU_IS_LOST)
    cards[5].uuid = error(pynvml.NVML_ERROR_UNKNOWN)
    assert visible_indexes(cards, None) == [0, 1, 3, 4, 6, 7]
    assert visible_indexes(cards, "5,2,3") == [3]


def test_a_card_whose_memory_fails_is_left_out_and_reported_once():
    cards = eight_cards()
    cards[0].total = error(pynvml.NVML_ERROR_UNKNOWN)
    reader = opened(cards, "GPU-0,GPU-1")
    with capture_logs() as logs:
        assert [device.index for device in reader.facts().devices] == [1]
        assert [device.index for device in reader.facts().devices] == [1]
    failures = [entry for entry in logs if entry["log_level"] == "warning"]
    assert [(entry["gpu"], entry["error"]) for entry in failures] == [("gpu 0", "Unknown Error")]


def test_a_board_that_shares_the_hosts_memory_stays_with_none_of_its_own():
    reader = opened([Card("GPU-spark", "NVIDIA GB10", total=error(pynvml.NVML_ERROR_NOT_SUPPORTED))])
    assert [device.memory_total_bytes for device in reader.facts().devices] == [0]


def test_a_card_lost_between_beats_is_null_logged_once_and_heard_again_after_recovery():
    cards = eight_cards()
    reader = opened(cards, "0,1")
    reader.facts()
    lost = error(pynvml.NVML_ERROR_GPU_IS_LOST)
    with capture_logs() as logs:
        cards[0].milliwatts = lost
        assert reader.power() == (GpuPower(0, None), GpuPower(1, 288.5))
        assert reader.power() == (GpuPower(0, None), GpuPower(1, 288.5))
        assert len(logs) == 1
        cards[0].milliwatts = 100_000
        assert reader.power()[0] == GpuPower(0, 100.0)
        cards[0].milliwatts = lost
        assert reader.power()[0] == GpuPower(0, None)
    assert [entry["gpu"] for entry in logs] == [cards[0].uuid] * 2


def test_the_usable_list_is_logged_when_it_changes_only():
    cards = eight_cards()
    reader = opened(cards, "0,1")
    with capture_logs() as logs:
        reader.facts()
        reader.facts()
        cards[1].total = error(pynvml.NVML_ERROR_GPU_IS_LOST)
        reader.facts()
    lists = [entry["usable"] for entry in logs if entry["event"] == "usable GPUs"]
    assert lists == [[cards[0].uuid, cards[1].uuid], [cards[0].uuid]]


def test_the_real_module_has_everything_that_is_asked_of_it():
    module = import_nvml()
    wanted = {name for name in {*vars(Nvml), *Nvml.__annotations__} if name.startswith(("nvml", "NVML"))}
    assert len(wanted) == 27
    assert {name for name in wanted if not hasattr(module, name)} == set()


def test_importing_the_reader_does_not_import_nvml():
    script = "import sys, worker.gpu_facts, worker.host_facts, worker.power_meter; sys.exit('pynvml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0


def test_the_real_library_or_its_absence_is_tolerated():
    reader = GpuReader("")  # no GPU is named, so that hosts with and without GPUs answer alike
    reader.open()
    assert reader.facts().devices == ()
    assert reader.power() == ()
    reader.close()

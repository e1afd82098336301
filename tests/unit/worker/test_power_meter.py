"""Power and energy from planted RAPL trees, replayed GPU readings and a hand-turned clock."""

import json
import math
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from worker.gpu_facts import GpuPower
from worker.power_meter import PowerMeter, accrued_cost_usd

RANGE_UJ = 262_143_328_850


class Clock:
    """Seconds and time of day, moved by hand."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return datetime(2031, 4, 2, 9, 16, tzinfo=UTC) + timedelta(seconds=self.seconds - 1000)


class Gpus:
    """GPUs that draw what the test says."""

    def __init__(self, *watts: float | None) -> None:
        self.watts = watts

    def power(self) -> tuple[GpuPower, ...]:
        return tuple(GpuPower(index, watts) for index, watts in enumerate(self.watts))


class Rapl:
    """A powercap folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def zone(self, folder: str, name: str, energy_uj: object) -> None:
        path = self.root / folder
        path.mkdir(exist_ok=True)
        (path / "name").write_text(f"{name}\n")
        (path / "energy_uj").write_text(f"{energy_uj}\n")
        (path / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rapl(tmp_path: Path) -> Rapl:
    return Rapl(tmp_path)


def meter_of(clock: Clock, rapl: Rapl, gpus: Gpus) -> PowerMeter:
    return PowerMeter(gpus, rapl.root, monotonic=clock.monotonic, now=clock.now)


def test_a_sample_has_the_shape_of_wire_2_3(clock: Clock, rapl: Rapl):
    rapl.zone("intel-rapl:0", "package-0", 5_000_000)
    meter = meter_of(clock, rapl, Gpus(288.5, None))
    rapl.zone("intel-rapl:0", "package-0", 5_000_000 + 61 * 30 * 1_000_000)
    clock.seconds += 30
    assert json.loads(meter.sample().model_dump_json()) == {
        "timestamp": "2031-04-02T09:16:30+00:00",
        "cpu_watts": 61.0,
        "gpu_watts": {"total": 288.5, "per_gpu": [{"index": 0, "power_w": 288.5}, {"index": 1, "power_w": None}]},
    }


def test_a_summary_has_the_shape_of_wire_2_3(clock: Clock, rapl: Rapl):
    rapl.zone("intel-rapl:0", "package-0", 0)
    gpus = Gpus(100.0, 200.0)
    meter = meter_of(clock, rapl, gpus)
    for minute in range(61):  # an hour in minutes: CPU 60 W throughout, GPUs 300 W throughout
        clock.seconds = 1000.0 + 60 * minute
        rapl.zone("intel-rapl:0", "package-0", 60 * 60 * minute * 1_000_000)
        meter.sample()
    assert json.loads(meter.summary().model_dump_json()) == {
        "uptime_sec": 3600.0,
        "avg_cpu_watts": 60.0,
        "avg_gpu_watts": 300.0,
        "per_gpu_avg_watts": {"0": 100.0, "1": 200.0},
        "estimated_energy_kwh": 0.36,
        "estimated_energy_breakdown": {"cpu_kwh": 0.06, "gpu_kwh": 0.3},
        "samples": {"cpu": 60, "gpu": 61},
    }
    assert meter.estimated_energy_kwh() == 0.36


def test_a_host_without_meters_reports_null_and_zeros(clock: Clock, rapl: Rapl):
    meter = meter_of(clock, rapl, Gpus())
    clock.seconds += 12.5
    sample = meter.sample()
    assert sample.cpu_watts is None
    assert sample.gpu_watts.model_dump() == {"total": None, "per_gpu": ()}
    summary = meter.summary()
    assert summary.uptime_sec == 12.5
    assert (summary.avg_cpu_watts, summary.avg_gpu_watts, summary.per_gpu_avg_watts) == (0.0, 0.0, {})
    assert summary.estimated_energy_kwh == 0.0
    assert summary.samples.model_dump() == {"cpu": 0, "gpu": 0}


def test_packages_add_up_and_their_parts_do_not(clock: Clock, rapl: Rapl):
    zones = {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1", "intel-rapl:10": "package-10"}
    parts = {"intel-rapl:0:0": "core", "intel-rapl:0:1": "dram", "intel-rapl:2": "psys"}
    for folder, name in {**zones, **parts}.items():
        rapl.zone(folder, name, 0)
    meter = meter_of(clock, rapl, Gpus())
    for folder, name in {**zones, **parts}.items():
        rapl.zone(folder, name, 400_000_000)
    clock.seconds += 10
    assert meter.sample().cpu_watts == 120.0


def test_a_counter_that_wraps_goes_on(clock: Clock, rapl: Rapl):
    rapl.zone("intel-rapl:0", "package-0", RANGE_UJ - 100_000_000)
    meter = meter_of(clock, rapl, Gpus())
    rapl.zone("intel-rapl:0", "package-0", 200_000_000)
    clock.seconds += 3
    assert meter.sample().cpu_watts == 100.0


def test_a_wrap_without_a_known_range_is_no_reading(clock: Clock, rapl: Rapl):
    rapl.zone("intel-rapl:0", "package-0", 500)
    meter = meter_of(clock, rapl, Gpus())
    rapl.zone("intel-rapl:0", "package-0", 100)
    (rapl.root / "intel-rapl:0/max_energy_range_uj").unlink()
    clock.seconds += 3
    assert meter.sample().cpu_watts is None
    assert meter.summary().samples.cpu == 0


@pytest.mark.parametrize("content", [None, "", "garbage"])
def test_an_unreadable_counter_is_null_and_logged_once(clock: Clock, rapl: Rapl, content: str | None):
    rapl.zone("intel-rapl:0", "package-0", 0)
    counter = rapl.root / "intel-rapl:0/energy_uj"
    if content is None:
        counter.unlink()
        counter.mkdir()  # unreadable for root too, unlike a mode
    else:
        counter.write_text(content)
    with capture_logs() as logs:
        meter = meter_of(clock, rapl, Gpus())
        for _ in range(3):
            clock.seconds += 1
            assert meter.sample().cpu_watts is None
    assert [entry["event"] for entry in logs] == ["CPU power cannot be measured"]


def test_a_counter_that_comes_back_starts_afresh(clock: Clock, rapl: Rapl):
    rapl.zone("intel-rapl:0", "package-0", "garbage")
    meter = meter_of(clock, rapl, Gpus())
    rapl.zone("intel-rapl:0", "package-0", 900_000_000_000)
    clock.seconds += 1
    assert meter.sample().cpu_watts is None
    rapl.zone("intel-rapl:0", "package-0", 900_050_000_000)
    clock.seconds += 1
    assert meter.sample().cpu_watts == 50.0


def test_two_samples_in_one_moment_divide_by_nothing(clock: Clock, rapl: Rapl):
    rapl.zone("intel-rapl:0", "package-0", 0)
    meter = meter_of(clock, rapl, Gpus(50.0))
    rapl.zone("intel-rapl:0", "package-0", 10_000_000)
    assert meter.sample().cpu_watts is None
    assert meter.sample().gpu_watts.total == 50.0
    assert meter.summary().estimated_energy_breakdown.cpu_kwh == pytest.approx(10 / 3.6e6, abs=1e-9)


def test_gpu_energy_is_the_area_under_the_readings(clock: Clock, rapl: Rapl):
    gpus = Gpus(100.0)
    meter = meter_of(clock, rapl, gpus)
    meter.sample()
    gpus.watts = (300.0,)
    clock.seconds += 3600
    meter.sample()
    assert meter.summary().estimated_energy_breakdown.gpu_kwh == 0.2
    assert meter.summary().avg_gpu_watts == 200.0


def test_a_gpu_that_is_silent_for_a_while_adds_nothing_for_that_while(clock: Clock, rapl: Rapl):
    gpus = Gpus(100.0, 100.0)
    meter = meter_of(clock, rapl, gpus)
    for watts in ((100.0, 100.0), (100.0, None), (100.0, 100.0), (100.0, 100.0)):
        gpus.watts = watts
        meter.sample()
        clock.seconds += 3600
    summary = meter.summary()
    assert summary.estimated_energy_breakdown.gpu_kwh == 0.4
    assert summary.per_gpu_avg_watts == {"0": 100.0, "1": 100.0}
    assert summary.samples.gpu == 4


@pytest.mark.parametrize("watts", [math.nan, math.inf, -math.inf, -5.0])
def test_a_reading_that_is_no_power_is_null(clock: Clock, rapl: Rapl, watts: float):
    meter = meter_of(clock, rapl, Gpus(watts, 70.0))
    sample = meter.sample()
    assert [gpu.power_w for gpu in sample.gpu_watts.per_gpu] == [None, 70.0]
    assert sample.gpu_watts.total == 70.0
    assert meter.summary().per_gpu_avg_watts == {"1": 70.0}


@given(st.lists(st.tuples(st.floats(0, 1e5), st.one_of(st.none(), st.floats(0, 1500)), st.integers(0, RANGE_UJ))))
def test_whatever_the_meters_say_the_reports_are_finite(
    tmp_path_factory: pytest.TempPathFactory, beats: list[tuple[float, float | None, int]]
):
    rapl = Rapl(tmp_path_factory.mktemp("rapl"))
    rapl.zone("intel-rapl:0", "package-0", 0)
    clock, gpus = Clock(), Gpus(None)
    meter = meter_of(clock, rapl, gpus)
    for seconds, watts, energy_uj in beats:
        clock.seconds += seconds
        gpus.watts = (watts,)
        rapl.zone("intel-rapl:0", "package-0", energy_uj)
        json.dumps(meter.sample().model_dump(), allow_nan=False)
    json.dumps(meter.summary().model_dump(), allow_nan=False)
    assert meter.estimated_energy_kwh() >= 0


def test_cost_is_the_rate_times_the_uptime():
    assert accrued_cost_usd(1.75, 1790.2) == 0.870236
    assert accrued_cost_usd(0.0, 1e9) == 0.0
    assert accrued_cost_usd(sys.float_info.max, 1e9) == sys.float_info.max


@pytest.mark.parametrize(("rate", "uptime"), [(math.nan, 1.0), (1.0, math.inf), (-1.0, 1.0), (1.0, -1.0)])
def test_cost_of_nonsense_is_refused(rate: float, uptime: float):
    with pytest.raises(ValueError, match="expected a finite number"):
        accrued_cost_usd(rate, uptime)

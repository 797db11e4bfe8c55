"""Power meters, on files and tools as boards have them; time passes only where a test says so."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgemerge.runtime.board import power
from edgemerge.runtime.board.power import PowerMeter, open_power_meter
from tests.runtime.board import boards
from tests.runtime.board.boards import lay_out, rail


class Clock:
    """Stands in for the time module."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that a test turns, and a sampling thread that stays asleep."""
    clock = Clock()
    monkeypatch.setattr(power, "time", clock)
    monkeypatch.setattr(power, "_INTERVAL", 3600.0)
    return clock


def opened(root: Path) -> PowerMeter:
    meter = open_power_meter(root)
    assert meter is not None
    return meter


def set_current(root: Path, milliamperes: int) -> None:
    lay_out(root, {"sys/class/hwmon/hwmon1/curr1_input": f"{milliamperes}\n"})


def test_jetson_takes_the_input_of_the_module(tmp_path: Path, clock: Clock) -> None:
    with opened(boards.jetson_orin_nano(tmp_path)) as meter:
        assert (meter.name, meter.covers) == ("INA3221", "the whole module")
        clock.now += 2.0
        assert meter.watts() == pytest.approx(6.0)
        assert meter.joules() == pytest.approx(12.0)
        set_current(tmp_path, 2400)  # 12 W: the trapezoid from 6 W
        clock.now += 1.0
        assert meter.joules() == pytest.approx(12.0 + 9.0)
        assert meter.watts() == pytest.approx(12.0)


def test_jetson_without_an_input_adds_its_rails(tmp_path: Path, clock: Clock) -> None:
    first, second = "sys/class/hwmon/hwmon1", "sys/class/hwmon/hwmon2"
    files = {
        f"{first}/name": "ina3221\n",
        f"{second}/name": "ina3221\n",
        **rail(first, 1, "VDD_GPU_SOC", 19000, 200),
        **rail(first, 2, "VDD_CPU_CV", 19000, 100),
        **rail(second, 1, "NC", 5000, 9999),
    }
    with opened(lay_out(tmp_path, files)) as meter:
        clock.now += 1.0
        assert meter.watts() == pytest.approx(3.8 + 1.9)
        assert meter.covers == "rails VDD_GPU_SOC, VDD_CPU_CV"


def test_a_reading_that_fails_is_bridged(tmp_path: Path, clock: Clock) -> None:
    root = boards.jetson_orin_nano(tmp_path)
    with opened(root) as meter:
        (root / "sys/class/hwmon/hwmon1/curr1_input").write_text("")
        clock.now += 1.0
        assert (meter.joules(), meter.watts()) == (0.0, 0.0)
        set_current(root, 1200)
        clock.now += 1.0
        assert meter.joules() == pytest.approx(12.0)


def test_raspberry_pi_5(tmp_path: Path, clock: Clock) -> None:
    with opened(boards.raspberry_pi_5(tmp_path)) as meter:
        clock.now += 10.0
        assert meter.name == "Pi 5 PMIC"
        assert meter.watts() == pytest.approx(boards.PMIC_WATTS)
        assert meter.joules() == pytest.approx(10.0 * boards.PMIC_WATTS)


def test_raspberry_pi_4_has_none(tmp_path: Path) -> None:
    assert open_power_meter(boards.raspberry_pi_4(tmp_path)) is None
    boards.add_tool(
        tmp_path, "vcgencmd", {"pmic_read_adc": 'error=1 error_msg="Command not known"'}
    )
    assert open_power_meter(tmp_path) is None


def test_a_machine_without_meter(tmp_path: Path) -> None:
    assert open_power_meter(tmp_path) is None


def set_energy(root: Path, package: int, microjoules: int) -> None:
    folder = f"sys/class/powercap/intel-rapl:{package}"
    lay_out(root, {f"{folder}/energy_uj": f"{microjoules}\n"})


def test_rapl_counts_energy_and_wraps(tmp_path: Path, clock: Clock) -> None:
    full = 262_143_328_850
    with opened(boards.laptop(tmp_path, energy=full - 4_000_000)) as meter:
        assert meter.name == "RAPL"
        clock.now += 1.0
        set_energy(tmp_path, 0, full - 1_000_000)
        assert meter.joules() == pytest.approx(3.0)
        clock.now += 0.5
        set_energy(tmp_path, 0, 5_000_000)
        assert meter.joules() == pytest.approx(3.0 + 6.0)
        assert meter.watts() == pytest.approx(12.0)


def test_rapl_adds_packages(tmp_path: Path, clock: Clock) -> None:
    boards.laptop(tmp_path, energy=0)
    second = "sys/class/powercap/intel-rapl:1"
    files = {f"{second}/name": "package-1\n", f"{second}/max_energy_range_uj": "100000000\n"}
    set_energy(lay_out(tmp_path, files), 1, 99_000_000)
    with opened(tmp_path) as meter:
        clock.now += 1.0
        set_energy(tmp_path, 0, 2_000_000)
        set_energy(tmp_path, 1, 1_000_000)
        assert meter.joules() == pytest.approx(2.0 + 2.0)


def test_rapl_that_may_not_be_read_is_none(tmp_path: Path) -> None:
    """Since CVE-2020-8694 only root may; here the file is missing, which is the same to a reader."""
    boards.laptop(tmp_path)
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
    assert open_power_meter(tmp_path) is None


# -- jtop ------------------------------------------------------------------------------------------


class Service:
    """What jetson-stats' `jtop` is to us."""

    closed = False

    def __init__(self) -> None:
        self.power = {"tot": {"power": 7400}, "rail": {}}

    def start(self) -> None:
        pass

    def close(self) -> None:
        type(self).closed = True


@pytest.fixture
def jtop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Service]:
    monkeypatch.setitem(sys.modules, "jtop", SimpleNamespace(jtop=Service))
    lay_out(tmp_path, {"run/jtop.sock": ""})
    Service.closed = False
    return Service


def test_jtop_where_sysfs_tells_nothing(tmp_path: Path, clock: Clock, jtop: type[Service]) -> None:
    with opened(tmp_path) as meter:
        clock.now += 1.0
        assert meter.name == "jtop"
        assert meter.watts() == pytest.approx(7.4)
        assert not jtop.closed
    assert jtop.closed


def test_a_jtop_that_refuses_is_none(
    tmp_path: Path, jtop: type[Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Service) -> None:
        raise RuntimeError("the service has another version")

    monkeypatch.setattr(jtop, "start", refuse)
    assert open_power_meter(tmp_path) is None


# -- the thread ------------------------------------------------------------------------------------


def test_samples_while_open_and_not_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "_INTERVAL", 0.01)
    root = boards.jetson_orin_nano(tmp_path)
    with opened(root) as meter:
        set_current(root, 2400)
        deadline = time.monotonic() + 5.0
        while meter._joules == 0.0 and time.monotonic() < deadline:
            time.sleep(0.005)
        first = meter._joules  # without asking: only the thread adds
        assert 0.0 < first <= meter.joules()
    last = meter.joules()
    assert last >= first
    time.sleep(0.03)
    assert meter.joules() == last
    meter.close()

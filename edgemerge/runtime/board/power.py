"""Power that the board reports, and energy from it.

Boards report power (Jetson, Raspberry Pi 5) or energy (x86); a meter gives both. It samples in a thread of
its own while it is open. Power has to be summed over time, and an x86 counter starts again within minutes.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from edgemerge.machine.sysfs import read_int, read_text, run_tool
from edgemerge.runtime.closing import Closing

__all__ = ["PowerMeter", "open_power_meter"]

_INTERVAL = 0.1  # seconds between samples
_SHORTEST = 0.01  # seconds: a shorter span tells nothing of power


class PowerMeter(Closing):
    """Energy and power of the board; use it in a `with` statement. Made by `open_power_meter`.

    Attributes
    ----------
    name : str
        Where the figures come from.
    covers : str
        What they are the power of.
    """

    def __init__(
        self,
        name: str,
        covers: str,
        sample: Callable[[float], tuple[float, float] | None],
        close: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.covers = covers
        self._sample = sample  # seconds since the last sample -> joules since then, watts
        self._close = close
        self._joules = self._watts = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="edgemerge-power", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop sampling; `joules` and `watts` keep their last values."""
        if not self._stop.is_set():
            self._advance()
            self._stop.set()
            self._thread.join()
            if self._close is not None:
                self._close()

    def joules(self) -> float:
        """Energy since the meter was opened, in joules; it never falls."""
        self._advance()
        return self._joules

    def watts(self) -> float:
        """Power now, in watts; where the board counts energy, the mean since the last sample."""
        self._advance()
        return self._watts

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._advance()

    def _advance(self) -> None:
        with self._lock:
            now = time.monotonic()
            elapsed = now - self._at
            if self._stop.is_set() or elapsed < _SHORTEST:
                return
            sample = self._sample(elapsed)
            if sample is not None:  # else the next one covers this span too
                joules, self._watts = sample
                self._joules += max(0.0, joules)
                self._at = now


def open_power_meter(root: Path = Path("/")) -> PowerMeter | None:
    """Open the board's power meter; None where it reports no power, or not to this user.

    In this order: a Jetson's INA3221 (hwmon), its jtop service, a Raspberry Pi 5's PMIC, x86 RAPL.
    """
    for find in (_find_ina3221, _find_jtop, _find_pmic):
        if (found := find(root)) is not None:
            return PowerMeter(found.name, found.covers, _integrate(found.read), found.close)
    return _open_rapl(root)


@dataclass(frozen=True, slots=True)
class _PowerSource:
    name: str
    covers: str
    read: Callable[[], float | None]  # watts now
    close: Callable[[], None] | None = None


def _integrate(read: Callable[[], float | None]) -> Callable[[float], tuple[float, float] | None]:
    """Add power up to energy by the trapezoidal rule."""
    last = read()

    def sample(elapsed: float) -> tuple[float, float] | None:
        nonlocal last
        watts = read()
        if watts is None:
            return None
        joules = elapsed * (watts + (watts if last is None else last)) / 2.0
        last = watts
        return joules, watts

    return sample


# -- Jetson ----------------------------------------------------------------------------------------


def _find_ina3221(root: Path) -> _PowerSource | None:
    """Jetson: sensors at the board's rails, mV times mA (Documentation/hwmon/ina3221.rst of Linux).

    VDD_IN is the module's whole input and the other rails are parts of it; where it is missing, as on AGX
    Orin, they are added up, as jetson-stats does.
    """
    rails: dict[str, tuple[Path, Path]] = {}
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if read_text(chip / "name") == "ina3221":
            for channel in (1, 2, 3):
                label = read_text(chip / f"in{channel}_label")
                pair = (chip / f"in{channel}_input", chip / f"curr{channel}_input")
                if label and label != "NC" and _read_rails([pair]) is not None:
                    rails[label] = pair
    if not rails:
        return None
    if "VDD_IN" in rails:
        rails = {"VDD_IN": rails["VDD_IN"]}
    pairs = list(rails.values())
    covers = "the whole module" if "VDD_IN" in rails else f"rails {', '.join(rails)}"
    return _PowerSource("INA3221", covers, lambda: _read_rails(pairs))


def _read_rails(pairs: Sequence[tuple[Path, Path]]) -> float | None:
    """Watts over (millivolts, milliamperes) files."""
    watts = 0.0
    for volts, amperes in pairs:
        millivolts, milliamperes = read_int(volts), read_int(amperes)
        if millivolts is None or milliamperes is None:
            return None
        watts += millivolts * milliamperes * 1e-6
    return watts


def _find_jtop(root: Path) -> _PowerSource | None:
    """Jetson: the jtop service of jetson-stats, which also knows older boards' sensors."""
    if not (root / "run/jtop.sock").exists():
        return None
    try:
        service: Any = import_module("jtop").jtop()
        service.start()
    except Exception:  # not installed, another version than the service's, or not in its group
        return None

    def read() -> float | None:
        with suppress(Exception):  # the service may be stopped at any time
            return float(service.power["tot"]["power"]) / 1000.0  # milliwatts
        return None

    return _PowerSource("jtop", "the whole module", read, service.close)


# -- Raspberry Pi 5 --------------------------------------------------------------------------------

_ADC = re.compile(r"^\s*(\w+)_([AV]) (?:current|volt)\(\d+\)=(\d+\.?\d*)[AV]\s*$", re.MULTILINE)


def _find_pmic(root: Path) -> _PowerSource | None:
    def read() -> float | None:
        return _parse_pmic(run_tool(root, "vcgencmd", "pmic_read_adc") or "")

    if read() is None:  # boards before the Pi 5 have no such chip
        return None
    return _PowerSource("Pi 5 PMIC", "the board's rails, without USB and conversion losses", read)


def _parse_pmic(text: str) -> float | None:
    """Watts from `vcgencmd pmic_read_adc`: volts times amperes of each rail that has both.

    A line is `  VDD_CORE_A current(7)=1.50000000A` or `  VDD_CORE_V volt(15)=0.80000000V`. EXT5V and BATT
    have no current. https://www.raspberrypi.com/documentation/computers/os.html#vcgencmd
    """
    rails: dict[str, dict[str, float]] = {}
    for name, unit, value in _ADC.findall(text):
        rails.setdefault(name, {})[unit] = float(value)
    watts = [rail["A"] * rail["V"] for rail in rails.values() if len(rail) == 2]
    return sum(watts) if watts else None


# -- x86 -------------------------------------------------------------------------------------------


def _open_rapl(root: Path) -> PowerMeter | None:
    """x86: microjoules per package, which start again at 0 (Documentation/power/powercap/powercap.rst).

    Since CVE-2020-8694 only root may read them, unless the administrator allows more.
    """
    packages = [
        folder
        for folder in sorted((root / "sys/class/powercap").glob("intel-rapl:*"))
        if (read_text(folder / "name") or "").startswith("package")
    ]
    ranges = [read_int(folder / "max_energy_range_uj") or 0 for folder in packages]
    last = [read_int(folder / "energy_uj") for folder in packages]
    if not packages or None in last:
        return None

    def sample(elapsed: float) -> tuple[float, float] | None:
        nonlocal last
        now = [read_int(folder / "energy_uj") for folder in packages]
        joules = 0.0
        for before, after, full in zip(last, now, ranges, strict=True):
            if before is None or after is None:
                return None
            joules += (after - before + (full if after < before else 0)) * 1e-6
        last = now
        return joules, joules / elapsed

    return PowerMeter("RAPL", "the processor package, without the rest of the machine", sample)

"""How hot the processor is, and whether the board slows it down."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgemerge.machine.sysfs import read_int, read_text, run_tool

__all__ = ["Throttling", "read_temperature", "read_throttling"]

# Zones and chips that are the processor: cpu-thermal (Raspberry Pi, Jetson), CPU-therm, tj-thermal (Jetson's
# hottest point), soc-thermal, bigcore0-thermal (Rockchip), x86_pkg_temp; coretemp, k10temp. Others are disks,
# radios, batteries, or no sensor at all: PMIC-Die of a Jetson Nano is always at 100 degrees.
_PROCESSOR = re.compile(r"cpu|soc|core|pkg|^tj|gpu|k10temp|zenpower", re.IGNORECASE)
_PLAUSIBLE = range(-40_000, 150_000)  # millidegrees; a sensor without power reads -256 000

# What the kernel slows down against heat; fans are cooling devices too. Linux: cpufreq_cooling.c,
# devfreq_cooling.c, ACPI's Processor; NVIDIA's kernel adds cpu-throttle-alert and gpu-throttle-alert.
_SLOWED = re.compile(r"cpufreq|devfreq|^Processor$|throttle-alert")

# Bits of `vcgencmd get_throttled`; those 16 higher tell the same of the time since boot.
# https://www.raspberrypi.com/documentation/computers/os.html#get_throttled
_FIRMWARE_BITS = {
    0: "under-voltage",
    1: "clock capped",
    2: "throttled",
    3: "soft temperature limit",
}
_SINCE_BOOT = 16

# NVIDIA's soctherm_oc driver: events that cut the clocks. Jetson Linux Developer Guide, Platform Power and
# Performance, "Over-Current Throttling".
_JETSON_EVENTS = {1: "under-voltage", 2: "average over-current", 3: "instantaneous over-current"}


@dataclass(frozen=True, slots=True)
class Throttling:
    """What slows the processor down.

    Attributes
    ----------
    reasons : tuple of str
        Now, in a few words each; empty where it runs at full speed.
    since_boot : tuple of str
        What has happened since the board started.
    """

    reasons: tuple[str, ...]
    since_boot: tuple[str, ...]

    @property
    def active(self) -> bool:
        """Whether anything slows the processor down now."""
        return bool(self.reasons)


def read_temperature(root: Path = Path("/")) -> float | None:
    """Hottest sensor of the processor, in degrees Celsius; None where there is none.

    Looks at thermal zones and at hwmon chips (Documentation/ABI/testing/sysfs-class-thermal and
    sysfs-class-hwmon of Linux: both in millidegrees).
    """
    readings = []
    for zone in (root / "sys/class/thermal").glob("thermal_zone*"):
        if _PROCESSOR.search(read_text(zone / "type") or ""):
            readings.append(read_int(zone / "temp"))
    for chip in (root / "sys/class/hwmon").glob("hwmon*"):
        if _PROCESSOR.search(read_text(chip / "name") or ""):
            readings += [read_int(file) for file in chip.glob("temp*_input")]
    plausible = (value for value in readings if value is not None and value in _PLAUSIBLE)
    hottest = max(plausible, default=None)
    return None if hottest is None else hottest / 1000.0


def read_throttling(root: Path = Path("/")) -> Throttling | None:
    """Whether the processor is slowed down, and why; None where nothing tells.

    Sources: a Raspberry Pi's firmware, a Jetson's over-current counters, an x86 processor's counters
    of overheating, the kernel's cooling devices, and clocks limited below the highest.
    """
    sources = (_read_firmware, _read_jetson, _read_x86, _read_cooling, _read_clocks)
    told = [found for source in sources if (found := source(root)) is not None]
    if not told:
        return None
    reasons = dict.fromkeys(reason for found in told for reason in found.reasons)
    since_boot = dict.fromkeys(event for found in told for event in found.since_boot)
    return Throttling(tuple(reasons), tuple(since_boot))


def _read_firmware(root: Path) -> Throttling | None:
    """Raspberry Pi: the firmware's word from sysfs (hexadecimal) or vcgencmd (`throttled=0x50005`).

    Where there is neither, as in other distributions' kernels, the hwmon chip rpi_volt still tells of
    under-voltage.
    """
    files = (root / "sys/devices/platform").glob("*/*firmware/get_throttled")
    words = [word for file in files if (word := read_int(file, 16)) is not None]
    if not words and (text := run_tool(root, "vcgencmd", "get_throttled")):
        words = [int(match[1], 16) for match in re.finditer(r"throttled=0x([0-9a-fA-F]+)", text)]
    if not words:
        alarms = [read_int(chip / "in0_lcrit_alarm") for chip in _chips(root, "rpi_volt")]
        return Throttling(("under-voltage",) if any(alarms) else (), ()) if alarms else None

    def told(first_bit: int) -> tuple[str, ...]:
        return tuple(
            text for bit, text in _FIRMWARE_BITS.items() if words[0] >> (first_bit + bit) & 1
        )

    return Throttling(told(0), told(_SINCE_BOOT))


def _read_jetson(root: Path) -> Throttling | None:
    counts = {
        name: read_int(chip / f"oc{number}_event_cnt")
        for chip in _chips(root, "soctherm_oc")
        for number, name in _JETSON_EVENTS.items()
    }
    if not counts:
        return None
    return Throttling((), tuple(f"{name} ({n} times)" for name, n in counts.items() if n))


def _read_x86(root: Path) -> Throttling | None:
    """x86: how often cores and packages ran too hot (arch/x86/kernel/cpu/mce/therm_throt.c)."""
    folders = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle")
    files = [
        folder / f"{part}_throttle_count" for folder in folders for part in ("core", "package")
    ]
    if not files:
        return None
    most = max(read_int(file) or 0 for file in files)
    return Throttling((), (f"too hot ({most} times)",) if most else ())


def _read_cooling(root: Path) -> Throttling | None:
    devices = [
        folder
        for folder in (root / "sys/class/thermal").glob("cooling_device*")
        if _SLOWED.search(read_text(folder / "type") or "")
    ]
    if not devices:
        return None
    slowed = any((read_int(folder / "cur_state") or 0) > 0 for folder in devices)
    return Throttling(("slowed against heat",) if slowed else (), ())


def _read_clocks(root: Path) -> Throttling | None:
    """Clocks limited below the highest: by a power mode, by the user, or by the kernel."""
    limits = []
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"):
        limit, highest = (read_int(folder / f"{name}_max_freq") for name in ("scaling", "cpuinfo"))
        if limit and highest:
            limits.append((limit / highest, limit, highest))
    if not limits:
        return None
    share, limit, highest = min(limits)
    text = f"clock limited to {limit / 1e6:.1f} of {highest / 1e6:.1f} GHz"
    return Throttling((text,) if share < 0.99 else (), ())


def _chips(root: Path, name: str) -> Iterator[Path]:
    """Folders of the hwmon chips of a name; their numbers change from boot to boot."""
    for chip in (root / "sys/class/hwmon").glob("hwmon*"):
        if read_text(chip / "name") == name:
            yield chip

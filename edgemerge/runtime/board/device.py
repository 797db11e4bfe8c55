"""The board: its name, processor, memory, sensors. Nothing here raises: what is not told is None.

Each reader takes the root of the file system, so that a test can lay out a board's files.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

from edgemerge.machine.sysfs import read_text
from edgemerge.runtime.board.memory import Memory, Swap, read_memory, read_swaps
from edgemerge.runtime.board.power import PowerMeter, open_power_meter
from edgemerge.runtime.board.processor import (
    count_cores,
    default_threads,
    keeps_clock_low,
    online_processors,
    processor_fields,
    read_max_hz,
)
from edgemerge.runtime.board.thermals import Throttling, read_temperature, read_throttling

__all__ = ["Board", "Memory", "PowerMeter", "Swap", "Throttling"]
__all__ += ["default_threads", "open_power_meter", "read_board", "read_memory"]
__all__ += ["read_swaps", "read_temperature", "read_throttling"]

# Instructions that llama.cpp has kernels for, as /proc/cpuinfo writes them; asimd is Arm's 64-bit NEON.
_FEATURES = "neon asimd asimdhp asimddp i8mm bf16 sve sve2 ssse3 avx avx2 f16c fma avx_vnni"
_FEATURES += " avx512f avx512_vnni avx512_bf16 amx_int8"

# Arm's part numbers (implementer 0x41), as in lscpu-arm.c of util-linux.
_ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd41": "Cortex-A78",
    "0xd42": "Cortex-A78AE",
    "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
}

# Graphics by the kernel's driver, where llama.cpp can use them: through CUDA or Vulkan.
_GRAPHICS = {
    "amdgpu": "AMD graphics",
    "i915": "Intel graphics",
    "xe": "Intel graphics",
    "nouveau": "NVIDIA graphics, open driver",
    "panthor": "Arm Mali graphics",
    "panfrost": "Arm Mali graphics",
    "v3d": "VideoCore graphics",
}


@dataclass(frozen=True, slots=True)
class Board:
    """What this machine is.

    Attributes
    ----------
    name : str or None
        Raspberry Pi 5 Model B Rev 1.0, or what the firmware of a PC calls it.
    soc : str or None
        System on chip, as its device tree names it: bcm2712, tegra234.
    processor : str
        Model of the (first) processor or core.
    architecture : str
        aarch64, x86_64, ...
    cpu_features : tuple of str
        Instructions that speed llama.cpp up.
    cores, threads : int
        Physical and logical cores that are switched on.
    max_frequency_hz : int or None
        Of the fastest core.
    keeps_clock_low : bool
        Whether the governor leaves it at the lowest frequency.
    accelerators : tuple of str
        Graphics processors that the kernel knows; whether llama.cpp can use them is another question.
    memory : Memory
        As of now.
    virtual : bool
        Whether this is a virtual machine.
    """

    name: str | None
    soc: str | None
    processor: str
    architecture: str
    cpu_features: tuple[str, ...]
    cores: int
    threads: int
    max_frequency_hz: int | None
    keeps_clock_low: bool
    accelerators: tuple[str, ...]
    memory: Memory
    virtual: bool


def read_board(root: Path = Path("/")) -> Board:
    """Read what this machine is, from its device tree or firmware, /proc/cpuinfo and sysfs."""
    fields = processor_fields(root)
    known = set((fields.get("flags") or fields.get("Features") or "").split())
    soc = _read_soc(root)
    online = online_processors(root)
    part = _ARM_PARTS.get(fields.get("CPU part", ""))
    return Board(
        name=_read_name(root),
        soc=soc,
        processor=part or fields.get("model name") or soc or platform.machine(),
        architecture=platform.machine(),
        cpu_features=tuple(name for name in _FEATURES.split() if name in known),
        cores=count_cores(root, online),
        threads=len(online),
        max_frequency_hz=read_max_hz(root),
        keeps_clock_low=keeps_clock_low(root),
        accelerators=_read_accelerators(root, soc),
        memory=read_memory(root),
        virtual="hypervisor" in known or (root / "sys/hypervisor/type").exists(),
    )


def _read_name(root: Path) -> str | None:
    """Name from the device tree (boards) or DMI (PCs)."""
    if model := read_text(root / "proc/device-tree/model"):
        return model
    folder = root / "sys/class/dmi/id"
    parts = [read_text(folder / name) for name in ("sys_vendor", "product_name")]
    return " ".join(part for part in parts if part) or None


def _read_soc(root: Path) -> str | None:
    """Name of the system on chip: the device tree lists what a board is compatible with, it last."""
    compatible = read_text(root / "proc/device-tree/compatible") or ""
    return compatible.rpartition("\0")[2].rpartition(",")[2] or None


def _read_accelerators(root: Path, soc: str | None) -> tuple[str, ...]:
    found = ["NVIDIA graphics of the Jetson"] if (soc or "").startswith("tegra") else []
    for information in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        if match := re.search(r"^Model:\s*(.+)$", read_text(information) or "", re.MULTILINE):
            found.append(match[1])
    for event in sorted((root / "sys/class/drm").glob("card*/device/uevent")):
        driver = re.search(r"^DRIVER=(.+)$", read_text(event) or "", re.MULTILINE)
        if driver and driver[1] in _GRAPHICS:
            found.append(_GRAPHICS[driver[1]])
    return tuple(dict.fromkeys(found))

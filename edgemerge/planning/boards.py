"""Boards by name: what is known of each, and from where. Nobody measured a merge on one.

How many times slower a core is than the reference follows from its clock and its vectors. The reference has
16 lanes of float32 at about 3.7 GHz, two operations on them a cycle. A76 and A78AE have two pipes of 4 lanes;
A72 uses its own less. A53 takes two cycles for 4 lanes, in order. These are estimates, hence the range.
"""

from __future__ import annotations

from edgemerge.planning.prediction import Rates

__all__ = ["BOARDS", "SOURCES"]

_MIB, _MB = 1 << 20, 1e6
_ERROR = (0.5, 2.0)  # of estimated factors


def _board(
    name: str,
    *,
    cores: int,
    memory: int,
    slower: float,
    python: float,
    copied: float,
    hashed: float,
    read: float,
    written: float,
) -> Rates:
    """Make the rates of a board whose kernels are all so many times slower; rates in MB/s."""
    return Rates(
        name=name,
        cores=cores,
        memory=memory * _MIB,
        decode=slower,
        encode=slower,
        merge=slower,
        python=python,
        copied=copied * _MB,
        hashed=hashed * _MB,
        read=read * _MB,
        written=written * _MB,
        error=_ERROR,
    )


BOARDS = {
    "pi-zero-2w": _board(
        "Raspberry Pi Zero 2 W, SD card",
        cores=4,
        memory=330,
        slower=40,
        python=12,
        copied=1000,
        hashed=60,
        read=22,
        written=15,
    ),
    "pi4": _board(
        "Raspberry Pi 4 (4 GB), SD card",
        cores=4,
        memory=3400,
        slower=14,
        python=4,
        copied=2800,
        hashed=150,
        read=41,
        written=21,
    ),
    "pi5": _board(
        "Raspberry Pi 5 (8 GB), SD card",
        cores=4,
        memory=7400,
        slower=8,
        python=2,
        copied=5700,
        hashed=1100,
        read=85,
        written=40,
    ),
    "orin-nano": _board(
        "Jetson Orin Nano (8 GB), NVMe",
        cores=6,
        memory=6500,
        slower=10,
        python=2.5,
        copied=15000,
        hashed=700,
        read=1500,
        written=1000,
    ),
}

SOURCES = {
    "pi-zero-2w": "cores and memory as of a Raspberry Pi 3 B+, memcpy 1050 to 1230 MB/s at 1.4 GHz "
    "(github.com/ThomasKaiser/sbc-bench, Results.md); MemTotal 416 MiB; an SD bus of 25 MB/s",
    "pi4": "C copy 2777 MB/s (github.com/geerlingguy/sbc-reviews/issues/110); card read 39.5 MiB/s, "
    "written 20.5 MiB/s (darrylcauldwell.github.io/post/homelab-pi-storage); no SHA-256 instructions",
    "pi5": "libc memcpy 5705 MB/s (github.com/ThomasKaiser/sbc-bench/issues/106); an SD bus of "
    "104 MB/s (SDR104), of which a good card gives four fifths",
    "orin-nano": "six Cortex-A78AE at 1.5 GHz, 68 GB/s of memory (NVIDIA's data sheet), a quarter "
    "of it for copies; an NVMe disk on PCIe 3.0, as of a slow one",
}

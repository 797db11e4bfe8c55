"""Which of a wheel's kinds of machine code a processor runs."""

from __future__ import annotations

import platform
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from edgemerge.native.processors import VARIANTS, fitting_variants, processor_features

# What /proc/cpuinfo and the auxiliary vectors of real machines say.
CPUINFO = {
    "Core 2": "fpu sse sse2 pni ssse3 cx16 sse4_1 lahf_lm",
    "N5105": "pni ssse3 cx16 sse4_1 sse4_2 movbe popcnt pclmulqdq lahf_lm",
    "Haswell": "pni ssse3 cx16 sse4_1 sse4_2 movbe popcnt avx f16c lahf_lm abm bmi1 bmi2 avx2 fma pclmulqdq",
}
CPUINFO["Cascade Lake"] = f"{CPUINFO['Haswell']} avx512f avx512dq avx512cd avx512bw avx512vl"
CPUINFO["Zen 4"] = f"{CPUINFO['Cascade Lake']} avx512_vbmi2 avx512_bf16"
HWCAP = {"Cortex-A72": 0xFF, "Cortex-A76": 0x119FFF, "Neoverse V1": 0x7FFFFF}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """Files of /proc that tests write."""
    files: dict[str, bytes] = {}

    def read_bytes(path: Path) -> bytes:
        if str(path) not in files:
            raise FileNotFoundError
        return files[str(path)]

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(Path, "read_text", lambda path, **_: read_bytes(path).decode())
    processor_features.cache_clear()
    yield files
    processor_features.cache_clear()


def names(machine: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    processor_features.cache_clear()
    monkeypatch.setattr(platform, "machine", lambda: machine)
    return [variant.name for variant in fitting_variants(machine, processor_features())]


@pytest.mark.parametrize(
    ("processor", "levels"),
    [("Core 2", ""), ("N5105", "2"), ("Haswell", "32"), ("Cascade Lake", "32"), ("Zen 4", "432")],
)
def test_levels_of_x86_64(
    processor: str, levels: str, read: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    read["/proc/cpuinfo"] = f"processor: 0\nflags\t\t: {CPUINFO[processor]}\nbugs: a\n".encode()
    assert names("x86_64", monkeypatch) == [f"x86-64-v{level}" for level in levels]


@pytest.mark.parametrize("processor", HWCAP)
def test_levels_of_arm(
    processor: str, read: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = (33, 1 << 48), (16, HWCAP[processor]), (6, 4096), (26, 3), (0, 0)
    read["/proc/self/auxv"] = b"".join(struct.pack("<QQ", *pair) for pair in pairs)
    expected = ["armv8.0"] if processor == "Cortex-A72" else ["armv8.2-dotprod", "armv8.0"]
    assert names("aarch64", monkeypatch) == expected
    assert {"crc32", "hwcap_0", "hwcap2_1"} <= processor_features()  # the last is SVE2's


def test_what_says_nothing_is_the_oldest(
    read: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert names("x86_64", monkeypatch) == []
    assert names("aarch64", monkeypatch) == ["armv8.0"]
    assert names("riscv64", monkeypatch) == []


def test_the_best_comes_first() -> None:
    for variants in VARIANTS.values():
        needs = [variant.needs for variant in variants]
        assert all(better > worse for better, worse in pairwise(needs))

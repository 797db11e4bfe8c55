"""Numbers of bytes, of parameters and of seconds, as people write and read them."""

from __future__ import annotations

import re

from edgemerge.errors import RecipeError

__all__ = ["format_count", "format_duration", "format_rate", "format_size", "parse_duration"]
__all__ += ["parse_size"]

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_UNITS |= {f"{unit}IB": n for unit, n in _UNITS.items() if unit in "KMGT" and unit}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}

LEAST_PLAIN = 4096  # a number without a unit below it was meant to have one


def parse_size(text: str | int) -> int:
    """Parse a size in bytes: `512MiB`, `1.5G`, `800M`.

    A small number without a unit is refused: nobody has 400 bytes in mind.
    K, M, G, T are powers of 1024, as are KiB and so on; KB, MB, GB, TB are powers of 1000.

    Raises
    ------
    RecipeError
        It is no positive size.
    """
    plain = str(text).strip()
    if plain.isdecimal() and plain.isascii() and 0 < int(plain[:19]) < LEAST_PLAIN:
        raise RecipeError(f"{plain} is {plain} bytes; did you mean {plain}MiB?", field="memory")
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", str(text), re.ASCII)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise RecipeError(
            f"{repr(text)[:60]} is no size; write it like 512MiB, 1.5G or 800M", field="memory"
        )
    return int(float(match[1]) * unit)


def format_size(n_bytes: float) -> str:
    """Write a number of bytes for people: 384 MiB, 1.5 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(n_bytes) < 1024 or unit == "GiB":
            break
        n_bytes /= 1024
    return f"{n_bytes:.3g} {unit}" if abs(n_bytes) < 999.5 else f"{n_bytes:.0f} {unit}"


def format_count(n: int) -> str:
    """Write a number of parameters for people: 317.2 M, 22.7 K."""
    return f"{n / 1e6:,.1f} M" if n >= 1e6 else f"{n / 1e3:,.1f} K"


def format_rate(per_second: float) -> str:
    """Write a speed for people, with three digits or all before the point: 7.51, 48.2, 978, 2619."""
    return f"{per_second:.3g}" if per_second < 999.5 else f"{per_second:.0f}"


def parse_duration(text: str) -> float:
    """Parse a time in seconds: `90s`, `30m`, `1.5h`, `2d`.

    Raises
    ------
    RecipeError
        It is no time, or has no unit.
    """
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(s|m|min|h|d)\s*", text, re.ASCII)
    if match is None or float(match[1]) == 0:
        raise RecipeError(
            f"{text[:60]!r} is no time; write it like 90s, 30m, 1.5h or 2d", field="time"
        )
    return float(match[1]) * _SECONDS[match[2]]


def format_duration(seconds: float) -> str:
    """Write a time for people: 42 s, 3 min 20 s, 1 h 05 min, 2 d 01 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 2 * 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600:02} h"

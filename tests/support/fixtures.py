"""Fixtures that are stored packed: the folder of them, unpacked once into the cache.

    python tests/support/fixtures.py models    prints where the real models lie; also golden, architectures

A packed folder of this tree has a list `SHA256SUMS` of the files that it stands for. Each of them is
there as it is, or in `packed.tar.xz`, or is a copy of another with the same sum, or follows from others:

- `model.safetensors.low` and `.high.xz` are the two bytes of each float16 of a file. An expert's high
  bytes are in the order of its base's values: neighbours are then alike, and take 4 bits rather than 5.5.
- expert-b-permuted is expert-b with its heads in the order of `head_permutation.json`.

`tools/pack_fixtures.py` is the way back. Needs NumPy and the standard library only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

TESTS = Path(__file__).resolve().parents[1]
FOLDERS = {
    "models": TESTS / "models",
    "golden": TESTS / "data" / "golden",
    "architectures": TESTS / "data" / "architectures",
}
SUMS, ARCHIVE, LOW, HIGH = "SHA256SUMS", "packed.tar.xz", ".low", ".high.xz"
WEIGHTS = "model.safetensors"
ORDERED_BY = {"expert-a": "base", "expert-b": "base"}
PERMUTED = ("expert-b-permuted", "expert-b")
HEAD_SIZE = 32  # of these models
PROJECTIONS = {  # by which list, and along which axis, their heads are permuted
    "q_proj": ("q_perm", 0),
    "k_proj": ("kv_perm", 0),
    "v_proj": ("kv_perm", 0),
    "o_proj": ("q_perm", 1),
}

Files = dict[str, bytes]  # by path within the folder


@functools.cache
def unpacked(name: str) -> Path:
    """Return the folder of unpacked fixtures; make it where it is missing or damaged.

    Parameters
    ----------
    name : str
        One of `FOLDERS`.

    Raises
    ------
    ValueError
        What is stored does not unpack to the files of `SHA256SUMS`.
    """
    stored = FOLDERS[name]
    sums = read_sums(stored)
    digest = hashlib.sha256((stored / SUMS).read_bytes()).hexdigest()[:12]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "edgemerge" / "fixtures" / f"{name}-{digest}"
    if not is_whole(folder, sums):
        _write_at_once(_unpack(stored, sums), folder)
    return folder


def read_sums(stored: Path) -> dict[str, str]:
    """Return sha256 by path, of `sha256sum`'s form."""
    lines = (stored / SUMS).read_text(encoding="utf-8").splitlines()
    return {path: digest for digest, path in (line.split("  ", 1) for line in lines)}


def is_whole(folder: Path, sums: dict[str, str]) -> bool:
    """Tell whether all files are there, with these sums."""
    paths = {path: folder / path for path in sums}
    return all(p.is_file() and _sha256(p.read_bytes()) == sums[name] for name, p in paths.items())


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote."""
    return json.loads(lzma.decompress(path.read_bytes()))


def write_json(path: Path, text: str) -> None:
    """Write a JSON text packed, as NAME.json.xz."""
    path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def value_order(file: bytes) -> npt.NDArray[np.intp]:
    """Return the order of a file's float16 values, ascending; equal ones as they come."""
    bits = np.frombuffer(file, np.uint16)
    ascending = np.where(bits >> 15 != 0, ~bits, bits | 0x8000)  # sign and magnitude to unsigned
    return np.argsort(ascending, kind="stable")


def permute_heads(file: bytes, layers: list[dict[str, list[int]]]) -> bytes:
    """Return a safetensors file with new head i = old head perm[i], in each layer."""
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    values = np.frombuffer(file, np.uint16, offset=start).copy()
    for i, layer in enumerate(layers):
        for projection, (perm, axis) in PROJECTIONS.items():
            tensor = header[f"model.layers.{i}.self_attn.{projection}.weight"]
            begin, end = (offset // 2 for offset in tensor["data_offsets"])
            weight = values[begin:end].reshape(tensor["shape"])
            rows = [HEAD_SIZE * head + row for head in layer[perm] for row in range(HEAD_SIZE)]
            weight[:] = np.take(weight, rows, axis)
    return file[:start] + values.tobytes()


def _unpack(stored: Path, sums: dict[str, str]) -> Files:
    files = {path: (stored / path).read_bytes() for path in sums if (stored / path).is_file()}
    with tarfile.open(stored / ARCHIVE) as archive:
        for member in archive:
            reader = archive.extractfile(member)
            assert reader is not None, member.name
            files[member.name] = reader.read()
    for low in sorted(stored.glob(f"*/{WEIGHTS}{LOW}")):  # base comes first
        name = low.parent.name
        files[f"{name}/{WEIGHTS}"] = _join(low, files.get(f"{ORDERED_BY.get(name)}/{WEIGHTS}"))
    permuted, source = PERMUTED
    if (stored / permuted).is_dir():
        layers = json.loads(files[f"{permuted}/head_permutation.json"])["layers"]
        files[f"{permuted}/{WEIGHTS}"] = permute_heads(files[f"{source}/{WEIGHTS}"], layers)
    by_sum = {sums[path]: file for path, file in files.items() if path in sums}
    for path in sums.keys() - files.keys():
        files[path] = by_sum[sums[path]]
    wrong = [path for path in sums if _sha256(files[path]) != sums[path]]
    if wrong or files.keys() != sums.keys():
        raise ValueError(
            f"{stored} does not unpack to what its {SUMS} says: "
            f"{', '.join(wrong or sorted(files.keys() ^ sums.keys()))}; run tools/pack_fixtures.py"
        )
    return files


def _join(low: Path, base: bytes | None) -> bytes:
    values = np.fromfile(low, np.uint8).astype(np.uint16)
    high = np.frombuffer(lzma.decompress(low.with_name(WEIGHTS + HIGH).read_bytes()), np.uint8)
    order = slice(None) if base is None else value_order(base)
    values[order] |= high.astype(np.uint16) << 8
    return values.tobytes()


def _write_at_once(files: Files, folder: Path) -> None:
    """Make a folder that is whole as soon as it is there, whoever else makes it at the same time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=folder.name, dir=folder.parent) as temporary:
        for path, file in files.items():
            target = Path(temporary, "new", path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file)
        if folder.exists():  # damaged
            shutil.move(folder, Path(temporary, "old"))
        try:
            Path(temporary, "new").rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise


def _sha256(file: bytes) -> str:
    return hashlib.sha256(file).hexdigest()


if __name__ == "__main__":
    print(unpacked(sys.argv[1]))

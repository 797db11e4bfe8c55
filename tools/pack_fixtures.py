#!/usr/bin/env python3
"""Pack a folder of fixtures into the tree, as tests/support/fixtures.py unpacks it.

    tools/pack_fixtures.py FOLDER {models,golden,architectures}

FOLDER has all files, as `python tests/support/fixtures.py NAME` shows them. Text that people read stays as
it is; the rest goes into packed.tar.xz, each content once; weights of float16 are cut in two.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import lzma
import sys
import tarfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support import fixtures

PACKED = {".safetensors", ".model", ".npz", ".jsonl"}  # and the names below
PACKED_NAMES = {"tokenizer.json", "expected.json", "configs.json"}
PLAIN = {"eval/disease.jsonl", "eval/substance.jsonl"}  # questions to look at


def pack(folder: Path, name: str) -> None:
    """Write the packed form of all files below a folder; a README.md there is not one of them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in paths if p.name != "README.md"
    }
    stored = fixtures.FOLDERS[name]
    sums = {path: hashlib.sha256(file).hexdigest() for path, file in files.items()}
    archived: dict[str, bytes] = {}
    for path, file in files.items():
        kind = Path(path)
        if name == "models" and kind.name == fixtures.WEIGHTS:
            (stored / path).unlink(missing_ok=True)
            if kind.parent.name != fixtures.PERMUTED[0]:
                base = fixtures.ORDERED_BY.get(kind.parent.name)
                split(file, stored / path, files.get(f"{base}/{kind.name}"))
        elif path not in PLAIN and (kind.suffix in PACKED or kind.name in PACKED_NAMES):
            (stored / path).unlink(missing_ok=True)
            if sums[path] not in {sums[other] for other in archived}:
                archived[path] = file
        else:
            (stored / path).parent.mkdir(parents=True, exist_ok=True)
            (stored / path).write_bytes(file)
    (stored / fixtures.ARCHIVE).write_bytes(archive(archived))
    lines = [f"{digest}  {path}\n" for path, digest in sums.items()]
    (stored / fixtures.SUMS).write_text("".join(lines), encoding="utf-8")


def split(file: bytes, path: Path, base: bytes | None) -> None:
    """Store the low and the high bytes of float16 values apart: the low ones are as good as random."""
    values = np.frombuffer(file, np.uint16)
    order = slice(None) if base is None else fixtures.value_order(base)
    high = (values[order] >> 8).astype(np.uint8).tobytes()
    # Neither the last byte nor the position says anything about the next.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 0, "pb": 0}]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + fixtures.HIGH).write_bytes(lzma.compress(high, filters=filters))
    path.with_name(path.name + fixtures.LOW).write_bytes((values & 0xFF).astype(np.uint8).tobytes())


def archive(files: dict[str, bytes]) -> bytes:
    """Return a .tar.xz of files in order of kind and path, without times and owners."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for path in sorted(files, key=lambda path: (Path(path).name, path)):
            entry = tarfile.TarInfo(path)
            entry.size = len(files[path])
            tar.addfile(entry, io.BytesIO(files[path]))
    return lzma.compress(target.getvalue(), preset=6 | lzma.PRESET_EXTREME)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", choices=fixtures.FOLDERS)
    arguments = parser.parse_args()
    pack(arguments.folder, arguments.name)

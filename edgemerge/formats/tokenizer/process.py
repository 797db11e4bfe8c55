"""A large tokenizer.json read in a process of its own, which is gone before a merge begins.

Python's objects for the 33 MB of Gemma 3's take 300 MB, for Llama 3's 9 MB more than 100; what GGUF keeps of
them is 7 and 4. A merge counts what it holds against its budget, and so never holds the rest.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgemerge.errors import FormatError, RuntimeFailure
from edgemerge.formats.tokenizer.read import MAX_TOKENIZER_BYTES, tokenizer_metadata

__all__ = ["read_tokenizer"]

LARGE = 1 << 20  # bytes of tokenizer.json; a smaller one takes less memory than a process does time
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")

# What was read last, its notes, and of which bytes it was.
_last: tuple[bytes, dict[str, bytes], list[str]] = b"", {}, []


def read_tokenizer(
    path: Path,
    config: dict[str, Any],
    vocab_size: int,
    model_type: str,
    *,
    notes: list[str] | None = None,
) -> dict[str, bytes]:
    """Return what `tokenizer_metadata` does; fine-tunes of one base, whose files are equal, share it.

    Raises
    ------
    FormatError
        As there.
    RuntimeFailure
        The process could not be started, or ended without an answer.
    """
    global _last
    digest = _digest(path, config, vocab_size, model_type)
    if not digest or digest != _last[0]:
        said: list[str] = []
        _last = digest, _read(path, config, vocab_size, model_type, said), said
    if notes is not None:
        notes += _last[2]
    return _last[1]


def _digest(path: Path, config: dict[str, Any], vocab_size: int, model_type: str) -> bytes:
    """Hash all that the tokenizer of a directory may depend on: each of its files but the weights.

    Nothing where one of them is larger than any tokenizer: that is for its reader to refuse.
    """
    digest = hashlib.blake2b(repr((config, vocab_size, model_type)).encode())
    for file in sorted(path.iterdir()):
        if file.suffix not in WEIGHTS and file.is_file():
            if file.stat().st_size > MAX_TOKENIZER_BYTES:
                return b""
            with file.open("rb") as opened:
                digest.update(f"{file.name!r} {file.stat().st_size}\n".encode())
                digest.update(hashlib.file_digest(opened, "blake2b").digest())
    return digest.digest()


def _read(
    path: Path, config: dict[str, Any], vocab_size: int, model_type: str, notes: list[str]
) -> dict[str, bytes]:
    file = path / "tokenizer.json"
    if not file.is_file() or file.stat().st_size < LARGE:
        return tokenizer_metadata(path, config, vocab_size, model_type, notes=notes)
    question = json.dumps([str(path), config, vocab_size, model_type])
    try:
        done = subprocess.run(
            # With -P nothing in the user's folder is taken for a module.
            [sys.executable, "-P", "-m", "edgemerge.formats.tokenizer.process"],
            input=question.encode(),
            capture_output=True,
            check=False,
        )
    except OSError as error:
        reason = error.strerror
        raise RuntimeFailure(f"{file}: no process to read it can be started ({reason})") from error
    head, newline, values = done.stdout.partition(b"\n")
    if not newline:
        raise RuntimeFailure(f"{file}: the process that read it ended; free some memory")
    answer = json.loads(head)
    if "refusal" in answer:
        where = Path(answer["path"])
        raise FormatError(answer["refusal"].removeprefix(f"{where}: "), path=where)
    notes += answer["notes"]
    found, at = {}, 0
    for key, n_bytes in answer["sizes"]:
        found[key] = values[at : at + n_bytes]
        at += n_bytes
    return found


def _answer() -> None:
    """Read a question from stdin; write a line of JSON, then the values one after the other."""
    path, config, vocab_size, model_type = json.load(sys.stdin)
    out, notes = sys.stdout.buffer, list[str]()
    try:
        found = tokenizer_metadata(Path(path), config, vocab_size, model_type, notes=notes)
    except FormatError as error:
        out.write(json.dumps({"refusal": str(error), "path": str(error.path)}).encode() + b"\n")
        return
    sizes = [(key, len(value)) for key, value in found.items()]
    out.write(json.dumps({"sizes": sizes, "notes": notes}).encode() + b"\n")
    out.writelines(found.values())


if __name__ == "__main__":
    _answer()

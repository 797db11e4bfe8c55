"""Reading GGUF files: a strict header parser over `pread`, and rows of tensors.

gguf-py's reader maps the file, builds a Python object per token (721 MB for a 262k vocabulary) and accepts
files that ggml refuses, so the header is parsed here: every count, length, offset and type is checked
against the file before it is used, and the key-value section is kept as raw bytes (`formats.metadata`).
Format: ggml/docs/gguf.md; limits: `gguf_init_from_file_impl` in ggml/src/gguf.cpp.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path

from edgemerge.errors import FormatError
from edgemerge.formats import metadata as meta
from edgemerge.formats.codec import GGML_TYPES, block_size
from edgemerge.formats.files import describe_foreign, forget_range, read_exactly
from edgemerge.types import TensorSpec, UInt8

__all__ = ["ALIGNMENT_KEY", "DEFAULT_ALIGNMENT", "GgufModel", "align_up"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_ALIGNMENT = 1 << 16
MAX_KEY_BYTES = (1 << 16) - 1  # gguf.md: at most 2^16 - 1 bytes
MAX_NAME_BYTES = 63  # GGML_MAX_NAME is 64 with its NUL
MAX_DIMS = 4
MAX_ELEMENTS = (1 << 63) - 1
MIN_PAIR_BYTES = 8 + 1 + 4 + 1  # key length, one byte of key, type, one byte of value
MIN_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8  # name length, one byte of name, n_dims, type, offset
CHUNK = 1 << 20
SCALAR_SIZES = {type_id: struct.calcsize(fmt) for type_id, fmt in meta.SCALARS.values()}
BOOL = meta.TYPE_IDS["bool"]


def align_up(offset: int, alignment: int) -> int:
    """Return the smallest multiple of `alignment` that is at least `offset`."""
    return (offset + alignment - 1) // alignment * alignment


class GgufModel:
    """A GGUF file (version 2 or 3, little-endian, not split) as a `Source`.

    Raises
    ------
    FormatError
        The header breaks the format, or the file is not a GGUF at all.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            header = _HeaderParser(self.path, self._fd)
            self._metadata, self._specs, self._offsets = header.parse()
            self.trailing_bytes = header.trailing_bytes
            self.architecture = _architecture(self.path, self._metadata)
            _refuse_lone_split(self.path, self._metadata)
        except BaseException:
            os.close(self._fd)
            raise

    def specs(self) -> Mapping[str, TensorSpec]:
        """All tensors by name, in the order of the file."""
        return self._specs

    def metadata(self) -> Mapping[str, bytes]:
        """Key -> typed value, raw."""
        return self._metadata

    def read_rows(self, name: str, start: int, stop: int, out_u8: UInt8) -> None:
        """Fill `out_u8` with the stored bytes of rows [start, stop)."""
        row_bytes = self._specs[name].row_bytes
        assert out_u8.nbytes == (stop - start) * row_bytes
        read_exactly(self._fd, out_u8, self._offsets[name] + start * row_bytes, self.path, name)

    def forget(self, name: str) -> None:
        """Drop the tensor's pages from the page cache."""
        forget_range(self._fd, self._offsets[name], self._specs[name].nbytes)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def _architecture(path: Path, metadata: Mapping[str, bytes]) -> str:
    value = meta.get_value(metadata, "general.architecture")
    if not isinstance(value, str) or not value:
        raise FormatError(
            "has no general.architecture, so it is no model; export it again with llama.cpp's converter",
            path=path,
        )
    return value


def _refuse_lone_split(path: Path, metadata: Mapping[str, bytes]) -> None:
    count = meta.get_value(metadata, "split.count", 0)
    number = meta.get_value(metadata, "split.no", 0)
    if not isinstance(count, int) or not isinstance(number, int) or count <= 1:
        return
    stem = path.name.removesuffix(".gguf").removesuffix(f"-{number + 1:05d}-of-{count:05d}")
    others = [f"{stem}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count) if i != number]
    listed = ", ".join(others[:4]) + (" and so on" if len(others) > 4 else "")
    raise FormatError(
        f"is part {number + 1} of a split of {count}; join it with {listed} "
        "by llama-gguf-split --merge first",
        path=path,
    )


class _HeaderParser:
    """Walks the header once, front to back, through one buffer of `CHUNK` bytes."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd
        self.size = os.fstat(fd).st_size
        self.at = 0  # position in the file
        self.buffer = b""
        self.buffer_start = 0
        self.trailing_bytes = 0

    def fail(self, message: str, tensor: str | None = None) -> FormatError:
        return FormatError(message, path=self.path, tensor=tensor)

    # -- primitives ----------------------------------------------------------------------------

    def take(self, n_bytes: int) -> bytes:
        """Return the next bytes and step over them."""
        start = self._view(n_bytes)
        self.at += n_bytes
        return self.buffer[start : start + n_bytes]

    def skip(self, n_bytes: int) -> None:
        if n_bytes > self.size - self.at:
            raise self.fail("is cut off inside its header; download it again")
        self.at += n_bytes

    def _view(self, n_bytes: int) -> int:
        """Make the buffer hold the next bytes; return where they begin in it."""
        if n_bytes > self.size - self.at:
            raise self.fail("is cut off inside its header; download it again")
        start = self.at - self.buffer_start
        if start < 0 or start + n_bytes > len(self.buffer):
            self.buffer = os.pread(self.fd, max(n_bytes, CHUNK), self.at)
            self.buffer_start = self.at
            start = 0
            if len(self.buffer) < n_bytes:
                raise self.fail("shrank while it was read; download it again")
        return start

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    # -- the header, top down --------------------------------------------------------------------

    def parse(self) -> tuple[dict[str, bytes], dict[str, TensorSpec], dict[str, int]]:
        n_tensors, n_pairs = self.parse_preamble()
        metadata = self.parse_pairs(n_pairs)
        alignment = self.parse_alignment(metadata)
        specs, relative = self.parse_tensor_infos(n_tensors)
        data_start = align_up(self.at, alignment)
        self.check_layout(specs, relative, alignment, data_start)
        return metadata, specs, {name: data_start + at for name, at in relative.items()}

    def parse_preamble(self) -> tuple[int, int]:
        head = os.pread(self.fd, 512, 0)
        if head[:4] != MAGIC:
            raise self.fail(describe_foreign(head, "GGUF"))
        self.skip(4)
        version = self.u32()
        if version and version & 0xFFFF == 0:
            raise self.fail(
                "is a big-endian GGUF; convert it with gguf-py's gguf_convert_endian.py"
            )
        if version not in VERSIONS:
            raise self.fail(
                f"is GGUF version {version}; only versions 2 and 3 are read, convert it anew"
            )
        n_tensors, n_pairs = self.u64(), self.u64()
        room = self.size - self.at
        if n_pairs > room // MIN_PAIR_BYTES or n_tensors > room // MIN_TENSOR_BYTES:
            raise self.fail(
                f"claims {n_pairs} keys and {n_tensors} tensors, more than its {self.size} bytes can hold; "
                "download it again"
            )
        return n_tensors, n_pairs

    def parse_pairs(self, n_pairs: int) -> dict[str, bytes]:
        metadata: dict[str, bytes] = {}
        for _ in range(n_pairs):
            key = self.parse_name("key", MAX_KEY_BYTES)
            if key in metadata:
                raise self.fail(f"has the key {key!r} twice; export it again")
            start = self.at
            self.step_over_value(key)
            metadata[key] = self.read_back(start)
        return metadata

    def read_back(self, start: int) -> bytes:
        """Return the raw bytes of a value that was just stepped over."""
        offset = start - self.buffer_start
        if offset >= 0 and self.at - self.buffer_start <= len(self.buffer):
            return self.buffer[offset : self.at - self.buffer_start]
        return os.pread(self.fd, self.at - start, start)

    def parse_name(self, what: str, limit: int) -> str:
        length = self.u64()
        if not 0 < length <= limit:
            raise self.fail(
                f"has a {what} of {length} bytes (1 to {limit} are allowed); export it again"
            )
        raw = self.take(length)
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(
                f"has a {what} that is not UTF-8: {raw[:40]!r}; export it again"
            ) from None
        if "\0" in name:
            raise self.fail(f"has a {what} with a NUL byte: {name[:40]!r}; export it again")
        return name

    def step_over_value(self, key: str) -> None:
        type_id = self.u32()
        if type_id == meta.STRING:
            self.step_over_strings(1)
        elif type_id == meta.ARRAY:
            self.step_over_array(key)
        elif type_id in SCALAR_SIZES:
            raw = self.take(SCALAR_SIZES[type_id])
            if type_id == BOOL and raw[0] > 1:
                raise self.fail(f"key {key!r} is a bool of value {raw[0]}; export it again")
        else:
            raise self.fail(f"key {key!r} has the unknown type {type_id}; export it again")

    def step_over_array(self, key: str) -> None:
        element, count = self.u32(), self.u64()
        if element == meta.STRING:
            self.step_over_strings(count)
        elif element in SCALAR_SIZES:
            self.skip(count * SCALAR_SIZES[element])
        elif element == meta.ARRAY:
            raise self.fail(
                f"key {key!r} is an array of arrays, which ggml refuses; export it again"
            )
        else:
            raise self.fail(
                f"key {key!r} is an array of the unknown type {element}; export it again"
            )

    def step_over_strings(self, count: int) -> None:
        if count > (self.size - self.at) // 8:
            raise self.fail(f"has an array of {count} strings, more than the file can hold")
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            # The buffer is probed by hand: a call per token would double the time for 262k of them.
            start = self.at - self.buffer_start
            if start < 0 or start + 8 > len(self.buffer):
                start = self._view(8)
            (length,) = unpack(self.buffer, start)
            self.at += 8
            if length > self.size - self.at:
                raise self.fail("has a string longer than the file; download it again")
            self.at += length

    def parse_alignment(self, metadata: Mapping[str, bytes]) -> int:
        raw = metadata.get(ALIGNMENT_KEY)
        if raw is None:
            return DEFAULT_ALIGNMENT
        value = meta.decode_value(raw)
        is_u32 = int.from_bytes(raw[:4], "little") == meta.TYPE_IDS["u32"]
        if not isinstance(value, int) or not is_u32:
            raise self.fail(f"{ALIGNMENT_KEY} ({value}) is not of type u32; export it again")
        if value & (value - 1) or not 0 < value <= MAX_ALIGNMENT:
            raise self.fail(
                f"{ALIGNMENT_KEY} is {value}, not a power of two up to {MAX_ALIGNMENT}; export it again"
            )
        return value

    def parse_tensor_infos(self, n_tensors: int) -> tuple[dict[str, TensorSpec], dict[str, int]]:
        specs: dict[str, TensorSpec] = {}
        offsets: dict[str, int] = {}
        for _ in range(n_tensors):
            name = self.parse_name("tensor name", MAX_NAME_BYTES)
            if name in specs:
                raise self.fail("stands in the file twice; export it again", name)
            specs[name] = self.parse_tensor_info(name)
            offsets[name] = self.u64()
        return specs, offsets

    def parse_tensor_info(self, name: str) -> TensorSpec:
        n_dims = self.u32()
        if not 1 <= n_dims <= MAX_DIMS:
            raise self.fail(
                f"has {n_dims} dimensions (1 to {MAX_DIMS} are allowed); export it again", name
            )
        shape = tuple(reversed(struct.unpack(f"<{n_dims}Q", self.take(8 * n_dims))))
        if prod(shape) > MAX_ELEMENTS:
            raise self.fail(f"has the impossible shape {shape}; download it again", name)
        type_id = self.u32()
        dtype = GGML_TYPES.get(type_id)
        if dtype is None:
            raise self.fail(
                f"has the unknown or removed ggml type {type_id}; convert the model anew", name
            )
        block_len, block_bytes = block_size(dtype)
        if shape[-1] % block_len:
            raise self.fail(
                f"has rows of {shape[-1]}, which {dtype} blocks of {block_len} do not fill", name
            )
        return TensorSpec(name, shape, dtype, prod(shape) // block_len * block_bytes)

    def check_layout(
        self,
        specs: Mapping[str, TensorSpec],
        offsets: Mapping[str, int],
        alignment: int,
        data_start: int,
    ) -> None:
        """Tensors lie one after the other, each padded to the alignment, all inside the file."""
        expected = 0
        for name, spec in specs.items():
            if offsets[name] != expected:
                raise self.fail(
                    f"lies at offset {offsets[name]} where {expected} was expected "
                    "(an overlap, a gap or bad alignment); export the file again",
                    name,
                )
            if data_start + expected + spec.nbytes > self.size:
                raise self.fail(
                    f"ends {data_start + expected + spec.nbytes - self.size} bytes past the end of the file; "
                    "the download is cut off, get it again",
                    name,
                )
            expected = align_up(expected + spec.nbytes, alignment)
        self.trailing_bytes = max(0, self.size - (data_start + expected))

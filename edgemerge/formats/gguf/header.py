"""The header of a GGUF file: a strict parser.

gguf-py's reader maps the file and builds a Python object per token: 721 MB for a vocabulary of 262k. It also
accepts files that ggml refuses. So the header is parsed here. Every count, length, offset and type is checked
against the file before it is used. The key-value section stays raw bytes (`edgemerge.formats.gguf.metadata`).
Format: ggml/docs/gguf.md; limits: `gguf_init_from_file_impl` in ggml/src/gguf.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod

from edgemerge.errors import FormatError
from edgemerge.formats.byte_file import ByteFile
from edgemerge.formats.files import describe_foreign
from edgemerge.formats.gguf import metadata as meta
from edgemerge.formats.quants.codec import GGML_TYPES, block_size
from edgemerge.types import TensorSpec

__all__ = ["ALIGNMENT_KEY", "DEFAULT_ALIGNMENT", "MAGIC", "HeaderParser", "align_up"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_ALIGNMENT = 1 << 16
MAX_KEY_BYTES = (1 << 16) - 1  # gguf.md: at most 2^16 - 1 bytes
MAX_NAME_BYTES = 63  # GGML_MAX_NAME is 64 with its NUL
MAX_DIMS = 4
MAX_ELEMENTS = (1 << 63) - 1
# More than any model needs, less than hurts a small board: a vocabulary of 262 144 tokens has 6 MB, and
# one million tokens with merges 40.
MAX_METADATA_BYTES = 48 << 20
MAX_STRINGS = 1 << 21  # in one array; stepping over so many takes a quarter of a second
MAX_TEXT_BYTES = 1 << 20  # of one string, which may take four times as much once decoded
UNREAD_TEXT = "tokenizer.huggingface.json"  # a whole tokenizer.json, which gguf.md provides for
MAX_PAIRS = 1 << 14
MAX_TENSORS = 1 << 16
MIN_PAIR_BYTES = 8 + 1 + 4 + 1  # key length, one byte of key, type, one byte of value
MIN_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8  # name length, one byte of name, n_dims, type, offset
CHUNK = 1 << 20
SCALAR_SIZES = {type_id: struct.calcsize(fmt) for type_id, fmt in meta.SCALARS.values()}
BOOL = meta.TYPE_IDS["bool"]


def align_up(offset: int, alignment: int) -> int:
    """Return the smallest multiple of `alignment` that is at least `offset`."""
    return (offset + alignment - 1) // alignment * alignment


class HeaderParser:
    """Walks the header once, front to back, through one buffer of `CHUNK` bytes."""

    def __init__(self, file: ByteFile) -> None:
        self.path = file.path
        self.file = file
        self.size = file.state.n_bytes
        self.at = 0  # position in the file
        self.buffer = b""
        self.buffer_start = 0
        self.trailing_bytes = 0

    def fail(self, message: str, tensor: str | None = None) -> FormatError:
        """Make an error that names the file."""
        return FormatError(message, path=self.path, tensor=tensor)

    # -- primitives ----------------------------------------------------------------------------

    def take(self, n_bytes: int) -> bytes:
        """Return the next bytes and step over them."""
        start = self._view(n_bytes)
        self.at += n_bytes
        return self.buffer[start : start + n_bytes]

    def skip(self, n_bytes: int) -> None:
        """Step over bytes."""
        if n_bytes > self.size - self.at:
            raise self.fail("is cut off inside its header; download it again")
        self.at += n_bytes

    def _view(self, n_bytes: int) -> int:
        """Make the buffer hold the next bytes; return where they begin in it."""
        if n_bytes > self.size - self.at:
            raise self.fail("is cut off inside its header; download it again")
        start = self.at - self.buffer_start
        if start < 0 or start + n_bytes > len(self.buffer):
            self.buffer = self.file.read(max(n_bytes, CHUNK), self.at)
            self.buffer_start = self.at
            start = 0
            if len(self.buffer) < n_bytes:
                raise self.fail("shrank while it was read; download it again")
        return start

    def u32(self) -> int:
        """Take a number of four bytes."""
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        """Take a number of eight bytes."""
        return int.from_bytes(self.take(8), "little")

    # -- the header, top down --------------------------------------------------------------------

    def parse(self) -> tuple[dict[str, bytes], dict[str, TensorSpec], dict[str, int]]:
        """Return raw values by key, tensors by name, and the positions of their data.

        Raises
        ------
        FormatError
            The header breaks the format, or the file is not a GGUF at all.
        """
        n_tensors, n_pairs = self.parse_preamble()
        metadata = self.parse_pairs(n_pairs)
        alignment = self.parse_alignment(metadata)
        specs, relative = self.parse_tensor_infos(n_tensors)
        data_start = align_up(self.at, alignment)
        self.check_layout(specs, relative, alignment, data_start)
        return metadata, specs, {name: data_start + at for name, at in relative.items()}

    def parse_preamble(self) -> tuple[int, int]:
        """Check the first bytes; return how many tensors and keys there are."""
        head = self.file.read(512, 0)
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
        if n_pairs > MAX_PAIRS or n_tensors > MAX_TENSORS:
            raise self.fail(
                f"has {n_pairs} keys and {n_tensors} tensors, the most are {MAX_PAIRS} and "
                f"{MAX_TENSORS}, which no model needs; export it again"
            )
        return n_tensors, n_pairs

    def parse_pairs(self, n_pairs: int) -> dict[str, bytes]:
        """Read keys and their raw values."""
        metadata: dict[str, bytes] = {}
        for _ in range(n_pairs):
            key = self.parse_name("key", MAX_KEY_BYTES)
            if key in metadata:
                raise self.fail(f"has the key {key!r} twice; export it again")
            start = self.at
            self.step_over_value(key)
            self.bound_metadata(self.at)
            metadata[key] = self.read_back(start)
        return metadata

    def bound_metadata(self, end: int) -> None:
        """Refuse metadata that goes on to `end`, before any of it is in memory."""
        if end > MAX_METADATA_BYTES:
            raise self.fail(
                f"has {end} bytes of metadata, the most are {MAX_METADATA_BYTES}; export it again"
            )

    def read_back(self, start: int) -> bytes:
        """Return the raw bytes of a value that was just stepped over."""
        offset = start - self.buffer_start
        if offset >= 0 and self.at - self.buffer_start <= len(self.buffer):
            return self.buffer[offset : self.at - self.buffer_start]
        return self.file.read(self.at - start, start)

    def parse_name(self, what: str, limit: int) -> str:
        """Read a key or the name of a tensor."""
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
        """Check one value."""
        type_id = self.u32()
        if type_id == meta.STRING:
            self.step_over_text(key)
        elif type_id == meta.ARRAY:
            self.step_over_array(key)
        elif type_id in SCALAR_SIZES:
            raw = self.take(SCALAR_SIZES[type_id])
            if type_id == BOOL and raw[0] > 1:
                raise self.fail(f"key {key!r} is a bool of value {raw[0]}; export it again")
        else:
            raise self.fail(f"key {key!r} has the unknown type {type_id}; export it again")

    def step_over_text(self, key: str) -> None:
        """Check one string that stands alone."""
        length = self.u64()
        if length > MAX_TEXT_BYTES and key != UNREAD_TEXT:
            raise self.fail(
                f"key {key!r} is a text of {length} bytes, the most are {MAX_TEXT_BYTES}; export it again"
            )
        self.skip(length)

    def step_over_array(self, key: str) -> None:
        """Check one array."""
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
        """Check strings, one after the other."""
        if count > (self.size - self.at) // 8:
            raise self.fail(
                f"has an array of {count} strings, more than the file can hold; download it again"
            )
        if count > MAX_STRINGS:
            raise self.fail(
                f"has an array of {count} strings, the most are {MAX_STRINGS}; export it again"
            )
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
        """Read what tensor data is padded to."""
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
        """Read what is said of the tensors, and their offsets in the data."""
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
        """Read shape and type of one tensor."""
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

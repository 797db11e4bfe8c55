"""Hostile files that are large, or say so: refused before any of it is held in memory.

They are sparse, so that they cost no disk; a download that unpacks to one costs as little.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.header import (
    MAX_METADATA_BYTES,
    MAX_PAIRS,
    MAX_STRINGS,
    MAX_TENSORS,
)
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.gguf.model import GgufModel
from edgemerge.formats.hub.card import general_metadata
from edgemerge.formats.hub.files import stored_tensors
from edgemerge.formats.hub.made_config import make_config
from edgemerge.formats.hub.model import HubModel
from edgemerge.formats.hub.safetensors import MAX_HEADER_BYTES, MAX_HEADER_VALUES, read_header
from edgemerge.formats.inspection import inspect_model, shorten
from edgemerge.formats.json_file import MAX_BYTES, MAX_VALUES, read_object
from edgemerge.formats.llama_rules.charsmap import leaves_table
from edgemerge.formats.llama_rules.mending import mend_metadata
from edgemerge.planning.losses import foresee_losses
from edgemerge.runtime.doctor.fit import read_needs
from edgemerge.types import Float32
from tests.support.bounded import bounded
from tests.support.fixtures import unpacked

ARCHITECTURES = unpacked("architectures")
GIB = 1 << 30
STRING, ARRAY, U8 = 8, 9, 0


def sparse(path: Path, head: bytes, size: int) -> Path:
    """A file that begins with `head` and goes on with zeros that take no disk."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    return path


def header(n_tensors: int, n_pairs: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_pairs)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def refuse(opens: Callable[[], object], reason: str) -> None:
    def refused() -> None:
        with pytest.raises(FormatError, match=reason):
            opens()

    bounded(refused)


LARGE_GGUFS = {
    "string": (
        header(0, 1) + text(b"k") + struct.pack("<IQ", STRING, 5 * GIB),
        "is a text of 5368709120 bytes",
    ),
    "tokenizer": (
        header(0, 1) + text(b"tokenizer.huggingface.json") + struct.pack("<IQ", STRING, 5 * GIB),
        "bytes of metadata",
    ),
    "array": (
        header(0, 1) + text(b"k") + struct.pack("<IIQ", ARRAY, U8, 5 * GIB),
        "bytes of metadata",
    ),
    "strings": (
        header(0, 1) + text(b"k") + struct.pack("<IIQ", ARRAY, STRING, GIB // 2),
        f"the most are {MAX_STRINGS}",
    ),
    "tensors": (header(MAX_TENSORS + 1, 0), "which no model needs"),
    "pairs": (header(0, MAX_PAIRS + 1), "which no model needs"),
}
# Arrays as large as metadata may be, where one word or number is expected.
N_ITEMS = MAX_METADATA_BYTES - 4096
SCALAR_KEYS = {
    b"general.architecture": "has no general.architecture",
    b"general.alignment": "is not of type u32",
    b"split.count": "has no general.architecture",
}
LARGE_HEADERS = {
    "text": b'{"__metadata__":{"a":"' + b"x" * (MAX_HEADER_BYTES - 30) + b'"}}',
    "nested": b'{"a":' + b"[" * (MAX_HEADER_VALUES - 9) + b"]" * (MAX_HEADER_VALUES - 9) + b"}",
    "values": b'{"a":[' + b"[]," * (MAX_HEADER_VALUES // 2 - 9) + b"[]]}",
    "digits": b'{"a":' + b"9" * (MAX_HEADER_BYTES - 10) + b"}",
    "spaces": b"{" + b" " * (MAX_HEADER_BYTES - 10) + b"}",
    "too many values": b'{"a":[' + b"[]," * MAX_HEADER_VALUES + b"[]]}",
}


def write_large_gguf(path: Path, what: str) -> Path:
    """A file of 6 GiB, nearly all of them a hole."""
    return sparse(path, LARGE_GGUFS[what][0], 6 * GIB)


def write_large_array(path: Path, key: bytes) -> Path:
    """A GGUF file of 48 MB, nearly all of them an array of small numbers under one key."""
    head = header(0, 1) + text(key) + struct.pack("<IIQ", ARRAY, U8, N_ITEMS)
    return sparse(path, head, len(head) + N_ITEMS)


def write_large_header(path: Path, what: str) -> Path:
    """A safetensors file with as much of a header as may be."""
    raw = LARGE_HEADERS[what]
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"data")
    return path


@pytest.mark.parametrize("what", LARGE_GGUFS)
def test_a_large_gguf_is_refused_at_once(tmp_path: Path, what: str) -> None:
    path = write_large_gguf(tmp_path / "m.gguf", what)
    refuse(lambda: GgufModel(path), LARGE_GGUFS[what][1])


@pytest.mark.parametrize("key", SCALAR_KEYS)
def test_an_array_where_a_scalar_is_expected_is_not_expanded(tmp_path: Path, key: bytes) -> None:
    """As a list of Python's numbers, 48 MB cost 791 MB."""
    path = write_large_array(tmp_path / "m.gguf", key)
    refuse(lambda: GgufModel(path), SCALAR_KEYS[key])


def test_a_model_with_large_arrays_under_all_keys_is_inspected_in_little_memory(
    tmp_path: Path,
) -> None:
    """Every reader of a single value meets an array; none makes a list of it."""
    keys = ["general.name", "general.type", "general.file_type", "tokenizer.ggml.model"]
    keys += ["tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.bos_token_id"]
    keys += ["tokenizer.chat_template", "edgemerge.method", "edgemerge.seed", "edgemerge.version"]
    keys += [f"llama.{key}" for key in ("block_count", "context_length", "embedding_length")]
    keys += [f"llama.attention.{key}" for key in ("head_count", "head_count_kv", "key_length")]
    keys += ["llama.feed_forward_length", "llama.rope.freq_base", "llama.tensor_data_layout"]
    n_items = MAX_METADATA_BYTES // len(keys) - 4096
    value = struct.pack("<IIQ", ARRAY, U8, n_items) + bytes(n_items)
    pairs = [text(b"general.architecture") + struct.pack("<I", STRING) + text(b"llama")]
    pairs += [text(key.encode()) + value for key in keys]
    path = tmp_path / "m.gguf"
    path.write_bytes(header(0, len(pairs)) + b"".join(pairs))

    def look() -> None:
        model = GgufModel(path)
        inspection = inspect_model(model)
        shorten(asdict(inspection))
        foresee_losses(model)
        read_needs(model)
        assert inspection.file_type is None

    bounded(look)


def test_metadata_is_bounded_in_all(tmp_path: Path) -> None:
    value = struct.pack("<IIQ", ARRAY, U8, MAX_METADATA_BYTES // 8) + bytes(MAX_METADATA_BYTES // 8)
    raw = header(0, 9) + b"".join(text(b"%d" % i) + value for i in range(9))
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    refuse(lambda: GgufModel(path), "bytes of metadata")


@pytest.mark.parametrize("what", LARGE_HEADERS)
def test_the_largest_safetensors_header(tmp_path: Path, what: str) -> None:
    path = write_large_header(tmp_path / "m.safetensors", what)
    refuse(lambda: read_header(path), "get the file again")


def test_a_safetensors_header_beyond_the_bound(tmp_path: Path) -> None:
    size = MAX_HEADER_BYTES + 1
    path = sparse(tmp_path / "m.safetensors", struct.pack("<Q", size) + b"{", 2 * size)
    refuse(lambda: read_header(path), "the most is")


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":' * (MAX_VALUES // 2) + b"1" + b"}" * (MAX_VALUES // 2),
        b'{"a":[' + b"{}," * MAX_VALUES + b"1]}",
        b'{"a":"' + b"x" * MAX_BYTES + b'"}',
    ],
    ids=["nested", "values", "text"],
)
def test_a_json_bomb(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    refuse(lambda: read_object(path), "get")


def test_an_index_with_a_large_shard_name(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "x" * 9_000_000 + ".safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(lambda: stored_tensors(tmp_path), "is not a plain")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", (1 << 31) - 1),
        ("num_hidden_layers", 4096),
        ("head_dim", (1 << 31) - 2),
        ("num_local_experts", (1 << 31) - 1),
        ("vocab_size", (1 << 31) - 1),
    ],
)
def test_a_config_of_billions(tmp_path: Path, key: str, value: int) -> None:
    """Lists and tables as long as a number of config.json says are not made on its word."""
    for name in ("gemma3", "mixtral", "smollm3"):
        folder = tmp_path / name
        shutil.copytree(ARCHITECTURES / name, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        if key != "num_local_experts" or name == "mixtral":
            refuse(partial(HubModel, folder), "config.json|missing|shape")


def test_a_model_card_that_grows_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    laughs = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    laughs += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    card = tmp_path / "README.md"
    for front in ("\n".join([*laughs, "name: *a8"]), "tags: [" + "x, " * 100_000 + "x]"):
        card.write_text(f"---\n{front}\n---\n# Model\n")
        caplog.clear()
        bounded(lambda: general_metadata(tmp_path, "llama", []))
        assert "the model card is left out" in caplog.text
    sparse(card, b"---\n", GIB)
    bounded(lambda: general_metadata(tmp_path, "llama", []))


def test_a_large_generation_config_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault: gguf read all of it, and 8 MB of lists took 180."""
    (tmp_path / "generation_config.json").write_text("[" + "[]," * (8 << 20) + "[]]")
    bounded(lambda: general_metadata(tmp_path, "llama", []))
    assert "generation_config.json is larger than 256 KiB" in caplog.text


@pytest.mark.parametrize("key", ["tokenizer.ggml.scores", "tokenizer.ggml.token_type"])
def test_a_large_array_beside_a_vocabulary_is_not_converted(key: str) -> None:
    """Fault: 40 MB of small numbers took gigabytes on the way to another type."""
    raw = struct.pack("<IIQ", ARRAY, U8, N_ITEMS) + bytes(N_ITEMS)
    texts = encode_value([b"a", b"a", b"b"], "[str]")  # one twice, so that types are looked at
    metadata = {"tokenizer.ggml.model": encode_value("llama", "str"), key: raw}
    metadata |= {"tokenizer.ggml.tokens": texts}
    bounded(lambda: mend_metadata(metadata))
    assert mend_metadata(metadata)[0][key] == raw


def test_a_large_array_of_an_architecture_makes_no_configuration() -> None:
    """Fault: a list was made of all 40 MB."""
    raw = struct.pack("<IIQ", ARRAY, U8, N_ITEMS) + bytes(N_ITEMS)
    metadata = {"general.architecture": encode_value("llama", "str")}
    metadata |= {"llama.block_count": encode_value(2, "u32"), "llama.context_length": raw}

    def read(name: str, start: int = 0, stop: int | None = None) -> Float32:
        raise AssertionError(name)

    refuse(lambda: make_config(Path("m.gguf"), metadata, {}, read), "is a list of [0-9]{8}, so no ")


def test_a_large_table_of_characters_is_not_copied() -> None:
    """Fault: several copies of it, each twice as large as the table."""
    units = np.zeros(4 << 20, "<u4")
    raw = struct.pack("<I", units.nbytes) + units.tobytes() + b"x\0"
    bounded(lambda: leaves_table(raw))
    assert not leaves_table(raw)

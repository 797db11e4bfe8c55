"""Deltas that are damaged, hostile or for another base are refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgemerge.errors import EdgemergeError, FormatError, MismatchError
from edgemerge.formats import open_model
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.gguf.model import GgufFile
from edgemerge.formats.gguf.writer import make_layout
from edgemerge.merging.delta import DeltaSettings, make_delta
from edgemerge.runtime.model_files import check_adapter, open_gguf
from edgemerge.types import TensorSpec
from tests.support.small_models import wide_tensors, write_gguf
from tests.support.sources import read_all

Raw = NDArray[np.uint8]
Tensors = dict[str, tuple[TensorSpec, Raw]]
FORMS = {"coded": DeltaSettings(bits=1), "sparse": DeltaSettings(density=0.1)}
FORMS["low rank"] = DeltaSettings(rank=2)
HEAD = "output.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an expert, and a delta of each form."""
    folder = tmp_path_factory.mktemp("deltas")
    base = wide_tensors(0)
    left = write_gguf(folder / "base.gguf", base)
    right = write_gguf(folder / "expert.gguf", wide_tensors(1, base))
    for name, asked in FORMS.items():
        make_delta(left, right, folder / f"{name}.gguf", asked)
    return folder


def read_delta(path: Path) -> tuple[dict[str, bytes], Tensors]:
    """All that a file holds."""
    with closing(GgufFile(path)) as file:
        tensors: Tensors = {}
        for name, spec in file.specs.items():
            raw = np.empty(spec.nbytes, np.uint8)
            file.read_bytes(name, 0, raw)
            tensors[name] = spec, raw
        return dict(file.metadata), tensors


def write_delta(path: Path, metadata: Mapping[str, bytes], tensors: Tensors) -> Path:
    layout = make_layout(metadata, [spec for spec, _ in tensors.values()])
    content = bytearray(layout.n_bytes)
    content[: len(layout.header)] = layout.header
    for name, (_, raw) in tensors.items():
        at = layout.offsets[name]
        content[at : at + raw.size] = raw.tobytes()
    path.write_bytes(content)
    return path


def refusal(folder: Path, path: Path) -> EdgemergeError:
    with (
        pytest.raises(EdgemergeError) as caught,
        closing(open_model(f"{folder / 'base.gguf'}+{path}")) as source,
    ):
        read_all(source)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return caught.value


@pytest.mark.parametrize("form", FORMS)
def test_another_base_is_refused(form: str, folder: Path, tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "other.gguf", wide_tensors(2))
    delta = folder / f"{form}.gguf"
    with pytest.raises(MismatchError, match="is a delta of another base") as caught:
        open_model(f"{other}+{delta}")
    assert str(other) in str(caught.value)
    assert str(delta) in str(caught.value)
    assert "'base.gguf'" in str(caught.value)


def test_the_base_may_be_another_file_with_its_values(folder: Path, tmp_path: Path) -> None:
    base = wide_tensors(0)
    again = write_gguf(tmp_path / "again.gguf", dict(reversed(base.items())))
    with closing(open_model(f"{again}+{folder / 'coded.gguf'}")) as source:
        found = read_all(source)
    with closing(open_model(f"{folder / 'base.gguf'}+{folder / 'coded.gguf'}")) as source:
        assert all(np.array_equal(found[name], x) for name, x in read_all(source).items())


@pytest.mark.parametrize("form", FORMS)
def test_gguf_py_reads_it(form: str, folder: Path) -> None:
    reader = gguf.GGUFReader(folder / f"{form}.gguf")
    assert reader.fields["general.type"].contents() == "delta"
    with closing(GgufFile(folder / f"{form}.gguf")) as file:
        assert [tensor.name for tensor in reader.tensors] == list(file.specs)


@pytest.mark.parametrize("form", FORMS)
def test_a_truncated_file_is_refused(form: str, folder: Path, tmp_path: Path) -> None:
    whole = (folder / f"{form}.gguf").read_bytes()
    for part in (0.02, 0.3, 0.6, 0.99):
        path = tmp_path / "delta.gguf"
        path.write_bytes(whole[: int(part * len(whole))])
        assert isinstance(refusal(folder, path), FormatError)


Change = Callable[[dict[str, bytes], Tensors], object]


def _edit(name: str, values: Any) -> Change:
    """Overwrite the first bytes of a tensor."""

    def change(_: dict[str, bytes], tensors: Tensors) -> None:
        raw = np.array(values).view(np.uint8)
        tensors[name][1][: raw.size] = raw

    return change


def _drop(name: str) -> Change:
    return lambda _, tensors: tensors.pop(name)


def _reshape(name: str, shape: tuple[int, ...]) -> Change:
    def change(_: dict[str, bytes], tensors: Tensors) -> None:
        spec, raw = tensors[name]
        tensors[name] = TensorSpec(name, shape, spec.dtype, spec.nbytes), raw

    return change


def _retype(name: str, dtype: str) -> Change:
    def change(_: dict[str, bytes], tensors: Tensors) -> None:
        shape = tensors[name][0].shape
        spec = TensorSpec(name, shape, dtype, 4 * TensorSpec(name, shape, dtype, 0).n_elements)
        tensors[name] = spec, np.zeros(spec.nbytes, np.uint8)

    return change


def _rename(name: str, other: str) -> Change:
    def change(_: dict[str, bytes], tensors: Tensors) -> None:
        spec, raw = tensors.pop(name)
        tensors[other] = TensorSpec(other, spec.shape, spec.dtype, spec.nbytes), raw

    return change


def _set(key: str, value: Any, kind: str) -> Change:
    return lambda metadata, _: metadata.update({key: encode_value(value, kind)})


def _more_values(_: dict[str, bytes], tensors: Tensors) -> None:
    for name, dtype, width in ((PLACES, "I8", 1), (f"{HEAD}.sparse_value", "F16", 2)):
        raw = np.zeros(12_000 * width, np.uint8)
        tensors[name] = TensorSpec(name, (12_000,), dtype, raw.size), raw


NAN = np.array([0x7E00], np.uint16)
GROUPS, PLACES = f"{HEAD}.sparse_end", f"{HEAD}.sparse_at"
HOSTILE: dict[str, tuple[str, Change, str]] = {
    "a newer version": ("coded", _set("delta.version", 2, "u32"), "version 2"),
    "no version": ("coded", lambda metadata, _: metadata.pop("delta.version"), "version None"),
    "no checksum": ("coded", lambda m, _: m.pop("delta.base_sample_crc32"), "another base"),
    "no exponents": ("coded", lambda m, _: m.pop("delta.exponents"), "delta.exponents"),
    "an exponent too few": ("coded", _set("delta.exponents", [0] * 9, "[i32]"), "delta.exponents"),
    "exponents out of range": (
        "coded",
        _set("delta.exponents", [2**30] * 12, "[i32]"),
        "states no",
    ),
    "exponents as text": ("coded", _set("delta.exponents", ["a"] * 12, "[str]"), "states no"),
    "a scale of NaN": ("coded", _edit(HEAD, NAN), "NaN or infinity"),
    "another shape": ("coded", _reshape(HEAD, (20, 512)), "does not fit"),
    "another architecture": ("coded", _set("general.architecture", "qwen2", "str"), "qwen2"),
    "an unknown tensor": ("coded", _rename(HEAD, "blk.7.attn_q.weight"), "no counterpart"),
    "an integer tensor": ("coded", _retype(HEAD, "I32"), "does not fit"),
    "values as integers": ("sparse", _retype(f"{HEAD}.sparse_value", "I32"), "does not fit"),
    "places as integers": ("sparse", _retype(f"{HEAD}.sparse_at", "I32"), "does not fit"),
    "no places": ("sparse", _drop(f"{HEAD}.sparse_at"), "lacks a part"),
    "only a factor": ("low rank", _drop(f"{HEAD}.lora_b"), "lacks a part"),
    "groups that fall": ("sparse", _edit(GROUPS, np.array([9, 3], np.int32)), "do not follow"),
    "groups below 0": ("sparse", _edit(GROUPS, np.array([-5], np.int32)), "do not follow"),
    "groups that wrap": (
        "sparse",
        _edit(GROUPS, np.array([1, 2**31 - 1, -(2**31), 5], np.int32)),
        "do not follow",
    ),
    "groups after the values": (
        "sparse",
        _edit(GROUPS, np.full(40, 2**30, np.int32)),
        "do not follow",
    ),
    "a group of more values than elements": (
        "sparse",
        _edit(GROUPS, np.full(40, 257, np.int32)),
        "do not follow",
    ),
    "a later group of more": (
        "sparse",
        _edit(GROUPS, np.array([9] * 20 + [266] * 20, np.int32)),
        "do not follow",
    ),
    "more values than elements": (
        "sparse",
        _more_values,
        f"tensor {PLACES!r}: has 12000 values for 10240 elements",
    ),
    "sparse NaN": ("sparse", _edit(f"{HEAD}.sparse_value", NAN), "NaN or infinity"),
    "no tensor": ("coded", lambda _metadata, tensors: tensors.clear(), "holds no change"),
    "factors of another shape": ("low rank", _reshape(f"{HEAD}.lora_b", (20, 4)), "does not fit"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    form, change, expected = HOSTILE[name]
    metadata, tensors = read_delta(folder / f"{form}.gguf")
    change(metadata, tensors)
    path = write_delta(tmp_path / "delta.gguf", metadata, tensors)
    assert expected in str(refusal(folder, path))


@given(st.sampled_from(sorted(FORMS)), st.integers(0, 2**32), st.integers(0, 255))
@settings(max_examples=150)
def test_a_byte_that_changed_ends_well(folder: Path, form: str, place: int, value: int) -> None:
    content = bytearray((folder / f"{form}.gguf").read_bytes())
    content[place % min(len(content), 6000)] = value
    path = folder / "changed.gguf"
    path.write_bytes(content)
    with suppress(EdgemergeError), closing(open_model(f"{folder / 'base.gguf'}+{path}")) as source:
        assert source.work_bytes() > 0
        assert all(np.isfinite(x).all() for x in read_all(source).values())


def test_llama_cpp_does_not_get_it(folder: Path) -> None:
    delta = folder / "coded.gguf"
    with pytest.raises(FormatError, match=r"is a delta, .*BASE\+DELTA"):
        check_adapter(delta, folder / "base.gguf")
    with pytest.raises(FormatError, match=r"is a delta, .*BASE\+DELTA"):
        open_gguf(delta)


def test_without_a_base_the_sentence_says_so(folder: Path) -> None:
    from edgemerge.merging.run import plan
    from edgemerge.recipe.recipe import make_recipe

    with pytest.raises(
        FormatError, match="is a delta, not a model; merge or convert it with its base"
    ):
        plan(make_recipe("linear", [(str(folder / "coded.gguf"), None)] * 2))

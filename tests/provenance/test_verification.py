"""A merged file is checked against the checksums that it carries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgemerge.errors import FormatError, VerificationError
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.gguf.model import GgufModel
from edgemerge.merging.run import merge
from edgemerge.provenance.verification import PIECE, verify_model
from edgemerge.recipe.recipe import make_recipe
from tests.support.bits import flip_bit
from tests.support.bounded import bounded
from tests.support.small_models import write_gguf


@pytest.fixture
def merged(golden_dir: Path, tmp_path: Path) -> Path:
    models = [(str(golden_dir / "inputs_f32" / name), None) for name in "ab"]
    merge(make_recipe("linear", models, seed=3), tmp_path / "out.gguf")
    return tmp_path / "out.gguf"


def place(path: Path, name: str) -> int:
    """Where a tensor's first byte is in its file."""
    model = GgufModel(path)
    offset = model._parts[0]._offsets[name]
    model.close()
    return offset


def test_what_was_written_is_sound(merged: Path) -> None:
    found = verify_model(merged, threads=2)
    found.check()
    assert found.is_sound
    assert found.files == (merged,)
    assert (found.tensors, found.damaged, found.trailing_bytes) == (21, (), 0)
    assert (found.provenance.method, found.provenance.seed) == ("linear", 3)
    assert [name for name, _ in found.provenance.inputs] == ["a", "b"]


def test_a_flipped_bit_is_found_and_its_tensor_named(merged: Path) -> None:
    model = GgufModel(merged)
    specs = model.specs()
    model.close()
    rng = np.random.default_rng(0)
    for name, spec in specs.items():
        i_bit = 8 * place(merged, name) + int(rng.integers(8 * spec.nbytes))
        flip_bit(merged, i_bit)
        found = verify_model(merged)
        assert found.damaged == (name,)
        with pytest.raises(VerificationError, match=rf"1 of 21 tensors changed.*'{name}'"):
            found.check()
        flip_bit(merged, i_bit)
    assert verify_model(merged).is_sound


def test_many_damaged_tensors_are_counted(merged: Path) -> None:
    raw = merged.read_bytes()
    start = place(merged, "output.weight")
    merged.write_bytes(raw[:start] + bytes(~byte & 0xFF for byte in raw[start:]))
    found = verify_model(merged)
    assert len(found.damaged) == 21
    with pytest.raises(VerificationError, match=r"21 of 21 tensors .* and 17 more\); get the file"):
        found.check()


def test_bytes_behind_the_last_tensor_are_told(merged: Path) -> None:
    merged.write_bytes(merged.read_bytes() + bytes(5))
    with pytest.raises(VerificationError, match="has 5 bytes after its last tensor"):
        verify_model(merged).check()


def test_all_parts_of_a_split(golden_dir: Path, tmp_path: Path) -> None:
    recipe = make_recipe("passthrough", [(str(golden_dir / "inputs_f32" / "a"), None)])
    report = merge(recipe, tmp_path / "cut.gguf", split_bytes=9000)
    paths = [file.path for file in report.files]
    assert len(paths) > 2
    found = verify_model(paths[1])
    assert found.files == tuple(paths)
    assert found.is_sound
    flip_bit(paths[-1], 8 * (paths[-1].stat().st_size - 64))
    assert len(verify_model(paths[0]).damaged) == 1


def test_a_tensor_of_several_pieces_and_one_of_none(tmp_path: Path) -> None:
    n = PIECE // 4 + 33
    tensors = {"token_embd.weight": np.ones((1, n)), "output_norm.weight": np.ones(8)}
    source = write_gguf(
        tmp_path / "in.gguf", {name: x.astype(np.float32) for name, x in tensors.items()}
    )
    merge(make_recipe("passthrough", [(str(source), None)]), tmp_path / "out.gguf")
    done: list[tuple[int, int]] = []
    found = verify_model(tmp_path / "out.gguf", progress=lambda *at: done.append(at))
    assert found.is_sound
    assert done[-1] == (found.nbytes, found.nbytes)
    assert len(done) == 3
    flip_bit(tmp_path / "out.gguf", 8 * (place(tmp_path / "out.gguf", "token_embd.weight") + PIECE))
    assert verify_model(tmp_path / "out.gguf").damaged == ("token_embd.weight",)


def test_a_tensor_larger_than_the_memory_for_it(tmp_path: Path) -> None:
    """One row of 96 MiB, as only a vector or a hostile file has."""
    tensors = {"output_norm.weight": np.zeros(24 << 20, np.float32)}
    source = write_gguf(tmp_path / "in.gguf", tensors)
    merge(make_recipe("passthrough", [(str(source), None)]), tmp_path / "out.gguf", memory=1 << 30)
    bounded(lambda: verify_model(tmp_path / "out.gguf", threads=2).check())


def test_a_file_without_provenance(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "plain.gguf", {"output_norm.weight": np.ones(8, np.float32)})
    with pytest.raises(VerificationError, match=r"has no provenance section.*structure is sound"):
        verify_model(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(FormatError, match="past the end of the file"):
        verify_model(path)


@pytest.mark.parametrize("checksums", [encode_value([1], "[u32]"), encode_value(7, "u32")])
def test_checksums_that_are_not_those_of_the_tensors(merged: Path, checksums: bytes) -> None:
    with pytest.raises(VerificationError, match="checksums for 21 tensors, so another program"):
        verify_model(replace_value(merged, "edgemerge.tensor_crc32", checksums))


def replace_value(path: Path, key: str, value: bytes) -> Path:
    """Give a copy of a model another value for one key."""
    from edgemerge.formats.gguf.writer import make_layout

    model = GgufModel(path)
    metadata = {**model.metadata(), key: value}
    layout = make_layout(metadata, model.specs().values())
    start = place(path, next(iter(model.specs())))
    model.close()
    target = path.with_name("changed.gguf")
    target.write_bytes(layout.header + path.read_bytes()[start:])
    return target


def test_a_folder_of_others_has_no_checksums(golden_dir: Path) -> None:
    with pytest.raises(VerificationError, match="has no provenance section"):
        verify_model(golden_dir / "inputs_f32" / "a")

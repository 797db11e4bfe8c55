"""A delta of an expert stands for it, as nearly as its bits allow, whatever the budget and the threads."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgemerge.errors import BudgetError, FormatError, MismatchError, OutputError, RecipeError
from edgemerge.formats import open_model
from edgemerge.formats.gguf.model import GgufModel
from edgemerge.merging import delta_pieces
from edgemerge.merging.delta import BITS, DeltaSettings, make_delta
from edgemerge.planning import differences
from edgemerge.provenance.inputs import check_inputs
from tests.merging.test_extraction import tune
from tests.support.architecture_models import ARCHITECTURES
from tests.support.small_models import wide_tensors, write_gguf
from tests.support.sources import read_all
from tests.twins.deltas import add_delta, keep_largest

Float32 = NDArray[np.float32]
Pair = tuple[Path, Path]
MIB = 1 << 20
CODES = {f"bits {bits}": DeltaSettings(bits=bits) for bits in BITS}
SPARSE = {f"sparse {part}": DeltaSettings(density=part) for part in (0.001, 0.1, 1.0)}
ADDED = {**CODES, **SPARSE, "keep": DeltaSettings(), "size": DeltaSettings(nbytes=12_000)}


def read(reference: str | Path, step: int = 1 << 20) -> dict[str, Float32]:
    with closing(open_model(reference)) as source:
        return read_all(source, step)


def narrow_tensors(seed: int, near: dict[str, Float32] | None = None) -> dict[str, Float32]:
    """Rows of 40, which are no whole blocks of any type but F32; a change as small as 1e-7 in one tensor."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (31, 40)}
    shapes |= {"blk.0.attn_q.weight": (40, 40), "output_norm.weight": (40,)}
    found = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    if near is None:
        found["blk.0.attn_q.weight"] *= np.float32(1e-7)
        return found
    scales = {"blk.0.attn_q.weight": 1e-7, "output_norm.weight": 0.1, "token_embd.weight": 0.1}
    return {name: x + np.float32(scales[name]) * found[name] for name, x in near.items()}


@pytest.fixture(scope="module", params=["wide", "narrow"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A base and an expert."""
    folder = tmp_path_factory.mktemp("pair")
    base = wide_tensors(0) if request.param == "wide" else narrow_tensors(0)
    expert = wide_tensors(1, base) if request.param == "wide" else narrow_tensors(1, base)
    tensors = {"base": base, "expert": expert}
    left, right = (write_gguf(folder / f"{name}.gguf", found) for name, found in tensors.items())
    return left, right


def lost_of(pair: Pair, reference: str) -> float:
    """The part of the change's energy that a reference lacks."""
    base, expert, found = read(pair[0]), read(pair[1]), read(reference)
    lost = sum(float(np.square(found[n] - x, dtype=np.float64).sum()) for n, x in expert.items())
    whole = sum(float(np.square(base[n] - x, dtype=np.float64).sum()) for n, x in expert.items())
    return lost / whole


@pytest.mark.parametrize("name", ADDED)
def test_a_delta_is_added_as_its_twin_adds_it(name: str, pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "expert.delta.gguf"
    report = make_delta(*pair, path, ADDED[name])
    expected = add_delta(read(pair[0]), path)
    for step in (1 << 20, 3):
        found = read(f"{pair[0]}+{path}", step)
        assert all(np.array_equal(found[tensor], x) for tensor, x in expected.items())
    assert 1 - report.kept == pytest.approx(lost_of(pair, f"{pair[0]}+{path}"), rel=1e-3, abs=2e-6)
    assert report.out_bytes == path.stat().st_size
    half = read(f"{pair[0]}+0.5*{path}")["token_embd.weight"]
    base = read(pair[0])["token_embd.weight"]
    wanted = base + np.float32(0.5) * (expected["token_embd.weight"] - base)
    assert np.allclose(half, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*ADDED, "rank"])
def test_bytes_are_the_same_for_every_budget_and_thread_count(
    name: str, pair: Pair, tmp_path: Path
) -> None:
    asked = ADDED.get(name, DeltaSettings(rank=3))
    made = []
    for threads, memory in ((1, 200 * MIB), (2, 512 * MIB), (3, 160 * MIB)):
        path = tmp_path / f"{threads}.gguf"
        make_delta(*pair, path, asked, threads=threads, memory=memory)
        made.append(path.read_bytes())
    assert made[0] == made[1] == made[2]


def test_pieces_go_over_the_ends_of_rows(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_delta(*pair, tmp_path / "whole.gguf", DeltaSettings(bits=2))
    monkeypatch.setattr(delta_pieces, "PIECE", 512)
    monkeypatch.setattr(differences, "PIECE", 90)
    make_delta(*pair, tmp_path / "pieces.gguf", DeltaSettings(bits=2))
    found, expected = (read(f"{pair[0]}+{tmp_path / n}.gguf") for n in ("pieces", "whole"))
    assert all(np.array_equal(found[name], x) for name, x in expected.items())


def test_more_bits_lose_less(pair: Pair, tmp_path: Path) -> None:
    kept, sizes = [], []
    for bits in BITS:
        report = make_delta(*pair, tmp_path / f"{bits}.gguf", DeltaSettings(bits=bits))
        kept.append(report.kept)
        sizes.append(report.out_bytes)
    assert kept == sorted(kept)
    assert sizes == sorted(sizes)
    assert kept[0] > 0.1
    assert kept[-1] > 0.9999


@given(st.floats(0.05, 0.9999))
@settings(max_examples=8)
def test_what_is_asked_for_is_kept(pair: Pair, keep: float) -> None:
    path = pair[0].with_name("kept.gguf")
    report = make_delta(*pair, path, DeltaSettings(keep=keep), force=True)
    assert report.kept >= keep - 1e-9
    assert 1 - lost_of(pair, f"{pair[0]}+{path}") >= keep - 1e-6


@given(st.integers(5_000, 100_000))
@settings(max_examples=8)
def test_a_size_bounds_the_file(pair: Pair, nbytes: int) -> None:
    path = pair[0].with_name("sized.gguf")
    report = make_delta(*pair, path, DeltaSettings(nbytes=nbytes), force=True)
    assert path.stat().st_size == report.out_bytes <= nbytes
    more = make_delta(*pair, path, DeltaSettings(nbytes=nbytes + 4_000), force=True)
    assert more.kept >= report.kept


def test_a_size_without_room_is_refused(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no room"):
        make_delta(*pair, tmp_path / "delta.gguf", DeltaSettings(nbytes=500))
    assert not list(tmp_path.iterdir())


def test_a_delta_of_any_size_has_a_tensor(tmp_path: Path) -> None:
    """Fault: one without any was written where there was room for the header alone, and no reader took it."""
    base = wide_tensors(0)
    expert = {**base, "blk.0.attn_q.weight": base["blk.0.attn_q.weight"] + np.float32(0.01)}
    left, right = write_gguf(tmp_path / "a.gguf", base), write_gguf(tmp_path / "b.gguf", expert)
    said, delta = list[str](), tmp_path / "delta.gguf"
    for nbytes in range(250, 20_000, 250):
        try:
            make_delta(left, right, delta, DeltaSettings(nbytes=nbytes))
        except RecipeError as error:
            said.append(str(error))
        else:
            break
    assert "has no room: its header" in said[0]
    assert "nothing of the change would be stored; give a larger --size or --keep" in said[-1]
    assert read(f"{left}+{delta}").keys() == expert.keys()


@pytest.mark.parametrize("density", [1e-9, 0.013, 0.5])
def test_the_largest_elements_are_stored(density: float, pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "delta.gguf"
    make_delta(*pair, path, DeltaSettings(density=density))
    base, expert, found = read(pair[0]), read(pair[1]), read(f"{pair[0]}+{path}")
    change = expert["token_embd.weight"] - base["token_embd.weight"]
    stored = np.flatnonzero(found["token_embd.weight"] != base["token_embd.weight"])
    count = max(1, int(density * change.size))
    assert np.isin(stored, keep_largest(change, count)).all()
    assert count * 0.9 <= stored.size <= count  # a small one of a block may become 0


def test_ties_and_zeros_are_not_stored_twice(tmp_path: Path) -> None:
    base = {"token_embd.weight": np.zeros((4, 300), np.float32)}
    changed = base["token_embd.weight"].copy()
    changed.flat[::3] = 0.5  # 400 ties, 800 zeros
    paths = [
        write_gguf(tmp_path / f"{name}.gguf", {"token_embd.weight": x})
        for name, x in (("base", base["token_embd.weight"]), ("expert", changed))
    ]
    for density, count in ((0.01, 12), (1.0, 400)):
        delta = tmp_path / "delta.gguf"
        make_delta(paths[0], paths[1], delta, DeltaSettings(density=density), force=True)
        found = read(f"{paths[0]}+{delta}")["token_embd.weight"]
        assert np.flatnonzero(found).tolist() == [3 * i for i in range(count)]


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral"])
@pytest.mark.parametrize(
    "asked", [DeltaSettings(bits=8), DeltaSettings(rank=1000), DeltaSettings(density=1.0)]
)
def test_enough_gives_the_expert_back(name: str, asked: DeltaSettings, tmp_path: Path) -> None:
    base, expert = ARCHITECTURES / name, tune(name, tmp_path / "expert")
    delta = tmp_path / "delta.gguf"
    report = make_delta(base, expert, delta, asked)
    assert report.kept > 0.9999
    wanted, found = read(expert), read(f"{base}+{delta}")
    for tensor, x in wanted.items():
        atol = 1e-6 if x.ndim == 1 else 2e-3
        assert np.allclose(found[tensor], x, rtol=0, atol=atol), tensor


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (DeltaSettings(rank=999), "--rank 999"),
        (DeltaSettings(rank=1), None),
        (DeltaSettings(density=0.9), "--sparse 0.9"),
        (DeltaSettings(density=0.1), None),
        (DeltaSettings(bits=8), None),
    ],
)
def test_what_takes_more_than_the_whole_change_is_told(
    asked: DeltaSettings, named: str | None, pair: Pair, tmp_path: Path
) -> None:
    report = make_delta(*pair, tmp_path / "delta.gguf", asked)
    if named is None:
        assert report.notes == ()
        return
    (note,) = report.notes
    option = named.split()[0]
    assert note.startswith(f"{named} takes ")
    assert note.endswith(f" with --bits 8; give that, or a smaller {option}")


def test_a_tensor_that_did_not_change_is_not_stored(tmp_path: Path) -> None:
    base = wide_tensors(0)
    changed = {**base, "blk.0.attn_q.weight": wide_tensors(1, base)["blk.0.attn_q.weight"]}
    left, right = write_gguf(tmp_path / "a.gguf", base), write_gguf(tmp_path / "b.gguf", changed)
    report = make_delta(left, right, tmp_path / "delta.gguf", DeltaSettings(bits=4))
    assert (report.unchanged, [kind.kind for kind in report.kinds]) == (len(base) - 1, ["attn_q"])
    with closing(GgufModel(tmp_path / "delta.gguf")) as delta:
        assert list(delta.specs()) == ["blk.0.attn_q.weight"]
    with pytest.raises(MismatchError, match="there is no delta"):
        make_delta(left, left, tmp_path / "none.gguf", DeltaSettings(bits=4))


@pytest.mark.parametrize("asked", [DeltaSettings(rank=2), DeltaSettings(bits=1)])
def test_only_vectors_may_have_changed(asked: DeltaSettings, tmp_path: Path) -> None:
    base = wide_tensors(0)
    norm = "blk.0.attn_norm.weight"
    left = write_gguf(tmp_path / "a.gguf", base)
    right = write_gguf(tmp_path / "b.gguf", {**base, norm: base[norm] + np.float32(1)})
    make_delta(left, right, tmp_path / "delta.gguf", asked)
    with closing(GgufModel(tmp_path / "delta.gguf")) as delta:
        assert list(delta.specs()) == [norm]
    found = read(f"{left}+{tmp_path / 'delta.gguf'}")
    assert np.array_equal(found[norm], base[norm] + np.float32(1))


def test_an_expert_that_changes_between_passes_is_told(tmp_path: Path) -> None:
    """Fault: a traceback, as the last pass found another number of large elements."""
    base = wide_tensors(0)
    left = write_gguf(tmp_path / "a.gguf", base)
    right = write_gguf(tmp_path / "b.gguf", wide_tensors(1, base))

    def change(done: int, total: int) -> None:
        if done >= 0.8 * total:  # all is chosen, and nothing written
            half = right.stat().st_size // 2
            with right.open("r+b") as file:
                file.seek(half)
                file.write(bytes(half))

    with pytest.raises(FormatError, match=r"b\.gguf: .*a\.gguf was changed while it was read; let"):
        make_delta(left, right, tmp_path / "x.gguf", DeltaSettings(density=0.1), progress=change)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


def test_constants_that_are_not_the_same_are_told(tmp_path: Path) -> None:
    """The scaling of a rope can lie in them alone, and BASE+DELTA has the base's."""
    base, freqs = wide_tensors(0), np.ones(4, np.float32)
    paths = {
        name: write_gguf(tmp_path / f"{name}.gguf", {**found, "rope_freqs.weight": values})
        for name, found, values in (
            ("base", base, freqs),
            ("long", wide_tensors(1, base), 8 * freqs),
            ("near", wide_tensors(1, base), freqs * np.float32(1.000001)),
        )
    }
    notes = {
        name: make_delta(
            paths["base"], paths[name], tmp_path / "d", DeltaSettings(bits=1), force=True
        )
        for name in ("long", "near")
    }
    assert notes["near"].notes == ()
    assert notes["long"].notes == (
        "rope_freqs.weight is not the same in base.gguf and long.gguf; as a constant it is neither merged "
        "nor part of a delta or an adapter, and stays as it is in the base, or in the first model where "
        "there is no base",
    )


@pytest.mark.parametrize("owner", ["base", "expert"])
def test_one_may_have_a_head_of_its_own(owner: str, tmp_path: Path) -> None:
    base = wide_tensors(0)
    tensors = {"base": base, "expert": wide_tensors(1, base)}
    paths = {}
    for name, found in tensors.items():
        if name != owner:
            del found["output.weight"]
        paths[name] = write_gguf(tmp_path / f"{name}.gguf", found)
    delta = tmp_path / "delta.gguf"
    report = make_delta(paths["base"], paths["expert"], delta, DeltaSettings(bits=8))
    found = read(f"{paths['base']}+{delta}")
    expert = read(paths["expert"])
    head = expert.get("output.weight", expert["token_embd.weight"])
    assert np.abs(found["output.weight"] - head).max() < 0.1
    assert report.kept > 0.999
    check_inputs(delta, list(paths.values()))


def test_a_delta_of_a_model_that_changes_replaces_nothing(tmp_path: Path) -> None:
    """Fault: the new file was in place when that was found."""
    base = wide_tensors(0)
    left = write_gguf(tmp_path / "base.gguf", base)
    right = write_gguf(tmp_path / "expert.gguf", wide_tensors(1, base))
    output = tmp_path / "delta.gguf"
    output.write_bytes(b"precious")

    def change_at_the_end(done: int, total: int) -> None:
        if done == total:
            os.utime(right)

    for path in (output, tmp_path / "new.gguf"):
        with pytest.raises(FormatError, match="was changed while it was read"):
            make_delta(
                left, right, path, DeltaSettings(bits=2), force=True, progress=change_at_the_end
            )
    assert output.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["base.gguf", "delta.gguf", "expert.gguf"]


def test_an_output_is_guarded(pair: Pair, tmp_path: Path) -> None:
    for path in (pair[1], tmp_path / "missing" / "delta.gguf"):
        with pytest.raises(OutputError):
            make_delta(*pair, path, DeltaSettings(bits=1), force=True)
    with pytest.raises(BudgetError, match="too small for a delta"):
        make_delta(*pair, tmp_path / "delta.gguf", DeltaSettings(bits=1), memory=8 * MIB)
    assert not list(tmp_path.iterdir())

"""Pictures of alignments: the right colours and marks in the right places, at any size."""

from __future__ import annotations

import builtins
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from numpy.typing import NDArray

from edgemerge.alignment.records import HeadPlan, LayerHeads, Skipped
from edgemerge.errors import OutputError, RuntimeFailure
from edgemerge.reports.plots import (
    LEFT,
    MARK,
    OUTLINED,
    choose_columns,
    choose_panel,
    draw_alignment,
    drawing_bytes,
)

Pixels = NDArray[np.float32]
VERMILION = np.array([int(MARK[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def make_plan(
    heads: list[int], n_groups: int, layer: int = 0, *, guarded: bool = False
) -> HeadPlan:
    """Heads that are equal where they match, half alike inside a group, else unrelated."""
    n = len(heads)
    r = n // n_groups
    groups = tuple(heads[g * r] // r for g in range(n_groups))
    distances = np.ones((n, n), np.float32)
    for row, head in enumerate(heads):
        distances[row, head // r * r : head // r * r + r] = 0.5
        distances[row, head] = 0.0
    return HeadPlan(
        geometry=LayerHeads(layer, n, n_groups, 8, 8, {}),
        reference_layer=layer,
        kv_groups=groups,
        heads=tuple(heads),
        identity_cost=0.98,
        cost=0.03,
        gap=0.0,
        confidence=1.0,
        iterations=10,
        converged=True,
        exact=False,
        guarded=guarded,
        soft_groups=(),
        soft_heads=(),
        distances=distances,
    )


def draw(plans: list[HeadPlan | Skipped], path: Path, **names: str) -> Pixels:
    given = {"reference": "base", "model": "expert", "verdict": "heads moved", **names}
    draw_alignment(plans, path, **given)
    image: Pixels = imread(path)[..., :3]
    return image


def panel_of(image: Pixels, n_heads: int, rows: int = 1) -> Pixels:
    """Cut the first panel out: below the title, its corner is where its frame begins."""
    size = choose_panel(1, n_heads)
    column = image[:, LEFT + size // 2].mean(axis=-1)
    below = image.shape[0] - 92 - size
    assert column[below - 40 : below - 5].min() > 0.9  # nothing but paper above the panel
    return image[below : below + size, LEFT : LEFT + size]


@pytest.mark.parametrize(
    ("heads", "n_groups"),
    [([3, 2, 6, 7, 1, 0, 5, 4], 4), ([2, 0, 3, 1], 4), ([1, 0, 2], 1), ([0], 1)],
)
def test_every_head_has_its_colour_and_its_match_a_mark(
    tmp_path: Path, heads: list[int], n_groups: int
) -> None:
    n = len(heads)
    plan = make_plan(heads, n_groups)
    panel = panel_of(draw([plan], tmp_path / "x.png"), n)
    cell = len(panel) // n
    assert cell >= OUTLINED
    for i in range(n):
        for j in range(n):
            tile = panel[i * cell : (i + 1) * cell, j * cell : (j + 1) * cell]
            light = tile[cell // 2, cell // 2].mean()
            marked = bool((np.abs(tile - VERMILION).max(axis=-1) < 0.02).any())
            assert marked == (heads[i] == j)
            assert light == pytest.approx(
                {0.0: 0.14, 0.5: 0.64, 1.0: 0.96}[plan.distances[i, j]], abs=0.08
            )


def test_small_heads_are_marked_too(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(64).tolist()
    panel = panel_of(draw([make_plan(order, 64)], tmp_path / "x.png"), 64)
    cell = len(panel) // 64
    assert cell < OUTLINED
    centres = panel[cell // 2 :: cell, cell // 2 :: cell]
    found = np.abs(centres - VERMILION).max(axis=-1) < 0.02
    assert np.array_equal(found, np.eye(64, dtype=bool)[order])


def test_groups_have_borders(tmp_path: Path) -> None:
    heads = list(range(8))
    grouped, alone = (
        panel_of(draw([make_plan(heads, n)], tmp_path / f"{n}.png"), 8) for n in (2, 8)
    )
    cell = len(grouped) // 8
    away = slice(6 * cell + 5, 7 * cell - 5)  # rows where the first groups are unrelated
    edge = slice(4 * cell - 2, 4 * cell + 2)
    assert grouped[away, edge].min() < 0.7
    assert alone[away, edge].min() > 0.9


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 12, 16, 22, 24, 30, 32, 40, 48, 61, 80, 126, 1000])
def test_the_grid_is_wide_and_nearly_full(n: int) -> None:
    columns = choose_columns(n)
    rows = -(-n // columns)
    assert rows * columns - n <= max(2, 0.1 * n)
    assert n <= 4 or 1.0 <= columns / rows <= 3.0
    for n_heads in (1, 8, 9, 32, 40, 64, 128):
        assert choose_panel(columns, n_heads) % n_heads == 0
        assert columns * choose_panel(columns, n_heads) <= max(4200, columns * n_heads)


def test_skipped_layers_and_uneven_heads_have_panels(tmp_path: Path) -> None:
    plans: list[HeadPlan | Skipped] = [
        make_plan([1, 0, 3, 2], 2),
        Skipped(1, "the layer mixes tokens by a recurrence or convolution " * 4),
        make_plan(list(range(6)), 1, 2, guarded=True),
    ]
    image = draw(plans, tmp_path / "x.png")
    assert image.shape[1] > 2 * image.shape[0]
    draw([Skipped(0, "no heads")], tmp_path / "none.png")


def test_names_are_only_text(tmp_path: Path) -> None:
    for name in ("$x^", "a\nb\x1b[31m", "größe-模型", "x" * 300, r"\frac{}"):
        draw([make_plan([0, 1], 2)], tmp_path / "x.png", model=name, reference=name)
        draw([Skipped(0, name)], tmp_path / "x.png", verdict=name)


def test_the_same_plans_give_the_same_bytes_whatever_the_users_style(tmp_path: Path) -> None:
    import matplotlib as mpl

    plans: list[HeadPlan | Skipped] = [make_plan([1, 0], 2), make_plan([0, 1], 2, 1)]
    draw(plans, tmp_path / "a.png")
    with mpl.rc_context({"figure.dpi": 37, "font.size": 30, "image.cmap": "jet"}):
        draw(plans, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_folder_that_refuses_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        draw([make_plan([0], 1)], tmp_path / "no" / "x.png")
    draw([make_plan([0], 1)], tmp_path / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_without_matplotlib_one_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *arguments: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real_import(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(RuntimeFailure) as caught:
        draw_alignment([], tmp_path / "x.png", reference="a", model="b", verdict="")
    assert str(caught.value) == (
        "drawing needs matplotlib: install it with pip install 'edgemerge[plot]'"
    )


PROGRAM = """
import pickle
from pathlib import Path
from edgemerge.reports.plots import draw_alignment
from edgemerge.output.report import peak_rss_bytes
plans = pickle.loads(Path("plans").read_bytes())
before = peak_rss_bytes()
draw_alignment(plans, Path("x.png"), reference="a", model="b", verdict="c")
print(peak_rss_bytes() - before)
"""


@pytest.mark.parametrize(
    ("n_layers", "n_heads", "n_groups"), [(1, 8, 4), (32, 32, 8), (126, 128, 8)]
)
def test_memory_stays_under_the_bound(
    tmp_path: Path, n_layers: int, n_heads: int, n_groups: int
) -> None:
    plans = [make_plan(list(range(n_heads)), n_groups, i) for i in range(n_layers)]
    (tmp_path / "plans").write_bytes(pickle.dumps(plans))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert 0 < int(done.stdout) <= drawing_bytes(n_layers)

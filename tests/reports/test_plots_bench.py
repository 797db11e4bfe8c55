"""The picture of `bench --plot`: points where they belong, labels that cover nothing."""

from __future__ import annotations

import builtins
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from edgemerge.errors import OutputError, RuntimeFailure
from edgemerge.reports.plots_bench import (
    FORMATS,
    POINT,
    RADIUS,
    SHADES,
    BenchPoint,
    Box,
    draw_bench,
    place_labels,
)

MIB = 1 << 20
FRAME = (100.0, 100.0, 1300.0, 860.0)


def overlap(a: Box, b: Box) -> bool:
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [(1200, 760), (120, 90)])
def test_labels_cover_no_point_and_no_label(seed: int, spread: tuple[int, int]) -> None:
    draw = random.Random(seed)
    centres = [
        (650 + spread[0] * (draw.random() - 0.5), 480 + spread[1] * (draw.random() - 0.5))
        for _ in range(14)
    ]
    sizes = [(draw.uniform(60, 220), 18.0) for _ in centres]
    boxes = place_labels(centres, sizes, FRAME)
    for box, (width, height) in zip(boxes, sizes, strict=True):
        assert (box[2] - box[0], box[3] - box[1]) == pytest.approx((width, height))
        assert FRAME[0] <= box[0] < box[2] <= FRAME[2]
        assert FRAME[1] <= box[1] < box[3] <= FRAME[3]
    dots = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in centres]
    assert not any(overlap(a, b) for a, b in itertools.combinations(boxes, 2))
    assert not any(
        overlap(dot, box) for i, dot in enumerate(dots) for j, box in enumerate(boxes) if i != j
    )


def test_a_label_alone_stands_right_of_its_point() -> None:
    ((left, low, _, high),) = place_labels([(600.0, 400.0)], [(80.0, 20.0)], FRAME)
    assert left > 600.0 + RADIUS
    assert (low + high) / 2 == pytest.approx(400.0)


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def centre_of(image: np.ndarray, colour: str) -> tuple[float, float]:
    """Column and row of the pixels of a colour, left of the scale."""
    rows, columns = np.nonzero(np.abs(image[:, :1270, :3] - rgb(colour)).max(axis=-1) < 0.02)
    assert len(rows) > 100
    return float(columns.mean()), float(rows.mean())


def test_a_point_stands_for_speed_memory_and_accuracy(tmp_path: Path) -> None:
    points = [
        BenchPoint("slow", 20.0, 400 * MIB, 0.25),
        BenchPoint("fast", 80.0, 200 * MIB, 0.75),
    ]
    draw_bench(points, tmp_path / "x.png", quality="medqa")
    image = imread(tmp_path / "x.png")
    slow, fast = centre_of(image, SHADES[0]), centre_of(image, SHADES[-1])
    assert fast[0] > slow[0] + 300  # faster is to the right
    assert fast[1] > slow[1] + 200  # less memory is lower


def test_without_questions_there_is_one_colour(tmp_path: Path) -> None:
    draw_bench([BenchPoint("x", 20.0, 400 * MIB, None)], tmp_path / "x.png", quality="")
    centre_of(imread(tmp_path / "x.png"), POINT)


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_same_points_give_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    points = [
        BenchPoint("größe-模型 $x^ a\nb\x1b[31m", 172.0, 172 * MIB, 0.5),
        BenchPoint("x" * 300, 2.0, 4800 * MIB, 0.5),  # so far off that the axes are logarithmic
    ]
    for name in ("a", "b"):
        draw_bench(points, tmp_path / f"{name}{suffix}", quality="$q")
    first = (tmp_path / f"a{suffix}").read_bytes()
    assert first == (tmp_path / f"b{suffix}").read_bytes()
    assert first.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])


def test_a_folder_that_refuses_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        draw_bench([BenchPoint("x", 1.0, MIB, None)], tmp_path / "no" / "x.png", quality="")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_one_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *arguments: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real_import(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(RuntimeFailure, match="drawing needs matplotlib"):
        draw_bench([BenchPoint("x", 1.0, MIB, None)], tmp_path / "x.png", quality="")

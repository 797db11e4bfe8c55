"""The heat map of a comparison: tensors from top to bottom, layers from left to right."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgemerge.merging.comparison import Comparison
from edgemerge.merging.figures import TensorFigures
from edgemerge.plain_text import plain
from edgemerge.reports.plots import (
    BORDER,
    DPI,
    EMPTY,
    INK,
    NOTE,
    PAPER,
    SHADES,
    SOFT,
    TITLE,
    save_figure,
    wrap,
)
from edgemerge.types import Float64

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = ["DRAWING_BYTES", "draw_comparison"]

LAYER = re.compile(r"blk\.(\d+)\.(.+)")
DRAWING_BYTES = 160 << 20  # Matplotlib and the largest picture; tests/reports/test_plots_compare.py
COLUMN, ACROSS = 14, (900, 1800)  # pixels of a column, where all together are within these
ROW, DOWN = (14, 30), 900  # pixels of a row, least and most; of all rows, but for the least
LEFT, RIGHT, TOP, BETWEEN, BOTTOM = 330, 190, 60, 92, 70  # pixels
LABELS = 32  # layers that all have their number
# From B is quieter to B is louder: blue, paper, orange, apart for every kind of eye.
SIDES = ("#13497b", "#8fb9d6", "#f6f7f5", "#f0b27a", "#b34700")


def draw_comparison(found: Comparison, path: Path) -> None:
    """Draw the cosine and the ratio of norms of every tensor, a column per layer.

    Parameters
    ----------
    found : Comparison
        From `edgemerge.merging.comparison.compare`.
    path : Path
        The PNG to make; replaced if it exists, and only by a whole one.

    Raises
    ------
    RuntimeFailure
        Matplotlib is not installed.
    OutputError
        The file cannot be written.
    """
    save_figure(lambda: _figure(found), path, "png")


def _figure(found: Comparison) -> Figure:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    kinds, layers, cosines, ratios = _arrange(found.tensors)
    n_columns = 1 + len(layers)
    across = min(ACROSS[1], max(ACROSS[0], n_columns * COLUMN))
    down = len(kinds) * min(ROW[1], max(ROW[0], DOWN // len(kinds)))
    width = LEFT + across + RIGHT
    title = wrap(found.verdicts[0].sentence, width - 80, TITLE)
    top = 36 + TITLE[1] * len(title) + TOP
    height = top + 2 * down + BETWEEN + BOTTOM
    figure = Figure((width / DPI, height / DPI), dpi=DPI, facecolor=PAPER)
    figure.text(
        40 / width,
        1 - 36 / height,
        "\n".join(title),
        size=TITLE[0],
        color=INK,
        weight="bold",
        va="top",
        linespacing=1.35,
        parse_math=False,
    )
    alike = LinearSegmentedColormap.from_list("alike", SHADES[::-1])
    sides = LinearSegmentedColormap.from_list("sides", SIDES)
    of = "the changes of A and B" if len(found.names) > 2 else "A and B"
    panels = (
        (f"cosine of {of}", cosines, alike, (0.0, 1.0), ["0", ".25", ".5", ".75", "1"]),
        (f"norm of {of}: B over A", ratios, sides, (-2.0, 2.0), ["0.01", "0.1", "1", "10", "100"]),
    )
    for i, (heading, values, shades, limits, ticks) in enumerate(panels):
        y = top + i * (down + BETWEEN)
        box = (LEFT / width, 1 - (y + down) / height, across / width, down / height)
        axes = figure.add_axes(box)
        _draw_map(axes, values, kinds, layers, shades, limits)
        axes.set_title(heading, loc="left", size=9, color=INK, pad=6, weight="bold")
        beside = ((LEFT + across + 40) / width, box[1], 24 / width, box[3])
        _draw_scale(figure.add_axes(beside), shades, limits, ticks)
    names = zip(("A", "B", "base"), found.names, strict=False)
    models = ",  ".join(f"{letter}: {name}" for letter, name in names)
    said = wrap(f"columns are layers, - is outside them;  {models}", width - 80, NOTE)[0]
    figure.text(40 / width, 16 / height, said, size=NOTE[0], color=SOFT, parse_math=False)
    return figure


def _arrange(
    tensors: Sequence[TensorFigures],
) -> tuple[list[str], list[int], Float64, Float64]:
    """Return kinds of tensors, layers, and (kinds, 1 + layers) cosines and log10 of ratios, NaN: none."""
    places: dict[tuple[str, int | None], TensorFigures] = {}
    for one in tensors:
        matched = LAYER.fullmatch(one.name)
        key = (matched[2], int(matched[1])) if matched else (one.name, None)
        places[key] = one
    kinds = list(dict.fromkeys(kind for kind, _ in places))
    layers = sorted({layer for _, layer in places if layer is not None})
    columns = {None: 0} | {layer: i + 1 for i, layer in enumerate(layers)}
    cosines, ratios = np.full((2, len(kinds), len(columns)), np.nan)
    for (kind, layer), one in places.items():
        place = kinds.index(kind), columns[layer]
        if one.cosine is not None:
            cosines[place] = one.cosine
        if one.norm_ratio:
            ratios[place] = math.log10(one.norm_ratio)
    return kinds, layers, cosines, ratios


def _draw_map(
    axes: Axes,
    values: Float64,
    kinds: Sequence[str],
    layers: Sequence[int],
    shades: Colormap,
    limits: tuple[float, float],
) -> None:
    axes.set_facecolor(EMPTY)
    least, most = limits
    axes.imshow(values, cmap=shades, vmin=least, vmax=most, interpolation="nearest", aspect="auto")
    axes.axvline(0.5, color=BORDER, linewidth=0.6)
    step = -(-len(layers) // LABELS) or 1
    shown = range(0, len(layers), step)
    axes.set_xticks([0, *(i + 1 for i in shown)], ["-", *(str(layers[i]) for i in shown)])
    names = [plain(kind)[:32] for kind in kinds]
    axes.set_yticks(range(len(kinds)), names, parse_math=False)
    axes.tick_params(labelsize=6.5, labelcolor=SOFT, color=BORDER, length=2, pad=2, width=0.6)
    axes.spines[:].set(color=BORDER, linewidth=0.6)


def _draw_scale(
    axes: Axes, shades: Colormap, limits: tuple[float, float], ticks: Sequence[str]
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(norm=Normalize(*limits), cmap=shades)
    marks = np.linspace(*limits, len(ticks)).tolist()
    bar = axes.figure.colorbar(scale, cax=axes, ticks=marks)
    bar.ax.set_yticklabels(list(ticks))
    bar.ax.tick_params(labelsize=7, labelcolor=INK, color=BORDER, length=3, width=0.6)
    bar.outline.set(edgecolor=BORDER, linewidth=0.6)

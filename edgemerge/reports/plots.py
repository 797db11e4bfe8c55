"""Pictures, as PNG. Matplotlib is an extra, and is imported only when a picture is wanted.

Everything is laid out in whole pixels, so that a head is a square of the same size in every panel.
"""

from __future__ import annotations

import io
import logging
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgemerge.alignment.records import HeadPlan, Skipped
from edgemerge.errors import RuntimeFailure
from edgemerge.output.file import write_file
from edgemerge.plain_text import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = ["check_matplotlib", "draw_alignment", "drawing_bytes", "save_figure", "wrap"]

MATPLOTLIB_BYTES = 64 << 20  # imported, with its fonts; tests/reports/test_plots.py measures both
PANEL_BYTES = 3 << 19

DPI = 150
ROW = 1800  # pixels that the panels of one row share
PANEL = (190, 288)  # least and most pixels of a panel
ALONE = 576  # pixels of the panel of a single layer
MAX_ROW = 4200  # pixels of panels in a row, where heads would get two pixels and more
MAX_PIXELS = 16_000_000  # of the whole picture; a larger one is shrunk
OUTLINED = 12  # least pixels of a head whose mark leaves its middle free
LABELS = 16  # most heads in a panel that all have their number beside them
LEFT, RIGHT, BOTTOM = 110, 200, 92
GAPS = (48, 62)  # between columns; between rows, for the titles of the panels
TITLE = (12.0, 34, 20.5)  # of text: points, height of a line and width of a letter in pixels
NOTE = (8.5, 24, 9.8)
REASON = (7.0, 20, 8.5)
SMALLEST = 900  # width of the picture, for the sake of its title

INK, SOFT, PAPER, EMPTY = "#1d2a36", "#66737e", "#ffffff", "#eef0f1"
MARK = "#d55e00"  # vermilion of Okabe and Ito's palette: apart from blue for every kind of eye
BORDER, FAINT = "#7b8894", "#b4bec6"
# From alike to unrelated in one hue; lightness rises evenly, so that it also reads in grey.
SHADES = ("#08233f", "#13497b", "#3d7cb0", "#8fb9d6", "#d3e3ec", "#f6f7f5")

METADATA = {  # of the file; without a date, the same figure gives the same bytes
    "png": {"Software": "edgemerge"},
    "svg": {"Creator": "edgemerge", "Date": None},
    "pdf": {"Creator": "edgemerge", "CreationDate": None},
}


def check_matplotlib() -> None:
    """Make sure that pictures can be drawn.

    Raises
    ------
    RuntimeFailure
        Matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise RuntimeFailure(
            "drawing needs matplotlib: install it with pip install 'edgemerge[plot]'"
        ) from None


def drawing_bytes(n_layers: int) -> int:
    """Bound the memory that `draw_alignment` takes for so many layers, Matplotlib included."""
    return MATPLOTLIB_BYTES + n_layers * PANEL_BYTES


def draw_alignment(
    plans: Sequence[HeadPlan | Skipped], path: Path, *, reference: str, model: str, verdict: str
) -> None:
    """Draw the distances between all heads of two models, a panel per layer, with the matching.

    Parameters
    ----------
    plans : sequence of HeadPlan or Skipped
        From `edgemerge.alignment.heads.align_models`; at least one.
    path : Path
        The PNG to make; replaced if it exists, and only by a whole one.
    reference, model : str
        Names of the two models.
    verdict : str
        What the picture shows, in a few words.

    Raises
    ------
    RuntimeFailure
        Matplotlib is not installed.
    OutputError
        The file cannot be written.
    """
    save_figure(lambda: _alignment_figure(plans, reference, model, verdict), path, "png")


def save_figure(draw: Callable[[], Figure], path: Path, kind: str) -> None:
    """Draw a figure in Matplotlib's default style, whatever the user's, and write it.

    Parameters
    ----------
    draw : callable
        Makes the figure; it is shrunk where it has more than 16 million pixels.
    path : Path
        The picture to make; replaced if it exists, and only by a whole one.
    kind : str
        png, svg or pdf.

    Raises
    ------
    RuntimeFailure
        Matplotlib is not installed.
    OutputError
        The file cannot be written.
    """
    check_matplotlib()
    import matplotlib as mpl
    import matplotlib.style

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # no word about its cache of fonts
    with matplotlib.style.context("default"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name may have letters that the font lacks
        mpl.rcParams["svg.hashsalt"] = "edgemerge"  # else its ids differ from run to run
        figure = draw()
        buffer = io.BytesIO()
        pixels = math.prod(figure.get_size_inches() * DPI)
        dpi = DPI * min(1.0, math.sqrt(MAX_PIXELS / pixels))
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=METADATA[kind])
    write_file(path, buffer.getvalue())


# -- layout ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Grid:
    """Where the panels are, in pixels from the top left."""

    n: int
    columns: int
    panel: int
    top: int

    @property
    def rows(self) -> int:
        return -(-self.n // self.columns)

    @property
    def width(self) -> int:
        return LEFT + self.columns * (self.panel + GAPS[0]) - GAPS[0] + RIGHT

    @property
    def height(self) -> int:
        return self.top + self.rows * (self.panel + GAPS[1]) - GAPS[1] + BOTTOM

    def place(self, i: int) -> tuple[int, int]:
        row, column = divmod(i, self.columns)
        return LEFT + column * (self.panel + GAPS[0]), self.top + row * (self.panel + GAPS[1])

    def is_left(self, i: int) -> bool:
        return i % self.columns == 0

    def is_lowest(self, i: int) -> bool:
        return i + self.columns >= self.n


def choose_columns(n: int) -> int:
    """Choose how many panels stand in a row: a wide picture with few empty places."""
    if n <= 4:
        return n
    candidates = range(math.isqrt(n - 1) + 1, math.isqrt(3 * n) + 1)

    def loss(columns: int) -> float:
        rows = -(-n // columns)
        return 2 * (rows * columns - n) / n + abs(math.log(columns / rows / 1.7))

    return min(candidates, key=loss, default=n)


def choose_panel(columns: int, n_heads: int) -> int:
    """Choose the pixels of a panel: a whole number per head."""
    least, most = PANEL
    wanted = ALONE if columns == 1 else min(most, max(least, ROW // columns))
    per_head = max(2, round(wanted / n_heads))
    return n_heads * max(1, min(per_head, MAX_ROW // columns // n_heads))


# -- the picture --------------------------------------------------------------------------------------


def _alignment_figure(
    plans: Sequence[HeadPlan | Skipped], reference: str, model: str, verdict: str
) -> Figure:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    aligned = [plan for plan in plans if isinstance(plan, HeadPlan)]
    columns = choose_columns(len(plans))
    panel = choose_panel(columns, max((len(plan.heads) for plan in aligned), default=8))
    width = max(SMALLEST, _Grid(len(plans), columns, panel, 0).width)
    title = wrap(f"{model} beside {reference}: {verdict}", width - 80, TITLE)
    how = wrap(
        f"Distance of the weights of every head of {reference} (rows) and of {model} (columns): "
        "dark is alike. Squares mark the matching that is used; numbers are its mean distance, "
        "where heads are reordered with that of leaving them in place before it.",
        width - 80,
        NOTE,
    )
    title_end = 36 + TITLE[1] * len(title)
    grid = _Grid(len(plans), columns, panel, title_end + 10 + NOTE[1] * len(how) + 58)
    figure = Figure((width / DPI, grid.height / DPI), dpi=DPI, facecolor=PAPER)
    _write(figure, 40, 36, "\n".join(title), size=TITLE[0], color=INK, weight="bold")
    _write(figure, 40, title_end + 10, "\n".join(how), size=NOTE[0], color=SOFT)
    shades = LinearSegmentedColormap.from_list("alike", SHADES)
    numbered = len({len(plan.heads) for plan in aligned}) > 1  # then every panel for itself
    for i, plan in enumerate(plans):
        x, y = grid.place(i)
        axes = figure.add_axes(_box(figure, x, y, panel, panel))
        if isinstance(plan, Skipped):
            _draw_skipped(axes, plan, panel)
        else:
            _draw_layer(axes, plan, shades, panel)
        own = numbered or isinstance(plan, Skipped)
        axes.tick_params(labelleft=own or grid.is_left(i), labelbottom=own or grid.is_lowest(i))
    middle = LEFT + (min(columns, len(plans)) * (panel + GAPS[0]) - GAPS[0]) / 2
    _write(figure, middle, grid.height - 46, f"head of {model}", size=9, color=INK, ha="center")
    _write(
        figure,
        30,
        (grid.top + grid.height - BOTTOM) / 2,
        f"head of {reference}",
        size=9,
        color=INK,
        va="center",
        rotation=90,
    )
    if aligned:
        _draw_scale(figure, grid, shades)
    return figure


def _draw_layer(axes: Axes, plan: HeadPlan, shades: Colormap, panel: int) -> None:
    from matplotlib.collections import PolyCollection

    n, groups = len(plan.heads), len(plan.kv_groups)
    cell = panel / n
    axes.imshow(plan.distances, cmap=shades, vmin=0.0, vmax=1.0, interpolation="nearest")
    if 1 < groups < n:
        borders = np.arange(1, groups) * (n // groups) - 0.5
        for line in (axes.axhline, axes.axvline):
            for border in borders:
                line(border, color=BORDER if cell >= OUTLINED else FAINT, linewidth=_points(1.0))
    outlined = cell >= OUTLINED
    stroke = min(4.0, cell / 11) if outlined else 0.0
    # Small squares are filled, with a rim of the cell's own colour.
    side = 1 - (stroke + cell / 7) / cell if outlined else max(1, cell - 2) / cell
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (side / 2)
    centres = np.stack([np.array(plan.heads), np.arange(n)], axis=1)
    marks = PolyCollection(
        list(centres[:, None] + corners),
        edgecolors=MARK if outlined else "none",
        facecolors="none" if outlined else MARK,
        linewidths=_points(stroke),
    )
    axes.add_collection(marks)
    step = 1 if n <= LABELS else n // groups if 1 < groups < n and n // groups >= 8 else n // 4
    axes.set_xticks(range(0, n, step))
    axes.set_yticks(range(0, n, step))
    axes.tick_params(labelsize=6.5, labelcolor=SOFT, color=BORDER, length=2, pad=2, width=0.6)
    axes.spines[:].set(color=BORDER, linewidth=0.6)
    said = f"{plan.identity_cost:.2f}"
    if not plan.is_identity:
        said += f" → {plan.cost:.2f}"
    elif plan.guarded:
        said = f"kept, {said}"
    _entitle(axes, f"layer {plan.layer}", said, MARK if not plan.is_identity else SOFT)


def _draw_skipped(axes: Axes, skipped: Skipped, panel: int) -> None:
    axes.set_facecolor(EMPTY)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=BORDER, linewidth=0.6, linestyle=(0, (4, 3)))
    reason = "\n".join(wrap(skipped.reason, panel - 16, REASON))
    axes.text(
        0.5,
        0.5,
        reason,
        transform=axes.transAxes,
        ha="center",
        va="center",
        size=REASON[0],
        color=SOFT,
        parse_math=False,
        clip_on=True,
    )
    _entitle(axes, f"layer {skipped.layer}", "skipped", SOFT)


def _entitle(axes: Axes, left: str, right: str, color: str) -> None:
    axes.set_title(left, loc="left", size=8, color=INK, pad=4, weight="bold")
    axes.set_title(right, loc="right", size=7, color=color, pad=4)


def _draw_scale(figure: Figure, grid: _Grid, shades: Colormap) -> None:
    from matplotlib.cm import ScalarMappable

    x = grid.place(grid.columns - 1)[0] + grid.panel + 40
    height = min(grid.height - BOTTOM - grid.top, 480)
    axes = figure.add_axes(_box(figure, x, grid.top, 24, height))
    bar = figure.colorbar(ScalarMappable(cmap=shades), cax=axes, ticks=[0.0, 0.25, 0.5, 0.75, 1.0])
    bar.ax.set_yticklabels(["0  equal", ".25", ".5", ".75", "1  unrelated"])
    bar.ax.invert_yaxis()
    bar.ax.tick_params(labelsize=7, labelcolor=INK, color=BORDER, length=3, width=0.6)
    bar.outline.set(edgecolor=BORDER, linewidth=0.6)


# -- parts -------------------------------------------------------------------------------------------


def _box(
    figure: Figure, x: float, y: float, width: float, height: float
) -> tuple[float, float, float, float]:
    """Turn pixels from the top left into Matplotlib's shares from the bottom left."""
    whole_x, whole_y = figure.get_size_inches() * DPI
    return x / whole_x, 1 - (y + height) / whole_y, width / whole_x, height / whole_y


def _write(
    figure: Figure,
    x: float,
    y: float,
    text: str,
    *,
    size: float,
    color: str,
    weight: str = "normal",
    ha: str = "left",
    va: str = "top",
    rotation: float = 0,
) -> None:
    left, bottom, _, _ = _box(figure, x, y, 0, 0)
    figure.text(
        left,
        bottom,
        text,
        size=size,
        color=color,
        weight=weight,
        ha=ha,
        va=va,
        rotation=rotation,
        linespacing=1.35,
        parse_math=False,  # a dollar in a name is a dollar
    )


def wrap(text: str, pixels: float, style: tuple[float, int, float]) -> list[str]:
    """Break text into lines that are hardly wider than so many pixels."""
    return textwrap.wrap(plain(text), max(8, int(pixels / style[2])), break_on_hyphens=False)


def _points(pixels: float) -> float:
    return pixels * 72 / DPI

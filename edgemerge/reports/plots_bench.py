"""The picture of `edgemerge bench --plot`: memory against speed, with accuracy as colour."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemerge.plain_text import plain
from edgemerge.reports.plots import BORDER, DPI, INK, PAPER, SOFT, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FORMATS", "BenchPoint", "draw_bench", "place_labels"]

FORMATS = (".png", ".svg", ".pdf")

SIZE = (1500, 1000)  # pixels
AXES = (0.085, 0.115, 0.80, 0.74)  # left, bottom, width, height as shares
POINT = "#3d7cb0"
# Of accuracy, from low to high: one hue, lightness falls evenly; the lightest still shows on paper.
SHADES = ("#b7d3e6", "#8fb9d6", "#3d7cb0", "#13497b", "#08233f")
RADIUS = 11  # pixels of a point
GAP = 9  # pixels between a point and its label
LONGEST = 34  # letters of a name before it is cut
WIDE = 12  # largest over smallest from which on an axis is logarithmic

Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels


@dataclass(frozen=True, slots=True)
class BenchPoint:
    """One model.

    Attributes
    ----------
    name : str
        What stands beside the point.
    rate : float
        Tokens generated per second.
    peak_bytes : int
        Most memory that the process took.
    acc : float or None
        Share of questions answered right; None where nobody asked.
    """

    name: str
    rate: float
    peak_bytes: int
    acc: float | None


def draw_bench(points: Sequence[BenchPoint], path: Path, *, quality: str) -> None:
    """Draw models as points: speed to the right, memory upwards, accuracy as colour.

    Parameters
    ----------
    points : sequence of BenchPoint
        At least one; all of them have an accuracy, or none has.
    path : Path
        The picture to make, of one of `FORMATS`; replaced if it exists, and only by a whole one.
    quality : str
        Name of the questions; empty where there were none.

    Raises
    ------
    RuntimeFailure
        Matplotlib is not installed.
    OutputError
        The file cannot be written.
    """
    save_figure(lambda: _figure(points, quality), path, path.suffix.lower().removeprefix("."))


def _figure(points: Sequence[BenchPoint], quality: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((SIZE[0] / DPI, SIZE[1] / DPI), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)  # measures the labels
    axes = figure.add_axes(AXES)
    unit, scale = ("GiB", 1 << 30) if _largest(points) >= 1 << 30 else ("MiB", 1 << 20)
    x = [point.rate for point in points]
    y = [point.peak_bytes / scale for point in points]
    _set_scale(axes, "x", x)
    _set_scale(axes, "y", y)
    axes.set_xlabel("tokens generated per second (more is better)", size=9, color=INK, labelpad=7)
    axes.set_ylabel(f"peak memory, {unit} (less is better)", size=9, color=INK, labelpad=7)
    axes.tick_params(which="both", labelsize=8, labelcolor=SOFT, color=BORDER, length=3, width=0.6)
    axes.grid(color="#e6e9eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=BORDER, linewidth=0.8)
    _draw_points(axes, points, x, y)
    _draw_labels(axes, points, x, y)
    colour = f"; colour is accuracy on {quality}" if _accuracies(points) else ""
    left, top = AXES[0], 0.955
    count = "1 model" if len(points) == 1 else f"{len(points)} models"
    title: dict[str, Any] = {"x": left, "ha": "left", "va": "top", "parse_math": False}
    figure.text(y=top, s=f"Memory and speed of {count}", size=12, weight="bold", color=INK, **title)
    what = f"Peak memory of the whole process against the speed of generation{colour}."
    figure.text(y=top - 0.048, s=what, size=8.5, color=SOFT, **title)
    return figure


def _largest(points: Sequence[BenchPoint]) -> int:
    return max(point.peak_bytes for point in points)


def _accuracies(points: Sequence[BenchPoint]) -> list[float]:
    return [point.acc for point in points if point.acc is not None]


def _set_scale(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Choose the range of an axis, with room for labels, and whether it is logarithmic."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    least, most = min(values), max(values)
    axis = getattr(axes, f"{which}axis")
    if most <= WIDE * least:
        room = max(0.3 * (most - least), 0.02 * most)
        axes.set(**{f"{which}lim": (max(0.0, least - room), most + room)})
        return
    axes.set(**{f"{which}scale": "log", f"{which}lim": (least / 1.6, most * 1.6)})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _draw_points(axes: Axes, points: Sequence[BenchPoint], x: list[float], y: list[float]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    area = (2 * RADIUS * 72 / DPI) ** 2
    looks: dict[str, Any] = {"s": area, "edgecolors": PAPER, "linewidths": 0.8, "zorder": 3}
    accuracies = _accuracies(points)
    if not accuracies:
        axes.scatter(x, y, color=POINT, **looks)
        return
    # Shades span no less than 2 points of accuracy, lest noise look like a difference.
    middle = (min(accuracies) + max(accuracies)) / 2
    half = max(0.01, (max(accuracies) - min(accuracies)) / 2)
    shades = LinearSegmentedColormap.from_list("accuracy", SHADES)
    norm = Normalize(middle - half, middle + half)
    axes.scatter(x, y, c=accuracies, cmap=shades, norm=norm, **looks)
    assert axes.figure is not None
    place = axes.get_position()
    beside = axes.figure.add_axes((place.x1 + 0.022, place.y0, 0.016, place.height))
    bar = axes.figure.colorbar(ScalarMappable(norm, shades), cax=beside)
    bar.ax.tick_params(labelsize=7.5, labelcolor=SOFT, color=BORDER, length=3, width=0.6)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.1f} %")
    bar.ax.set_title("accuracy", loc="left", size=8, color=INK, pad=11)
    bar.outline.set(edgecolor=BORDER, linewidth=0.6)


# -- labels ------------------------------------------------------------------------------------------


def _draw_labels(axes: Axes, points: Sequence[BenchPoint], x: list[float], y: list[float]) -> None:
    """Write each model's name beside its point, where nothing else stands."""
    figure: Any = axes.figure
    figure.draw_without_rendering()
    texts = [
        axes.text(
            0, 0, _label(point), size=8, color=INK, linespacing=1.3, parse_math=False, zorder=4
        )
        for point in points
    ]
    extents = [text.get_window_extent() for text in texts]
    centres = [tuple(axes.transData.transform(pair)) for pair in zip(x, y, strict=True)]
    frame = axes.get_window_extent()
    boxes = place_labels(
        centres,
        [(extent.width, extent.height) for extent in extents],
        (frame.x0, frame.y0, frame.x1, frame.y1),
    )
    back = axes.transData.inverted()
    for text, centre, box in zip(texts, centres, boxes, strict=True):
        text.set(position=back.transform(box[:2]), ha="left", va="bottom")
        near = _nearest(box, centre)
        if math.dist(near, centre) > RADIUS + 2 * GAP:
            ends = back.transform([centre, near])
            axes.plot(*ends.T, color=BORDER, linewidth=0.7, zorder=2)


def _label(point: BenchPoint) -> str:
    name = plain(point.name)
    name = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
    return name if point.acc is None else f"{name}  {100 * point.acc:.1f} %"


def place_labels(
    centres: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], frame: Box
) -> list[Box]:
    """Find a place for the label of each point: near it, on no other label and no point.

    Tries places round each point, nearest first, and takes the first that is free; where none is, the
    one that covers least. Points with the nearest neighbours choose first.

    Parameters
    ----------
    centres : sequence of (float, float)
        The points, in pixels.
    sizes : sequence of (float, float)
        Width and height of their labels, in pixels.
    frame : Box
        What the labels should stay inside.

    Returns
    -------
    list of Box
        In the order of the points.
    """
    dots = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in centres]

    def crowding(i: int) -> float:
        return min((math.dist(centres[i], c) for j, c in enumerate(centres) if j != i), default=0.0)

    placed: dict[int, Box] = {}
    lines: list[Box] = []  # as rows of small boxes
    for i in sorted(range(len(centres)), key=crowding):
        taken = [*(dot for j, dot in enumerate(dots) if j != i), *placed.values(), *lines]

        best, least = dots[i], math.inf
        for box in _candidates(centres[i], sizes[i]):
            price = sum(_overlap(box, other) for other in taken)
            price += _area(box) - _overlap(box, frame)
            if price < least:  # only then is its line worth a look
                price += _crossed(centres[i], box, taken)
            if price < least:
                best, least = box, price
            if least == 0.0:
                break
        placed[i] = best
        lines += [(x - 1, y - 1, x + 1, y + 1) for x, y in _line(centres[i], best)]
    return [placed[i] for i in range(len(centres))]


def _candidates(centre: tuple[float, float], size: tuple[float, float]) -> Iterator[Box]:
    """Places of a label round a point: to the right, left, above, below, askew; then farther out."""
    x, y = centre
    width, height = size
    for ring in range(12):
        reach = RADIUS + GAP + 24 * ring
        for degrees in (0, 180, 90, 270, 45, 315, 135, 225, 22, 338, 158, 202, 67, 293, 113, 247):
            across, up = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            left = x + reach * across + (width / 2) * (_side(across) - 1)
            low = y + reach * up + (height / 2) * (_side(up) - 1)
            yield (left, low, left + width, low + height)


def _side(share: float) -> float:
    """-1, 0 or 1: whether a label hangs on its right end, its middle or its left end."""
    return 0.0 if abs(share) < 0.3 else math.copysign(1.0, share)


def _overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _crossed(centre: tuple[float, float], box: Box, taken: Sequence[Box]) -> float:
    """How much of the line from a point to its label runs over something else, in pixels."""
    return float(
        sum(
            any(left < x < right and low < y < high for left, low, right, high in taken)
            for x, y in _line(centre, box)
        )
    )


def _line(centre: tuple[float, float], box: Box) -> list[tuple[float, float]]:
    """Pixels of the line from a point's rim to its label."""
    near = _nearest(box, centre)
    length = round(math.dist(near, centre))
    return [
        (
            centre[0] + (near[0] - centre[0]) * k / length,
            centre[1] + (near[1] - centre[1]) * k / length,
        )
        for k in range(RADIUS, length)
    ]


def _nearest(box: Box, centre: tuple[float, float]) -> tuple[float, float]:
    """Go from a point to the nearest one of a box."""
    return (
        min(max(centre[0], box[0]), box[2]),
        min(max(centre[1], box[1]), box[3]),
    )

"""How the benchmarks' figures look. Matplotlib is imported when a figure is drawn: a process that
measures others stays small, as the peak memory of a child counts from that of its parent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INK, SOFT, GRID, PAPER = "#1d2a36", "#66737e", "#e6e9eb", "#ffffff"
# of Okabe and Ito's palette: apart for every kind of eye
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#e69f00")
DPI = 150


def new_figure(size: tuple[float, float], n_rows: int, n_columns: int, **options: Any) -> Any:
    """Return a figure on white paper, so that it also reads on a dark page, and its axes in rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update(
        {
            "font.size": 9,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.edgecolor": SOFT,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": GRID,
            "xtick.color": SOFT,
            "ytick.color": SOFT,
            "figure.facecolor": PAPER,
            "savefig.facecolor": PAPER,
        }
    )
    return pyplot.subplots(
        n_rows, n_columns, figsize=size, layout="constrained", squeeze=False, **options
    )


def save(figure: Any, path: Path) -> None:
    """Write a PNG that has no date in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": "edgemerge"})


def draw_bars(
    labels: Sequence[str], panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path
) -> None:
    """Draw horizontal bars from zero, their figures beside them.

    Parameters
    ----------
    labels : sequence of str
        One per group of bars, from the top.
    panels : mapping of title -> mapping of series -> values
        One panel per title, side by side; in each a value per label and series.
    path : Path
        Of the PNG.
    """
    figure, axes = new_figure((9, 0.5 * len(labels) + 1.1), 1, len(panels), sharey=True)
    for panel, (title, series) in zip(axes[0], panels.items(), strict=True):
        height = 0.8 / len(series)
        for i, (name, values) in enumerate(series.items()):
            places = [at + (i - (len(series) - 1) / 2) * height for at in range(len(labels))]
            bars = panel.barh(places, values, 0.9 * height, color=COLOURS[i], label=name)
            texts = [f"{value:.1f}" if value < 20 else f"{value:,.0f}" for value in values]
            panel.bar_label(bars, texts, padding=3, color=INK, fontsize=8)
        panel.set_title(title)
        panel.set_xlim(right=max(map(max, series.values())) * 1.15)
        panel.set_yticks(range(len(labels)), labels, color=INK)
        panel.grid(axis="y", visible=False)
        panel.spines["left"].set_visible(False)
        panel.tick_params(axis="y", length=0)
    axes[0][0].invert_yaxis()
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    save(figure, path)

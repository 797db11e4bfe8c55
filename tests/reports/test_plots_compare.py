"""Heat maps of comparisons: memory within its bound, and any name is only text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from edgemerge.merging.comparison import Comparison
from edgemerge.merging.figures import Sums, TensorFigures
from edgemerge.merging.verdicts import Verdict
from edgemerge.reports.plots_compare import DRAWING_BYTES, draw_comparison


def comparison(n_layers: int, n_kinds: int, name: str = "b") -> Comparison:
    tensors = [
        TensorFigures("token_embd.weight", (4, 4), sums(0.5), (1.0,)),
        *(
            TensorFigures(f"blk.{i}.kind_{j}.weight", (4, 4), sums((i + 1) / n_layers), (1.0,))
            for i in range(n_layers)
            for j in range(n_kinds)
        ),
    ]
    verdict = Verdict("near", f"a and {name} are near each other", False)
    return Comparison(("a", name), tuple(tensors), sums(1.0), (verdict,), (), 1)


def sums(cosine: float) -> Sums:
    grams = np.array([[1.0, cosine, 0.0], [cosine, 1.0, 0.0], [0.0, 0.0, 1.0]])
    return Sums(16, grams, 1, (0, 0), 16, 8)


def test_darker_is_more_alike(tmp_path: Path) -> None:
    draw_comparison(comparison(4, 3), tmp_path / "x.png")
    image = imread(tmp_path / "x.png")[..., :3].mean(axis=-1)
    row = image[36 + 34 + 60 + 30 + 15, 330 : 330 + 900]  # of the first kind in layers
    columns = [float(np.median(row[i * 180 + 20 : (i + 1) * 180 - 20])) for i in range(1, 5)]
    assert columns == sorted(columns, reverse=True)
    assert columns[0] > 0.7 > 0.2 > columns[3]


@pytest.mark.parametrize("name", ["$x^", "a\nb\x1b[31m", "größe-模型", "x" * 300, r"\frac{}"])
def test_names_are_only_text(name: str, tmp_path: Path) -> None:
    draw_comparison(comparison(1, 1, name), tmp_path / "x.png")


PROGRAM = """
import sys
from pathlib import Path
from tests.reports.test_plots_compare import comparison, draw_comparison
from edgemerge.output.report import peak_rss_bytes
found = comparison(int(sys.argv[1]), int(sys.argv[2]))
import numpy, edgemerge.reports.plots
before = peak_rss_bytes()
draw_comparison(found, Path(sys.argv[3]))
print(peak_rss_bytes() - before)
"""


@pytest.mark.parametrize(("n_layers", "n_kinds"), [(1, 1), (32, 12), (126, 64)])
def test_memory_stays_under_the_bound(n_layers: int, n_kinds: int, tmp_path: Path) -> None:
    words = (str(n_layers), str(n_kinds), str(tmp_path / "x.png"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True
    )
    assert 0 < int(done.stdout) <= DRAWING_BYTES

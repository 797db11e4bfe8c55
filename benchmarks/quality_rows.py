"""The merges that the tables of quality compare: a row is a name and a recipe.

A new method gets a row in `OURS`. bench_quality.py and bench_quality135.py then merge and score it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

# Where the settings of a row come from; docs/quality.md explains the words.
DEFAULTS = "defaults"
PAPER = "paper"
VALIDATION = "validation"  # chosen with tests/models/validation, on merges of the small experts
TRIED = (
    "tried"  # on merges of the small experts and their held-out questions, before there were others
)


@dataclass(frozen=True)
class Row:
    """One merge of two experts into their base."""

    label: str
    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    settings: str = DEFAULTS
    group: str = "ours"  # models | paper | ours | shuffled | aligned


# Found by search_settings.py: late layers, and the matrices that write to the residual stream, bear
# more than the sum of both changes, embeddings and the first layer less.
LATE = [0.75, 1.172, 0.759, 1.25]
BY_LAYER = [
    {"filter": "embed_tokens", "value": 0.6},
    {"filter": "norm", "value": 0.893},
    *({"filter": name, "value": LATE} for name in ("o_proj", "down_proj", "up_proj")),
    {"value": [0.6, 0.938, 0.607, 1.0]},
]
REFERENCE = "task_arithmetic lambda=0.7"  # what every other merge is compared with
RAMP = "task_arithmetic lambda=[0.6, 1.2]"
OURS = (
    Row("linear", "linear"),
    Row(REFERENCE, "task_arithmetic", {"lambda": 0.7}, TRIED),
    Row("task_arithmetic lambda=1", "task_arithmetic"),
    Row(RAMP, "task_arithmetic", {"lambda": [0.6, 1.2]}, VALIDATION),
    Row(
        "task_arithmetic, lambda by layer and kind",
        "task_arithmetic",
        {"lambda": BY_LAYER},
        VALIDATION,
    ),
    Row("lines alpha=0.6 beta=0.6", "lines", {"alpha": 0.6, "beta": 0.6}, VALIDATION),
    Row(
        "task_arithmetic svc lambda=[0.7, 1.4]",
        "task_arithmetic",
        {"svc": True, "lambda": [0.7, 1.4]},
        TRIED,
    ),
    Row("covariance", "covariance"),
    Row("tsv lambda=[0.6, 1.2]", "tsv", {"lambda": [0.6, 1.2]}, VALIDATION),
    Row("tsv lambda=[0.7, 1.4]", "tsv", {"lambda": [0.7, 1.4]}, TRIED),
    Row("iso_c lambda=[0.7, 1.4]", "iso_c", {"lambda": [0.7, 1.4]}, TRIED),
    Row("resmerge", "resmerge"),
    Row("ties density=0.5", "ties", {"density": 0.5}, TRIED),
    Row(
        "dare_ties density=0.6 lambda=0.7",
        "dare_ties",
        {"density": 0.6, "lambda": 0.7},
        TRIED,
    ),
    Row(
        "della density=0.6 epsilon=0.05 lambda=0.7",
        "della",
        {"density": 0.6, "epsilon": 0.05, "lambda": 0.7},
        TRIED,
    ),
    Row(
        "breadcrumbs density=0.9 lambda=0.7",
        "breadcrumbs",
        {"density": 0.9, "lambda": 0.7},
        TRIED,
    ),
    Row(
        "breadcrumbs density=0.9 lambda=[0.6, 1.2]",
        "breadcrumbs",
        {"density": 0.9, "lambda": [0.6, 1.2]},
        TRIED,
    ),
    Row("hierarchical", "hierarchical"),
)
VARIANTS = (  # of the above, for the small experts only: scoring a row of SmolLM2 takes a minute
    Row("slerp t=0.5", "slerp", {"t": 0.5}),
    Row(
        "dare_linear density=0.6 lambda=0.7",
        "dare_linear",
        {"density": 0.6, "lambda": 0.7},
        TRIED,
    ),
    Row(
        "della_linear density=0.6 epsilon=0.05 lambda=0.7",
        "della_linear",
        {"density": 0.6, "epsilon": 0.05, "lambda": 0.7},
        TRIED,
    ),
    Row("breadcrumbs_ties density=0.9", "breadcrumbs_ties", {"density": 0.9}, TRIED),
    Row("covariance columns=0", "covariance", {"columns": 0}),
    Row("iso_cts lambda=[0.7, 1.4]", "iso_cts", {"lambda": [0.7, 1.4]}, TRIED),
    Row("tsv svc lambda=[0.7, 1.4]", "tsv", {"svc": True, "lambda": [0.7, 1.4]}, TRIED),
    Row("hierarchical svc", "hierarchical", {"svc": True}),
    Row("hierarchical scope=block", "hierarchical", {"scope": "block"}),
    Row("hierarchical scope=row", "hierarchical", {"scope": "row"}),
)
# Methods whose first row above is also made of an expert with its heads in another order.
SHUFFLED = (
    *("linear", "slerp", "task_arithmetic", "ties"),
    *("dare_ties", "della", "breadcrumbs", "hierarchical"),
)
PUBLISHED = ("linear", "task_arithmetic", "dare_ties", "della", "breadcrumbs", "hierarchical")


def merges(*more: Row) -> Iterator[Row]:
    """Yield merges with our settings, of them some that only one table has, then with the paper's."""
    yield from (*OURS, *more)
    for method in PUBLISHED:
        yield Row(method, method, settings=PAPER, group="paper")


def shuffled() -> Iterator[Row]:
    """Yield the merges of the shuffled expert, as it is and aligned."""
    for method in SHUFFLED:
        first = next(row for row in (*OURS, *VARIANTS) if row.method == method)
        yield replace(first, group="shuffled")
        yield replace(first, group="aligned")


def words_of(row: Row, base: str, experts: Sequence[str]) -> list[str]:
    """Return the arguments of `edgemerge merge` but output and type.

    A row of the group `models` has the one model to copy in `experts`.
    """
    if row.method == "slerp":  # between the two experts, the first of them standing for t = 0
        base, *experts = experts
    words = ["-m", row.method, *experts]
    words += [] if row.method in ("linear", "passthrough") else ["--base", base]
    for name, value in row.parameters.items():
        words += ["-P", f"{name}={json.dumps(value)}"]
    words += ["--preset", "paper"] if row.settings == PAPER else []
    return words + {"shuffled": ["--align", "off"], "aligned": ["--align", "hard"]}.get(
        row.group, []
    )

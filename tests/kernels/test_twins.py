"""The twins give the same bytes whichever vectors NumPy computes with, so on every processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.places import TESTS
from tests.support.processors import disabled_features, levels_here

# Rows in which zeros of both signs meet are where NumPy's minimum and fmax depend on the vectors' width.
CODE = """
import hashlib, json, warnings
import numpy as np
from tests.twins import codecs, few_bits, weighted

warnings.simplefilter("ignore")
rows = codecs.hard_rows(256)[::3].copy()
importance = np.linspace(0, 2, 256, dtype=np.float32)[::-1].copy()
found = {}
for module, given in ((codecs, (rows.ravel(),)), (few_bits, (rows.ravel(),)), (weighted, (rows, importance))):
    for name in dir(module):
        if name.startswith("encode_") and name != "encode_affine_k":
            out = getattr(module, name)(*given)
            found[f"{module.__name__}.{name}"] = hashlib.sha256(out.tobytes()).hexdigest()
found["rows"] = hashlib.sha256(rows.tobytes()).hexdigest()
print(json.dumps(found))
"""


def hashes(disabled: str) -> dict[str, str]:
    run = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=TESTS.parent,
        env={**os.environ, "NPY_DISABLE_CPU_FEATURES": disabled},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, str] = json.loads(run.stdout)
    return found


@pytest.fixture(scope="module")
def here() -> dict[str, str]:
    return hashes(os.environ.get("NPY_DISABLE_CPU_FEATURES", ""))


@pytest.mark.skipif(len(levels_here()) < 2, reason="this processor stands in for no other")
@pytest.mark.parametrize("level", levels_here()[:-1])
def test_twins_do_not_depend_on_the_vectors_of_numpy(level: str, here: dict[str, str]) -> None:
    assert hashes(disabled_features(level)) == here

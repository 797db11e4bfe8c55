"""Machine code for a kind of machine that this one is not."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from edgemerge.native.image import Image
from edgemerge.native.names import image_name
from edgemerge.native.processors import VARIANTS

RETURN = {"aarch64": bytes.fromhex("c0035fd6"), "x86_64": b"\xc3"}


@pytest.mark.skipif(platform.machine() not in VARIANTS, reason="compiles for x86-64 and AArch64")
def test_a_kernel_for_the_other_machine(tmp_path: Path) -> None:
    (machine,) = VARIANTS.keys() - {platform.machine()}
    code = (
        "import pathlib, sys\n"
        "from edgemerge.native.processors import VARIANTS\n"
        "from tools.prebuild import compile_images\n"
        f"variant = VARIANTS['{machine}'][-1]\n"
        f"compile_images('{machine}', variant, pathlib.Path(sys.argv[1]), ['linear.subtract'])\n"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, check=True)
    image = Image.from_bytes((tmp_path / image_name("linear", "subtract")).read_bytes())
    assert RETURN[machine] in image.code[image.entry :]

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
from tests.support.places import ROOT

RETURN = {"aarch64": bytes.fromhex("c0035fd6"), "x86_64": b"\xc3"}


def test_a_compiler_that_is_killed_ends_the_build(tmp_path: Path) -> None:
    """Fault: it waited for ever."""
    code = (
        "import os, pathlib, signal, sys\n"
        "from edgemerge.native.processors import VARIANTS\n"
        "from tools import prebuild\n"
        "def die(machine, variant, folder, name):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "prebuild._compile = die\n"
        "variant = VARIANTS['x86_64'][-1]\n"
        "prebuild.compile_images('x86_64', variant, pathlib.Path(sys.argv[1]), ['a.b', 'a.c'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("tools.prebuild: a child that compiles was killed")


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
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    image = Image.from_bytes((tmp_path / image_name("linear", "subtract")).read_bytes())
    assert RETURN[machine] in image.code[image.entry :]

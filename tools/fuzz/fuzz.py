"""Run libFuzzer, through atheris, on one of `TARGETS`; started by tools/fuzz/run.

An input fails that ends in anything but success or our own error, takes a second of processor time,
or takes 64 MiB more memory than before it.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["edgemerge", "yaml", "json", "jinja2"]):
    from tools.fuzz.targets import TARGETS

from edgemerge.errors import EdgemergeError

MAX_SECONDS = 1.0
MAX_BYTES = 64 << 20


def memory(field: str) -> int:
    """Bytes of this process, as /proc/self/status has them: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found
    return int(found[1]) << 10


def main() -> None:
    """Fuzz the target that the command line names."""
    _, name, *arguments = sys.argv
    logging.disable()
    read = TARGETS[name]
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))

    def try_input(data: bytes) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from VmRSS
        before, start = memory("VmRSS"), time.process_time()
        try:
            read(data, folder)
        except EdgemergeError as error:
            message = str(error)
            if not message.isprintable():
                raise AssertionError(f"message of several lines: {message!r}") from error
        seconds = time.process_time() - start
        assert seconds < MAX_SECONDS, f"took {seconds:.1f} s"
        grown = memory("VmHWM") - before
        assert grown < MAX_BYTES, f"took {grown >> 20} MiB"

    atheris.Setup([sys.argv[0], *arguments], try_input)
    atheris.Fuzz()


main()

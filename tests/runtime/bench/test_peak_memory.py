from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import gguf
import pytest

from edgemerge.machine.process import read_process
from edgemerge.runtime.bench.bench import BenchSettings, Measured
from edgemerge.runtime.bench.messages import read_message, rebuild
from edgemerge.runtime.bench.peak_memory import MemorySplit, PeakMemory, mapped_bytes
from edgemerge.runtime.library import Buffers
from tests.support.tiny_gguf import N_EMBD, N_HEADS, N_KV_HEADS, N_LAYERS

MIB = 1 << 20

SMAPS = """\
55d0c0a00000-55d0c0a01000 r--p 00000000 fe:00 1234                       {0}/python
Size:                  4 kB
Rss:                   4 kB
7f38295b3000-7f382f1cf000 r--s 001b3000 fe:00 2329601                    {0}/a model.gguf
Size:              94320 kB
Rss:               94000 kB
Pss:               94000 kB
7f382f1cf000-7f382f2cf000 rw-p 00000000 00:00 0
Rss:                1024 kB
7f382f2cf000-7f382f2d0000 r--s 00000000 fe:00 2329602                    {0}/b.gguf
Rss:                   8 kB
"""


def test_pages_of_the_model_are_counted(tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to(tmp_path / "a model.gguf")
    smaps = SMAPS.format(tmp_path).splitlines(keepends=True)
    assert mapped_bytes(smaps, [tmp_path / "link.gguf"]) == 94000 << 10
    assert mapped_bytes(smaps, [tmp_path / "a model.gguf", tmp_path / "b.gguf"]) == 94008 << 10
    assert mapped_bytes(smaps, [tmp_path / "c.gguf"]) == 0


def test_copies_count_as_weights_and_the_gpu_as_none() -> None:
    sizes = {
        ("CPU_Mapped", "model"): 86 * MIB,
        ("CPU_REPACK", "model"): MIB // 2,
        ("CUDA0", "model"): 40 * MIB,
        ("CPU", "KV"): MIB // 4,
        ("CUDA0", "KV"): 2 * MIB,
        ("CUDA_Host", "output"): MIB,
        ("CPU", "compute"): 14 * MIB,
    }
    peak = PeakMemory([])
    peak.look(Buffers(sizes))
    split = peak.split
    assert split.weights == MIB // 2
    assert split.mapped == 0
    assert split.kv == MIB // 4
    assert split.device == 42 * MIB
    assert split.peak == pytest.approx(read_process().peak, rel=0.003)  # looking takes next to none


def test_the_rest_is_what_is_left() -> None:
    assert MemorySplit(peak=100, weights=60, mapped=50, kv=10, device=7).rest == 30


PROGRAM = """
import sys
from edgemerge.runtime.bench import child as bench_child
bench_child.main()
sys.stderr.write(open("/proc/self/status").read())
"""


@pytest.mark.llama
def test_the_parts_add_up_to_what_proc_says_of_the_process(tiny_gguf: Path) -> None:
    settings = BenchSettings(threads=(1,), n_prompt=64, n_gen=4, repetitions=1)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(["measure", str(tiny_gguf), asdict(settings)]).encode() + b"\n",
        capture_output=True,
        check=True,
    )
    messages = io.BytesIO(done.stdout)
    while (message := read_message(messages)) and message[0] == "step":
        pass
    assert message is not None
    measured = rebuild(Measured, message[1])
    memory = measured.memory
    found = re.search(rb"VmHWM:\s+(\d+) kB", done.stderr)
    assert found is not None
    parts = memory.weights + memory.kv + memory.rest
    assert parts == pytest.approx(1024 * int(found[1]), rel=0.01)

    size = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(tiny_gguf).tensors)
    assert memory.mapped == pytest.approx(size, abs=2 * 4096)
    assert memory.weights == memory.mapped  # float32 is used as it lies
    # keys and values of 256 places, the least that llama.cpp makes, in half precision
    per_token = 2 * N_LAYERS * (N_EMBD // N_HEADS * N_KV_HEADS) * 2
    assert memory.kv == pytest.approx(256 * per_token, abs=0.01 * MIB)
    assert 10 * MIB < memory.rest < 400 * MIB

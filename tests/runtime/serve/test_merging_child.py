"""Work beside the server: a child at low priority that ends when it should; one job at a time; its memory."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.board.memory import Memory
from edgemerge.runtime.serve.errors import Refusal
from edgemerge.runtime.serve.merging import child, room
from edgemerge.runtime.serve.merging.job import Job, Jobs
from edgemerge.runtime.serve.models import ModelFile
from edgemerge.runtime.serve.queue import Room
from edgemerge.runtime.serve.store import ModelStore
from tests.support.fake_process import Loader, keep

MIB = 1 << 20
# tells its priority, ignores nothing, and never ends by itself
SLEEPER = """import json, os, sys, time
print(json.dumps([os.getpid(), os.nice(0)]), flush=True)
fd = int(os.environ["EDGEMERGE_PROGRESS_FD"])
line = {"label": str(os.getpid()), "is_part": False, "unit": None, "done": 1, "total": 2}
os.write(fd, json.dumps(line).encode() + b"\\n")
time.sleep(float(sys.argv[1]))
"""
STUBBORN = SLEEPER.replace("import json", "import signal; signal.signal(15, 1); import json")


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 15
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_command_answers_and_says_why_it_failed(golden_dir: Path, tmp_path: Path) -> None:
    models = [str(golden_dir / "inputs_f32" / name) for name in "ab"]
    lines: list[dict[str, Any]] = []

    async def scenario() -> None:
        output = str(tmp_path / "out.gguf")
        arguments = ["merge", "-m", "linear", *models, "-o", output]
        report = await child.run_command(arguments, lines.append)
        assert report["output"] == output
        digest = hashlib.sha256((tmp_path / "out.gguf").read_bytes()).hexdigest()
        assert await child.digest_files([tmp_path / "out.gguf"]) == [digest] == [report["sha256"]]
        with pytest.raises(RuntimeFailure, match=r"out\.gguf: exists already"):
            await child.run_command(arguments)
        with pytest.raises(RuntimeFailure, match=r"exit code 1.*No such file"):
            await child.digest_files([tmp_path / "nothing"])

    asyncio.run(scenario())
    assert lines[-1]["done"] == lines[-1]["total"]


def test_a_child_stands_back_and_ends_with_its_task(tmp_path: Path) -> None:
    async def scenario() -> None:
        seen: list[dict[str, Any]] = []
        command = [sys.executable, "-c", SLEEPER, "600"]
        task = asyncio.create_task(child._run(command, seen.append))
        while not seen:
            await asyncio.sleep(0.02)
        pid = int(seen[0]["label"])
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, own + 10)
        io_class = _io_class(pid)
        assert io_class in (3, None)  # idle, where the processor's number of the call is known
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert has_ended(pid)

    asyncio.run(scenario())


def _io_class(pid: int) -> int | None:
    import ctypes
    import platform

    number = {"x86_64": 252, "aarch64": 31}.get(platform.machine())
    return None if number is None else ctypes.CDLL(None).syscall(number, 1, pid) >> 13


def test_a_child_that_will_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_END_SECONDS", 0.2)

    async def scenario() -> None:
        seen: list[dict[str, Any]] = []
        task = asyncio.create_task(child._run([sys.executable, "-c", STUBBORN, "600"], seen.append))
        while not seen:
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert has_ended(int(seen[0]["label"]))

    asyncio.run(scenario())


def test_a_child_ends_with_the_server(tmp_path: Path) -> None:
    """Also where the server is killed, and so cannot end anything itself."""
    server = (
        "import asyncio, sys\n"
        "from edgemerge.runtime.serve.merging.child import _run\n"
        "command = [sys.executable, '-c', sys.argv[1], '600']\n"
        "asyncio.run(_run(command, lambda line: print(line['label'], flush=True)))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", server, SLEEPER], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert not has_ended(pid)
        process.kill()
    wait_until(lambda: has_ended(pid))


def test_what_the_system_ends_is_told() -> None:
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    faulty = killed.replace("SIGKILL", "SIGSEGV")

    async def scenario() -> None:
        with pytest.raises(RuntimeFailure, match="where memory is short"):
            await child._run([sys.executable, "-c", killed], lambda _line: None)
        with pytest.raises(RuntimeFailure, match=r"it ended by itself \(SIGSEGV\)"):
            await child._run([sys.executable, "-c", faulty], lambda _line: None)

    asyncio.run(scenario())


def test_one_job_at_a_time_and_its_end_is_remembered() -> None:
    async def scenario() -> None:
        jobs = Jobs(str)

        async def sleep(_job: Job) -> dict[str, Any]:
            await asyncio.sleep(60)
            return {}

        async def fail(_job: Job) -> dict[str, Any]:
            raise RuntimeFailure("no")

        async def succeed(job: Job) -> dict[str, Any]:
            job.look({"label": "x", "done": 1, "total": 4, "unit": None, "is_part": False})
            return {"a": 1}

        first = jobs.start("merge", "first", sleep)
        with pytest.raises(Refusal, match="first is still at work") as caught:
            jobs.start("merge", "second", sleep)
        assert caught.value.status == 409
        with pytest.raises(Refusal, match="ended already"):
            await jobs.cancel(first.id + 1)
        assert (await jobs.cancel(first.id)).state == "cancelled"
        with pytest.raises(Refusal, match="ended already"):
            await jobs.cancel(first.id)
        for work, state in ((fail, "failed"), (succeed, "done")):
            job = jobs.start("merge", "next", work)
            while job.state == "running":
                await asyncio.sleep(0)
            assert job.state == state
            assert jobs.last is job
        told = job.as_json()
        assert (told["done"], told["total"], told["result"]) == (1, 4, {"a": 1})
        last = jobs.start("merge", "last", sleep)
        await jobs.close()
        assert last.state == "cancelled"

    asyncio.run(scenario())


def test_a_job_that_is_cancelled_twice_ends_its_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_END_SECONDS", 0.5)

    async def scenario() -> None:
        jobs = Jobs(str)
        seen: list[dict[str, Any]] = []

        async def work(_job: Job) -> dict[str, Any]:
            told = await child._run([sys.executable, "-c", STUBBORN, "600"], seen.append)
            return {"told": told}

        job = jobs.start("merge", "stubborn", work)
        while not seen:
            await asyncio.sleep(0.02)
        first = asyncio.create_task(jobs.cancel(job.id))
        await asyncio.sleep(0.1)  # it has been asked to end, and has not
        await asyncio.gather(first, jobs.cancel(job.id), jobs.close())
        assert job.state == "cancelled"
        assert has_ended(int(seen[0]["label"]))

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("available", "budget", "reserved"),
    [
        (1000, 300, 0),  # 800 lie outside of what the server may take
        (150, 300, 100),  # the server may take all that there is
        (250, 300, 50),
    ],
)
def test_memory_of_work_is_kept_from_models(
    available: int, budget: int, reserved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.gguf"
    path.write_text("")
    file = ModelFile("a", path, 64, 0, 160 * MIB, {}, 0)
    store = ModelStore([file], Loader(), keep, budget=budget * MIB, floor=100 * MIB)
    memory = Memory(0, available * MIB, 0, 0, limited=False)
    monkeypatch.setattr(room, "read_memory", lambda: memory)
    monkeypatch.setattr(room, "_resident", lambda _models: 100 * MIB)
    assert room.free_room(store) == int(0.9 * available * MIB)
    with room.reserved(store, 100 * MIB):
        assert store.reserved == reserved * MIB
        fits = 100 + reserved + 160 <= budget
        assert store.room_for("a") is (Room.FREE if fits else Room.SHUT)
    assert store.reserved == 0
    assert store.room_for("a") is Room.FREE

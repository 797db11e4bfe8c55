"""Where machine code lies, and when the child that compiles is asked."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemerge.errors import OutputError, RuntimeFailure
from edgemerge.native import compiler, names, store
from edgemerge.native.kernel import Kernel
from edgemerge.native.probe import SIGNATURE
from edgemerge.native.processors import VARIANTS

NAME = "linear.subtract"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with nothing in it, not even itself."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_in_memory", {})
    monkeypatch.setattr(store, "PREBUILT", tmp_path / "no wheel")
    return tmp_path / "cache"


def image_path(cache: Path) -> Path:
    (path,) = cache.glob("native-*/*.image")
    return path


def subtract_ones() -> list[float]:
    values = np.arange(4, dtype=np.float32)
    Kernel("linear", "subtract")(np.ones(4, np.float32), values, np.empty(1, np.int64))
    return list(values)


class Children:
    """Stands in for `subprocess.Popen` and remembers what was asked for."""

    def __init__(
        self, status: int | OSError = 0, errors: str = "Traceback\nLinkError: no\n"
    ) -> None:
        self.returncode = status
        self.errors = errors
        self.commands: list[list[str]] = []
        self.n_ended = 0

    def __call__(self, command: list[str], **options: Any) -> Children:
        self.commands.append(command)
        if isinstance(self.returncode, OSError):
            raise self.returncode
        return self

    def communicate(self) -> tuple[None, str]:
        return None, self.errors

    def kill(self) -> None:
        self.n_ended += 1

    def wait(self) -> None:
        """It has ended."""


def test_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.find_missing([NAME]) == [NAME]
    assert subtract_ones() == [-1, 0, 1, 2]
    assert store.find_missing([NAME]) == []
    monkeypatch.setattr(subprocess, "Popen", None)  # nobody is asked again
    store.compile_missing([NAME])
    assert subtract_ones() == [-1, 0, 1, 2]


def test_a_damaged_image_is_compiled_again(cache: Path) -> None:
    store.compile_missing([NAME])
    path = image_path(cache)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    assert store.find_missing([NAME]) == [NAME]
    assert subtract_ones() == [-1, 0, 1, 2]
    assert store.find_missing([NAME]) == []


def test_another_source_or_processor_is_another_image(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.compile_missing([NAME])
    monkeypatch.setattr(store, "_toolchain", lambda: "another")
    assert store.find_missing([NAME]) == [NAME]
    monkeypatch.undo()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(cache))
    assert store.find_missing([NAME]) == []
    monkeypatch.setattr(names, "_source_hash", lambda _: "another")
    assert store.find_missing([NAME]) == [NAME]


def test_a_wheels_images_come_first(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the best processor that this one is; where none is there, a child compiles."""
    store.compile_missing([NAME])
    image = image_path(cache)
    best, *others = VARIANTS[platform.machine()]
    variants = (best, *others)
    folders = {v.name: tmp_path / "prebuilt" / platform.machine() / v.name for v in variants}
    for folder in folders.values():
        folder.mkdir(parents=True)
    monkeypatch.setattr(store, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(store, "processor_features", lambda: best.needs)
    kept = image.rename(folders[best.name] / image.name)
    assert store.find_missing([NAME]) == []
    assert subtract_ones() == [-1, 0, 1, 2]

    monkeypatch.setattr(store, "processor_features", lambda: others[0].needs)
    assert store.find_missing([NAME]) == [NAME]  # an older processor must not run them
    kept = kept.rename(folders[others[0].name] / image.name)
    assert store.find_missing([NAME]) == []
    monkeypatch.setattr(store, "processor_features", lambda: best.needs)
    assert store.find_missing([NAME]) == []  # the next lower ones run, too

    kept.unlink()
    assert store.find_missing([NAME]) == [NAME]
    assert subtract_ones() == [-1, 0, 1, 2]


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "file" / "cache"))
    assert subtract_ones() == [-1, 0, 1, 2]
    assert store.find_missing([NAME]) == []  # kept by the process


def test_the_users_cache_stands_in_for_one_that_cannot_be_written(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: with a shared NUMBA_CACHE_DIR, its second user compiled in every process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    store.compile_missing([NAME])
    assert store._in_memory == {}
    assert image_path(tmp_path / "own" / "edgemerge")
    assert store.find_missing([NAME]) == []
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(cache))
    assert store.find_missing([NAME]) == [NAME]  # one that can be written may be fresh


def test_a_user_without_any_cache_finds_the_images_that_are_there(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: where the cache could not be written, no kernel was found without a folder of the user's."""

    def refuse() -> Path:
        raise OutputError("this user has no home", path=tmp_path)

    store.compile_missing([NAME])
    monkeypatch.setattr(store, "_can_be_written", lambda _: False)
    monkeypatch.setattr(store, "users_cache", refuse)
    assert store.find_missing([NAME]) == []


def test_a_numba_that_was_not_tested_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its calling convention was assumed up to 1.0."""
    monkeypatch.setattr("edgemerge.native.store.subprocess.Popen", None)  # no child is started
    for found in ("0.61.2", "0.69.0rc1", "0.6", "1.0.0"):
        monkeypatch.setattr(store, "version", lambda _, found=found: found)
        with pytest.raises(RuntimeFailure, match=rf"^numba {found} was not tested .* 0\.68: ") as e:
            store.compile_missing([NAME])
        assert "pip install 'numba>=0.68,<0.69'" in str(e.value)


def test_the_tested_versions_of_numba_are_those_that_are_installed() -> None:
    with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
        stated = tomllib.load(file)["project"]["dependencies"]
    bounds = store._INSTALL.partition("'")[2].rstrip("'")
    assert bounds in stated
    minors = [int(version.removeprefix("0.")) for version in store.TESTED_NUMBA]
    assert minors == list(range(minors[0], minors[-1] + 1))


def test_a_calling_convention_that_changed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a new Numba passed the scalars of a signature in another order."""
    compiler.check_numba()
    compiler.check_numba.cache_clear()
    swapped = SIGNATURE.replace("i8, u8, f4, f8,", "u8, i8, f8, f4,", 1)
    compiled = compiler._compile

    def compile_otherwise(function: Any, _: str, options: Any) -> tuple[bytes, str]:
        return compiled(function, swapped, options)

    monkeypatch.setattr(compiler, "_compile", compile_otherwise)
    with pytest.raises(RuntimeFailure, match=r"a self-test of numba 0\.\S+ gave a wrong result"):
        compiler.check_numba()


@pytest.mark.parametrize("end", ["raise RuntimeFailure('a self-test failed')", "os.abort()"])
def test_a_self_test_that_fails_is_one_sentence(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    site = tmp_path / "sitecustomize.py"
    site.write_text(
        "import os\n"
        "from edgemerge.errors import RuntimeFailure\n"
        "from edgemerge.native import probe\n"
        f"def fail(function):\n    {end}\n"
        "probe.gives_known_result = fail\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(
        RuntimeFailure, match=r"^the kernels could not be compiled with numba 0\.\S+ \("
    ) as e:
        store.compile_missing([NAME])
    assert ("signal 6" if "abort" in end else "a self-test failed") in str(e.value)
    assert "pip install 'numba>=" in str(e.value)
    assert not list(cache.glob("native-*/*"))


@pytest.mark.parametrize("status", [1, -9, OSError(12, "no memory for a process")])
def test_a_compiler_that_fails_is_one_sentence(
    cache: Path, status: int | OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", Children(status))
    with pytest.raises(RuntimeFailure, match="kernels could not be") as error:
        store.load_image("linear", "subtract")
    assert "\n" not in str(error.value)
    assert not list(cache.glob("native-*/*"))


@pytest.mark.parametrize(
    ("status", "errors", "remedy"),
    [
        (-9, "", "memory ends; stop other programs"),
        (1, "OSError: [Errno 28] No space left on device", "is full; make room"),
    ],
)
def test_a_machine_that_is_full_is_not_told_to_install(
    cache: Path, status: int, errors: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: where memory or a disk ended, another numba was the remedy."""
    monkeypatch.setattr(subprocess, "Popen", Children(status, errors))
    with pytest.raises(RuntimeFailure, match=remedy) as error:
        store.load_image("linear", "subtract")
    assert "pip install" not in str(error.value)
    assert (str(cache) in str(error.value)) == bool(errors)


def test_a_module_in_the_users_folder_is_not_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody's `tempfile.py` beside the recipe would be imported, and run."""
    (tmp_path / "tempfile.py").write_text("open('ran', 'w').close()\nraise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    store.compile_missing([NAME])
    assert not (tmp_path / "ran").exists()
    assert image_path(cache)


def test_the_children_are_this_python(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children()
    monkeypatch.setattr(subprocess, "Popen", children)
    store.compile_missing([NAME, "ties.elect"])
    (command,) = children.commands
    assert command[:3] == [sys.executable, "-P", "-m"]
    assert command[-2:] == [NAME, "ties.elect"]
    children.commands.clear()
    many = ["q4_k.encode_q4_k", "q6_k.encode_q6_k", NAME, "ties.elect"]
    store.compile_missing(many)
    shares = [
        command[command.index("edgemerge.native.compiler") + 2 :] for command in children.commands
    ]
    assert sorted(name for share in shares for name in share) == sorted(many)
    if len(shares) == 2:  # the slow ones one each
        assert [share[0] for share in shares] == many[:2]
    assert children.n_ended == 1 + len(shares)


def test_little_memory_takes_one_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children()
    monkeypatch.setattr(subprocess, "Popen", children)
    monkeypatch.setattr(store, "memory_limits", lambda: iter([(cache, 450 << 20)]))
    store.compile_missing(["q4_k.encode_q4_k", "q6_k.encode_q6_k", NAME, "ties.elect"])
    assert len(children.commands) == 1

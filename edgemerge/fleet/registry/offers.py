"""What a file to be published is, read from its header; its figures, read from `edgemerge eval`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from edgemerge.errors import FormatError, MismatchError, RecipeError
from edgemerge.fleet.registry.entries import MAX_LICENCE
from edgemerge.formats import open_model
from edgemerge.formats.adapters.base_sample import sample_checksum
from edgemerge.formats.adapters.delta import DELTA, SAMPLE, VERSION, VERSION_KEY
from edgemerge.formats.gguf.metadata import Value, get_value
from edgemerge.formats.gguf.model import GgufFile, parts_of
from edgemerge.formats.json_file import read_object

__all__ = ["Offer", "base_checksum", "read_offer", "read_scores"]

FIGURES = ("n", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "loss")
TEXT_FIGURES = ("perplexity", "stderr", "n_tokens")


class Offer(NamedTuple):
    """What the header of a file says."""

    kind: str  # of `edgemerge.fleet.registry.entries.KINDS`
    base: str | None  # checksum of a delta's base; of a model, its own
    licence: str  # empty where none is stated


def read_offer(path: Path, base: str | None = None) -> Offer:
    """Read what a file is.

    Parameters
    ----------
    path : Path
        GGUF file: a delta, a LoRA adapter, or a model in one file.
    base : str, optional
        Checksum that the base should have; see `base_checksum`.

    Raises
    ------
    FormatError
        It is none of these.
    MismatchError
        It is a delta of another base.
    RecipeError
        It is a model, which has no base.
    """
    if path.is_dir():
        raise FormatError(
            "is a folder, and one file is published; make a GGUF of it with edgemerge convert",
            path=path,
        )
    try:
        with closing(GgufFile(path)) as file:
            metadata = file.metadata
            found = _read_header(file)
    except OSError as error:
        raise FormatError(
            f"cannot be read ({error.strerror}); check the path", path=path
        ) from error
    if found.kind == "model":
        if base is not None:
            raise RecipeError(f"{path} is a model, and has no base; leave out --base")
        found = found._replace(base=_check_model(path))
    if found.kind == "delta" and base not in (None, found.base):
        raise MismatchError(
            f"{path} is a delta of another base: its checksum is {found.base}, and --base has {base}; give "
            "the base that the delta was made of"
        )
    licence = get_value(metadata, "general.license", "")
    return found._replace(base=found.base or base, licence=_one_line(licence))


def base_checksum(model: Path) -> str:
    """Return by what a delta knows its base: eight hexadecimal digits.

    Raises
    ------
    FormatError
        It is no model.
    """
    with closing(open_model(model)) as source:
        return _in_hex(sample_checksum(source))


def read_scores(path: Path) -> dict[str, Any]:
    """Take the figures of one model from what `edgemerge eval` wrote, by `--json` or `-o`.

    Returns
    -------
    dict
        `tasks`: by task `n`, `acc`, `acc_stderr`, `acc_norm`, `acc_norm_stderr`, `loss`; `perplexity`: by
        text `perplexity`, `stderr`, `n_tokens`. No paths.

    Raises
    ------
    FormatError
        It is no such file, or of several models.
    """
    document = read_object(path)
    rows = list(_rows(document, "results", path))
    texts = list(_rows(document, "perplexity", path))
    models = {row.get("model") for row in (*rows, *texts)}
    if len(models) != 1:
        what = (
            f"has results of {len(models)} models" if models else "has no results of edgemerge eval"
        )
        raise FormatError(f"{what}; evaluate the published model alone, with --json", path=path)
    return {
        "tasks": {str(row.get("task")): _figures(row, FIGURES, path) for row in rows},
        "perplexity": {
            Path(str(row.get("text"))).name: _figures(row, TEXT_FIGURES, path) for row in texts
        },
    }


def _read_header(file: GgufFile) -> Offer:
    metadata = file.metadata
    stated = get_value(metadata, "general.type", "model")
    if stated == DELTA:
        base = get_value(metadata, SAMPLE)
        if get_value(metadata, VERSION_KEY) != VERSION or type(base) is not int:
            raise FormatError(
                "is a delta whose version or base cannot be told; make it again", path=file.path
            )
        return Offer("delta", _in_hex(base), "")
    if stated not in ("adapter", "model"):
        raise FormatError(
            f"has the type {stated!r}, and deltas, LoRA adapters and models are published",
            path=file.path,
        )
    return Offer(str(stated), None, "")


def _check_model(path: Path) -> str:
    """Refuse what no merge could read, and what is not in one file; return by what deltas know it."""
    if len(parts_of(path)) > 1:
        raise FormatError(
            "is a part of a split, and one file is published; join it with edgemerge convert --type keep",
            path=path,
        )
    return base_checksum(path)


def _rows(document: Mapping[str, Any], key: str, path: Path) -> Iterator[Mapping[str, Any]]:
    found = document.get(key, [])
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise FormatError(
            f"is no result of edgemerge eval: its {key} are no list of rows", path=path
        )
    yield from found


def _figures(row: Mapping[str, Any], names: tuple[str, ...], path: Path) -> dict[str, float | None]:
    found = {name: row.get(name) for name in names}
    if not all(value is None or _is_finite(value) for value in found.values()):
        raise FormatError("has figures that are no numbers; evaluate again", path=path)
    return found


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf  # type: ignore[arg-type]


def _in_hex(checksum: int) -> str:
    return f"{checksum:08x}"


def _one_line(stated: Value | None) -> str:
    return "".join(c if c.isprintable() else " " for c in str(stated or ""))[:MAX_LICENCE]

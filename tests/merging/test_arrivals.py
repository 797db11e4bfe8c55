"""What comes under an output's name during a merge stays, and so does what the merge has made."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgemerge import merge
from edgemerge.errors import OutputError
from edgemerge.output.report import MergeReport
from edgemerge.recipe.recipe import make_recipe
from edgemerge.types import Progress, Recipe
from tests.support.architecture_models import ARCHITECTURES
from tests.support.crashing import write_models


def prepare(form: str, folder: Path) -> tuple[Recipe, int | None, str]:
    """A recipe, the bytes of a split's files, and the name of the output."""
    if form == "folder":
        model = str(ARCHITECTURES / "llama")
        recipe = make_recipe("passthrough", [(model, None)], out_format="hf")
        return recipe, None, "out"
    folder.mkdir()
    models = write_models(folder)
    recipe = make_recipe("linear", [(models[name], None) for name in "ab"], out_type="F16")
    if form == "split":
        return recipe, 30_000, "out.gguf"
    return recipe, None, "out.gguf"


@pytest.mark.parametrize("form", ["file", "split", "folder"])
def test_neither_it_nor_the_work_is_lost(form: str, tmp_path: Path) -> None:
    """Fault: it was replaced without --force."""
    recipe, split_bytes, name = prepare(form, tmp_path / "models")

    def run(output: Path, progress: Progress | None = None) -> MergeReport:
        return merge(recipe, output, split_bytes=split_bytes, progress=progress)

    first = tmp_path / "first"
    first.mkdir()
    wanted = run(first / name)
    made = sorted(path for path in first.rglob("*") if path.suffix in (".gguf", ".safetensors"))
    assert (len(made) > 1) == (form == "split")
    theirs = tmp_path / made[-1].relative_to(first)

    def come(_done: int, _total: int) -> None:
        theirs.parent.mkdir(exist_ok=True)
        theirs.write_bytes(b"precious")

    with pytest.raises(OutputError, match="exists already; choose another name") as caught:
        run(tmp_path / name, progress=come)
    came, how = caught.value.__notes__
    assert came == "it came during the merge: move it away"
    assert how.startswith(f"run the same command again to go on after the {wanted.tensors} tensors")
    with pytest.raises(OutputError, match=r"exists already|is not replaced"):
        run(tmp_path / name)
    assert theirs.read_bytes() == b"precious"
    theirs.rename(tmp_path / "elsewhere")
    found = run(tmp_path / name)
    assert (found.sha256, found.resumed_tensors) == (wanted.sha256, wanted.tensors)
    assert not [*tmp_path.glob("*.part*")]


def test_with_force_it_is_replaced(tmp_path: Path) -> None:
    recipe, _, name = prepare("file", tmp_path / "models")
    output = tmp_path / name
    wanted = merge(recipe, tmp_path / "wanted.gguf")

    def come(_done: int, _total: int) -> None:
        output.write_bytes(b"of no worth")

    with pytest.raises(OutputError):
        merge(recipe, output, progress=come)
    found = merge(recipe, output, force=True, progress=come)
    assert (found.sha256, found.resumed_tensors) == (wanted.sha256, wanted.tensors)

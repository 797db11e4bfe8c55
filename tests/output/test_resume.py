"""What a merge takes over from one that was cut short, what it does not believe, and what it says of it."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from edgemerge.formats import open_model
from edgemerge.merging.run import merge, plan
from edgemerge.output.journal import journal_path, read_journal
from edgemerge.output.resume import DECIDING, PACKAGE, find_fingerprint, hash_sources
from edgemerge.recipe.recipe import make_recipe
from tests.support.architecture_models import ARCHITECTURES
from tests.support.crashing import Case, Crasher, make_case
from tests.support.small_models import wide_tensors, write_gguf

N_TENSORS = 11


class Interrupted:
    """A merge that was killed when all tensors were finished, and the bytes that it should have made."""

    def __init__(self, crasher: Crasher, case: Case) -> None:
        self.crasher, self.case = crasher, case
        whole = crasher.run(case)
        self.expected = case.outputs()
        self.sha256 = whole["sha256"]
        self.journal = journal_path(case.folder / min(self.expected))
        self.part = case.folder / f"{min(self.expected)}.part"
        case.clear()
        assert "signal" in crasher.run(case, at="rename")

    def go_on(self, **changes: Any) -> dict[str, Any]:
        answer = self.crasher.run(self.case, **changes)
        assert "error" not in answer, answer
        return answer

    def go_on_to_the_same(self, **changes: Any) -> dict[str, Any]:
        answer = self.go_on(**changes)
        assert self.case.outputs() == self.expected
        assert answer["sha256"] == self.sha256
        return answer

    def take_over(self, **changes: Any) -> tuple[int, int]:
        answer = self.go_on_to_the_same(**changes)
        assert answer["notes"] == []
        return answer["resumed"], answer["damaged"]

    def start_anew(self, **changes: Any) -> str:
        """Go on, and return why that was not possible."""
        answer = self.go_on(**changes)
        assert (answer["resumed"], answer["damaged"]) == (0, 0)
        (note,) = answer["notes"]
        assert sorted(path.name for path in self.case.folder.iterdir()) == [
            "attic",
            *sorted(self.expected),
        ]
        return str(note).removeprefix("the merge starts anew: ")


@pytest.fixture(params=["ties", "split"])
def killed(
    request: pytest.FixtureRequest,
    crasher: Crasher,
    crash_models: Mapping[str, str],
    memory_folder: Path,
) -> Interrupted:
    models = {}
    for name, path in crash_models.items():  # a test may change them
        models[name] = str(shutil.copy(path, memory_folder))
    return Interrupted(crasher, make_case(request.param, memory_folder, models))


def flip_bit(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << (at % 8)
    path.write_bytes(raw)


def test_everything_that_is_sound_is_taken_over(killed: Interrupted) -> None:
    assert killed.take_over() == (N_TENSORS, 0)


@pytest.mark.parametrize(
    "changes", [{"memory": 300 << 20}, {"memory": 2 << 30}, {"threads": 1}, {"threads": 7}], ids=str
)
def test_budget_and_threads_may_be_others(killed: Interrupted, changes: dict[str, int]) -> None:
    assert killed.take_over(**changes) == (N_TENSORS, 0)


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_is_found_wherever_it_is(killed: Interrupted, seed: int) -> None:
    at = random.Random(seed).randrange(4096, killed.part.stat().st_size)
    flip_bit(killed.part, at)
    resumed, damaged = killed.take_over()
    assert resumed + damaged == N_TENSORS
    assert damaged <= 1  # none where it was between two tensors


def test_a_flipped_bit_between_tensors_is_cleared(killed: Interrupted) -> None:
    flip_bit(killed.part, killed.part.stat().st_size - 1)  # padding, or the last byte of a tensor
    killed.take_over()


@pytest.mark.parametrize("size", [0, 1, 10_000])
def test_a_part_that_was_cut_is_filled_up(killed: Interrupted, size: int) -> None:
    os.truncate(killed.part, size)
    resumed, damaged = killed.take_over()
    assert resumed + damaged == N_TENSORS
    assert damaged > 0


def test_a_part_that_grew_is_cut(killed: Interrupted) -> None:
    with killed.part.open("ab") as file:
        file.write(b"x" * 10_000)
    assert killed.take_over() == (N_TENSORS, 0)


def test_a_part_that_is_gone_is_made_again(killed: Interrupted) -> None:
    killed.part.unlink()
    resumed, damaged = killed.take_over()
    assert resumed + damaged == N_TENSORS
    assert damaged > 0


# -- the journal -----------------------------------------------------------------------------------


def test_a_torn_journal_tells_what_it_can(killed: Interrupted) -> None:
    raw = killed.journal.read_bytes()
    for length in (len(raw) - 3, len(raw) // 2, len(raw) // 3):
        torn = raw[:length]
        killed.journal.write_bytes(torn)
        entries = read_journal(killed.journal)
        assert entries is not None
        assert entries.n_bytes == torn.rindex(b"\n") + 1
        assert len(entries.results) == torn.count(b" tensor ") - (
            b" tensor " in torn[entries.n_bytes :]
        )
    assert entries is not None
    assert killed.take_over() == (len(entries.results), 0)


@pytest.mark.parametrize("length", [0, 5, 40])
def test_a_journal_without_a_whole_line_is_none(killed: Interrupted, length: int) -> None:
    killed.journal.write_bytes(killed.journal.read_bytes()[:length])
    answer = killed.go_on_to_the_same()
    assert (answer["resumed"], answer["notes"]) == (0, [])


@pytest.mark.parametrize("line", [0, 1, 5])
def test_a_damaged_journal_is_not_believed(killed: Interrupted, line: int) -> None:
    lines = killed.journal.read_bytes().splitlines(keepends=True)
    flip_bit(killed.journal, len(b"".join(lines[:line])) + 12)
    assert killed.start_anew() == f"{killed.journal}: is damaged"
    assert killed.case.outputs() == killed.expected


def test_a_journal_of_zeros_is_not_believed(killed: Interrupted) -> None:
    killed.journal.write_bytes(bytes(killed.journal.stat().st_size))
    answer = killed.go_on_to_the_same()
    assert (answer["resumed"], answer["notes"]) == (0, [])


def test_a_journal_that_is_no_file_is_refused_or_replaced(killed: Interrupted) -> None:
    killed.journal.unlink()
    killed.journal.mkdir()
    answer = killed.crasher.run(killed.case)
    assert answer["error"] == f"{killed.journal}: could not be written (Is a directory)"
    killed.journal.rmdir()
    killed.journal.symlink_to("elsewhere")
    answer = killed.crasher.run(killed.case)
    assert "Too many levels of symbolic links" in answer["error"]
    killed.journal.unlink()
    killed.go_on_to_the_same()


# -- another merge ---------------------------------------------------------------------------------

RECIPE = "the recipe or the version changed since it was interrupted"
MODELS = "the models changed since it was interrupted"


@pytest.mark.parametrize(
    "recipe", [{"seed": 1}, {"out_type": "Q5_0"}, {"method": "linear"}], ids=str
)
def test_another_recipe_starts_anew(killed: Interrupted, recipe: dict[str, Any]) -> None:
    if recipe.get("method") == killed.case.recipe["method"]:
        recipe = {"parameters": {"weight": 0.25}}
    elif "method" in recipe:
        recipe = {"method": "task_arithmetic", "parameters": None}
    assert killed.start_anew(recipe=recipe) == RECIPE
    assert set(killed.case.outputs()) == set(killed.expected)


def rewrite(path: Path) -> None:
    write_gguf(path, wide_tensors(3, wide_tensors(0)))


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def replace_by_copy(path: Path) -> None:
    """The same bytes and times, and yet another file."""
    shutil.copy2(path, f"{path}.new")
    os.replace(f"{path}.new", path)


@pytest.mark.parametrize("change", [rewrite, touch, replace_by_copy])
def test_another_input_starts_anew(killed: Interrupted, change: Callable[[Path], None]) -> None:
    change(Path(killed.case.recipe["models"][1]))
    assert killed.start_anew() == MODELS
    assert (killed.case.outputs() == killed.expected) == (change is not rewrite)


@pytest.mark.parametrize("wing", [*DECIDING])
def test_an_edited_module_is_another_origin(tmp_path: Path, wing: str) -> None:
    """Only kernels counted: parts made by other Python code were taken over."""
    copy = tmp_path / "edgemerge"
    for name in DECIDING:
        shutil.copytree(PACKAGE / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    before = hash_sources(copy)
    assert before == hash_sources(PACKAGE)
    hash_sources.cache_clear()
    edited = max((copy / wing).rglob("*.py"))
    edited.write_text(edited.read_text() + "\n")
    assert hash_sources(copy) != before


def test_every_wing_that_decides_is_there() -> None:
    """A wing that is renamed, or not in an installed wheel, must not silently hash to nothing."""
    assert all(list((PACKAGE / wing).rglob("*.py")) for wing in DECIDING)


def test_another_merge_does_not_take_what_is_there_already(killed: Interrupted) -> None:
    """Without --force the newcomer is refused, and what was interrupted can still go on."""
    first = killed.case.folder / min(killed.expected)
    first.write_bytes(b"precious")
    for recipe in ({}, {"seed": 1}):
        answer = killed.crasher.run(killed.case, recipe=recipe)
        assert answer["error"] == f"{first}: exists already; choose another name or give --force"
        assert first.read_bytes() == b"precious"
    assert killed.take_over(force=True) == (N_TENSORS, 0)


# -- progress --------------------------------------------------------------------------------------


def test_progress_begins_with_what_is_taken_over(killed: Interrupted) -> None:
    given = dict(killed.case.recipe)
    models = [(path, None) for path in given.pop("models")]
    recipe = make_recipe(given.pop("method"), models, **given)
    flip_bit(killed.part, killed.part.stat().st_size - 100)
    seen: list[tuple[int, int]] = []
    report = merge(
        recipe,
        killed.case.folder / "out.gguf",
        progress=lambda *at: seen.append(at),
        **killed.case.options,
    )
    assert report.damaged_tensors == 1
    (total,) = {total for _, total in seen}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert 0 < seen[0][0] < total
    assert seen[-1] == (total, total)
    assert report.read_bytes < total / 2


def test_another_rotation_is_another_input(tmp_path: Path) -> None:
    """config.json has what is neither metadata nor weights, as factors of a rotation or of rows."""
    model = tmp_path / "model"
    shutil.copytree(ARCHITECTURES / "llama", model)
    config = json.loads((model / "config.json").read_text())
    found = []
    for factor in (8.0, 8.0, 32.0):
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
        (model / "config.json").write_text(json.dumps(config))
        the_plan = plan(make_recipe("passthrough", [(str(model), None)]))
        with closing(open_model(model)) as source:
            found.append(find_fingerprint(the_plan, [], [], [source], []).inputs)
    assert found[0] == found[1] != found[2]

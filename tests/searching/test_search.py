from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("optuna")

from edgemerge.errors import FormatError, OutputError, RecipeError
from edgemerge.recipe.searches import Choices, Range, load_search
from edgemerge.runtime.evaluation.tasks import read_task
from edgemerge.runtime.llama import Model
from edgemerge.searching.examiner import Examiner
from edgemerge.searching.model_file import ModelFile
from edgemerge.searching.objective import Figures, Objective
from edgemerge.searching.search import Limits, Search, find_best
from edgemerge.searching.trials import Trial, Trials
from edgemerge.types import ignore_parts
from tests.support.searches import RECIPE, write_search

pytestmark = pytest.mark.llama


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_search(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ignore(_done: int, _total: int) -> None:
    pass


@contextmanager
def open_search(
    name: str = "trials", *, seed: int = 0, begin_part: Any = ignore_parts
) -> Iterator[Search]:
    recipe = load_search(Path("recipe.yml"))
    task = read_task("questions", "questions.jsonl")
    examiner = Examiner([task], {}, held_out=1 / 3, seed=seed, n_ctx=None)
    with (
        closing(Trials(Path(name), recipe.spaces, {"seed": seed}, seed)) as trials,
        ModelFile(Path("model.gguf"), memory=None, threads=1) as model_file,
    ):
        yield Search(
            recipe,
            trials,
            model_file,
            examiner,
            Objective({"questions": 1.0}, {}),
            lambda path: Model(path, n_threads=1),
            begin_part,
        )


def outcome(trials: list[Trial]) -> list[Any]:
    """All of the trials but their times."""
    return [(one.number, one.values, one.figures, one.scores) for one in trials]


def test_the_start_comes_first_and_limits_end_a_search() -> None:
    with open_search() as search:
        assert search.run(Limits(5), ignore) == "all 5 trials are made"
        found = search.trials.finished
        assert found[0].values == {"models[0].weight": 0.5, "lambda(mlp)[0]": 1.0}
        assert len({str(one.values) for one in found}) == 5
        assert all(0 <= one.values["models[0].weight"] <= 1 for one in found)  # type: ignore[operator]
        assert search.run(Limits(99, seconds=1e-3), ignore) == "the time is up"
        assert search.run(Limits(99, patience=1), ignore).endswith("no better than the best")


def test_each_word_is_tried_with_the_values_of_the_start_and_with_others() -> None:
    spaces = (
        Range("lambda", 0.0, 2.0, is_log=False, start=1.0),
        Choices("merge_method", ("ties", "linear", "tsv"), "linear"),
        Choices("sign", (True, False), True),
    )
    with closing(Trials(Path("words.trials"), spaces, {}, 0)) as trials:
        drawn = []
        for _ in range(16):
            draw = trials.draw()
            trials.keep(draw.finish(1.0, "no such values"))
            drawn.append((draw.values["merge_method"], draw.values["sign"], draw.values["lambda"]))
    assert drawn[:4] == [
        ("linear", True, 1.0),
        ("ties", True, 1.0),
        ("tsv", True, 1.0),
        ("linear", False, 1.0),
    ]
    even = drawn[4:]
    assert len({value for _, _, value in even}) == len(even)
    assert [word for word, _, _ in even] == ["linear", "tsv", "ties"] * 4  # as often as the others


def test_half_of_the_trials_are_stopped_early_but_never_the_start() -> None:
    with open_search() as search:
        search.run(Limits(10), ignore)
        reached = [len(one.figures) for one in search.trials.finished]
    assert reached[0] == 3
    assert 1 in reached or 2 in reached
    assert set(reached) <= {1, 2, 3}


@pytest.mark.parametrize("rng_seed", range(2))
def test_a_search_that_is_killed_again_and_again_ends_as_one_that_is_not(rng_seed: int) -> None:
    with open_search("whole") as search:
        search.run(Limits(6), ignore)
        best = search.best()
        look = search.look(best)
        expected = outcome(search.trials.finished)
    rng = random.Random(rng_seed)

    def begin_part(_label: str, _unit: str | None = None) -> Callable[[int, int], None]:
        if rng.random() < 0.3:
            raise Killed
        return ignore

    kills = 0
    while True:
        with suppress(Killed), open_search("killed", begin_part=begin_part) as search:
            search.run(Limits(6), ignore)
            again = search.look(search.best())
            break
        kills += 1
    assert kills > 2
    with open_search("killed") as search:
        assert outcome(search.trials.finished) == expected
        assert search.best().number == best.number
    assert again == look


def test_another_seed_draws_others_after_the_start() -> None:
    found = []
    for seed in (0, 1):
        with open_search(f"trials-{seed}", seed=seed) as search:
            search.run(Limits(2), ignore)
            found.append([one.values for one in search.trials.finished])
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_held_out_questions_are_asked_once_for_a_trial() -> None:
    asked: list[str] = []

    def begin_part(label: str, _unit: str | None = None) -> Callable[[int, int], None]:
        asked.append(label)
        return ignore

    with open_search() as search:
        search.run(Limits(3), ignore)
    with open_search(begin_part=begin_part) as search:
        first = search.look(search.trials.finished[1])
        assert asked.count("questions") == 2  # the start, and that trial
        assert search.look(search.trials.finished[1]) == first
        second = search.look(search.trials.finished[0])
        assert asked.count("questions") == 3
    assert (first["earlier"], second["earlier"]) == (0, 1)
    assert second["verdicts"][0]["difference"] == 0


def test_values_that_the_method_refuses_are_a_trial_without_a_score() -> None:
    recipe = RECIPE.replace("task_arithmetic", "ties").replace("weight: {", "weight: 1, density: {")
    Path("recipe.yml").write_text(recipe.replace("[0.0, 1.0]", "[0.5, 1.5], start: 1.2"))
    with (
        open_search() as search,
        pytest.raises(RecipeError, match=r"density of a\.gguf is 1\.2; it must"),
    ):
        search.run(Limits(2), ignore)  # the start must be possible
    Path("recipe.yml").write_text(recipe.replace("[0.0, 1.0]", "[0.5, 1.5], start: 0.5"))
    with open_search("other") as search:
        search.run(Limits(4), ignore)
        found = search.trials.finished
    assert any("it must be a number from 0 to 1" in one.refusal for one in found)
    assert all(one.score is None for one in found if one.refusal)


def test_trials_of_another_search_are_left_alone() -> None:
    with open_search() as search:
        search.run(Limits(2), ignore)
    before = Path("trials").read_bytes()
    said = "holds trials of a search with other seed"
    with pytest.raises(OutputError, match=said), open_search(seed=1):
        pass
    assert Path("trials").read_bytes() == before


def test_two_searches_do_not_write_one_file() -> None:
    said = "another search is writing it"
    with open_search(), pytest.raises(OutputError, match=said), open_search():
        pass
    with open_search() as search:  # the first one is over
        assert search.trials.finished == []


def test_files_that_are_no_trials_are_refused_as_they_are() -> None:
    import sqlite3

    Path("text").write_text("no database at all, but long enough to look at")
    with closing(sqlite3.connect("other")) as database:
        database.execute("create table addresses (name text)")
        database.commit()
    for name in ("text", "other"):
        before = Path(name).read_bytes()
        with pytest.raises(FormatError, match="is no file of trials"), open_search(name):
            pass
        assert Path(name).read_bytes() == before


def trial(number: int, score: float, general: float, rungs: int = 3) -> Trial:
    figures = [Figures({"t": score, "general": general})] * rungs
    return Trial(number, {}, figures, [score] * rungs, 1.0)


def test_the_best_keeps_what_is_to_be_kept() -> None:
    objective = Objective({"t": 1, "general": 0}, {"general": 2})
    start, worse, lossy, half = (
        trial(0, 60, 40),
        trial(1, 59, 40),
        trial(2, 70, 37),
        trial(3, 80, 40, rungs=2),
    )
    good, equal = trial(4, 65, 38), trial(5, 65, 44)
    assert find_best([start, worse, lossy, half], objective).number == 0
    assert find_best([start, worse, lossy, half, good, equal], objective).number == 4

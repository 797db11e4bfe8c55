"""The search: draw values, merge, ask on few questions first, and at the end on those held out.

Read top-down. `Search.run` makes trials until a limit is reached. `Search.look` then asks the start and the
best trial the held-out questions, once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from edgemerge.errors import MismatchError, RecipeError
from edgemerge.recipe.searches import SearchRecipe
from edgemerge.runtime.evaluation.answers import Answers
from edgemerge.runtime.evaluation.likelihood import NoNumbers
from edgemerge.runtime.evaluation.paired import without_infinity
from edgemerge.runtime.llama import Model
from edgemerge.searching.examiner import Examiner
from edgemerge.searching.model_file import ModelFile
from edgemerge.searching.objective import CLOSE, Objective, sum_up
from edgemerge.searching.portions import RUNGS
from edgemerge.searching.trials import Draw, Trial, Trials
from edgemerge.searching.verdict import judge, mean_verdict
from edgemerge.types import BeginPart, Progress, Setting

__all__ = ["Limits", "Search", "find_best"]


@dataclass(frozen=True, slots=True)
class Limits:
    """When a search ends.

    Attributes
    ----------
    trials : int
        Trials in all, the start included.
    seconds : float or None
        Of all trials of all runs; the trial at hand is finished.
    patience : int or None
        Trials in a row that are no better than the best.
    """

    trials: int
    seconds: float | None = None
    patience: int | None = None


@dataclass(frozen=True, slots=True)
class Search:
    """All that a search needs; each part is open.

    Attributes
    ----------
    recipe : SearchRecipe
        What is to be found.
    trials : Trials
        Those that are over.
    model_file : ModelFile
        Where the models of trials are made.
    examiner : Examiner
        The questions.
    objective : Objective
        What is wanted.
    load : callable
        Loads a model file.
    begin_part : callable
        Called before parts of a trial.
    """

    recipe: SearchRecipe
    trials: Trials
    model_file: ModelFile
    examiner: Examiner
    objective: Objective
    load: Callable[[Path], Model]
    begin_part: BeginPart

    def run(self, limits: Limits, progress: Progress) -> str:
        """Make trials until a limit is reached.

        Parameters
        ----------
        limits : Limits
            When to end.
        progress : callable
            Called with trials done and trials in all; may raise to stop.

        Returns
        -------
        str
            Why it ended, in a few words.

        Raises
        ------
        EdgemergeError
            The start cannot be merged or asked, or a disk failed.
        """
        finished = self.trials.finished
        while not (reason := self._end(finished, limits)):
            progress(len(finished), limits.trials)
            finished.append(self._try(finished))
        progress(len(finished), limits.trials)
        return reason

    def _end(self, finished: Sequence[Trial], limits: Limits) -> str:
        if len(finished) >= limits.trials:
            return f"all {limits.trials} trials are made"
        if limits.seconds is not None and sum(one.seconds for one in finished) >= limits.seconds:
            return "the time is up"
        if limits.patience is not None and finished:
            after = len(finished) - 1 - find_best(finished, self.objective).number
            if after >= limits.patience:
                return f"{after} trials were no better than the best"
        return ""

    def _try(self, finished: Sequence[Trial]) -> Trial:
        """Make one trial and keep it."""
        began = time.monotonic()
        draw = self.trials.draw()
        refusal = ""
        try:
            self._ask(draw, finished)
        except (RecipeError, MismatchError, NoNumbers) as error:  # these values; others may do
            if draw.number == 0:
                raise
            refusal = str(error)
        return self.trials.keep(draw.finish(time.monotonic() - began, refusal))

    def _ask(self, draw: Draw, finished: Sequence[Trial]) -> None:
        """Merge, then ask rung by rung until the trial is stopped."""
        self.model_file.make(self.recipe.recipe(draw.values), self.begin_part)
        answers = Answers()
        with self.load(self.model_file.path) as model:
            for rung in range(len(RUNGS)):
                self.examiner.ask_rung(model, rung, answers, self.begin_part)
                figures = sum_up(answers, self.model_file.n_bytes)
                start = finished[0].figures[rung] if finished else figures
                if not draw.report(figures, self.objective.score(figures, start)):
                    break

    def best(self) -> Trial:
        """Return the best trial so far, which is the start where none was better."""
        return find_best(self.trials.finished, self.objective)

    # -- the end ----------------------------------------------------------------------------------

    def look(self, best: Trial) -> dict[str, Any]:
        """Ask the start and the best trial the held-out questions, and keep what was found.

        Where the same trial was asked before, that is returned.

        Returns
        -------
        dict
            As JSON: `number` of the trial, `trials` made before, `earlier` looks at the questions,
            `verdicts` and the `mean` of the tasks that have a weight. An unknown end of an interval is None.
        """
        looks = self.trials.looks
        for known in looks:
            if known["number"] == best.number:
                return known
        start = self._last_answers(self.recipe.start())
        answers = start if best.number == 0 else self._last_answers(best.values)
        verdicts = judge(start, answers, self.objective)
        mean = mean_verdict(verdicts, self.objective.weights)
        found = {
            "number": best.number,
            "trials": len(self.trials.finished),
            "earlier": len(looks),
            "verdicts": [without_infinity(asdict(one)) for one in verdicts],
            "mean": None if mean is None else asdict(mean),
        }
        self.trials.note_look(found)
        return found

    def _last_answers(self, values: Mapping[str, Setting]) -> Answers:
        self.model_file.make(self.recipe.recipe(values), self.begin_part)
        with self.load(self.model_file.path) as model:
            return self.examiner.ask_last(model, self.begin_part)

    def best_text(self, best: Trial, comments: Sequence[str]) -> str:
        """Write the recipe of a trial as YAML, with comments at its top."""
        document = self.recipe.fill(best.values)
        head = "".join(f"# {' '.join(line.split())}\n" for line in comments)
        return head + yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def find_best(finished: Sequence[Trial], objective: Objective) -> Trial:
    """Find the trial of the highest score that was asked everything and keeps what is to be kept.

    Of equal ones it is the first.

    Parameters
    ----------
    finished : sequence of Trial
        With the start, which was asked everything.
    objective : Objective
        Tells what is to be kept.
    """
    start = best = finished[0]
    for one in finished:
        if one.score is None or not objective.keeps_all(one.figures, start.figures):
            continue
        if one.score > (best.score or 0.0) + CLOSE:
            best = one
    return best

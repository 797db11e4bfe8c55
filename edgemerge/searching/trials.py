"""The trials of a search: drawn by optuna, kept in its SQLite file.

The values of trial k follow from the seed, k and the trials before it. A trial is written when it is over,
in one transaction. So a power cut costs the trial at hand, and its successor draws the same values again:
a search that was killed ends as one that was not.

Sampler: tree-structured Parzen estimators (Bergstra et al., 2011), all values together. optuna's CMA-ES keeps
its state in the file as pickle, which is never read here. Pruner: asynchronous successive halving (Li et al.,
arXiv 1810.05934).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemerge.errors import FormatError, OutputError, RuntimeFailure
from edgemerge.recipe.searches import Choices, Range, Space
from edgemerge.searching.objective import Figures
from edgemerge.types import Setting

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial as LiveTrial

__all__ = ["Draw", "Trial", "Trials", "check_optuna", "first_values"]

STUDY = "edgemerge"
STARTUP = 10  # at least so many trials have values that are drawn evenly, after the first ones
EACH = 4  # of them at least have one and the same word
HALVING = 2  # of the trials that reach a rung, one in so many goes on
HEADER, LOOKS, OUTPUTS = "header", "looks", "outputs"
STEPS = (1, 2, 4)  # of the rungs, as the pruner counts


def check_optuna() -> None:
    """Make sure that trials can be drawn.

    Raises
    ------
    RuntimeFailure
        optuna is not installed.
    """
    if find_spec("optuna") is None:
        raise RuntimeFailure(
            "a search needs optuna: install it with pip install 'edgemerge[run,search]'"
        )


@dataclass(frozen=True, slots=True)
class Trial:
    """A trial that is over.

    Attributes
    ----------
    number : int
        From 0, the start.
    values : mapping of str to Setting
        By the names of the spaces.
    figures : sequence of Figures
        After each rung that it reached; empty where its settings were refused.
    scores : sequence of float
        After each of these rungs.
    seconds : float
        What it took.
    refusal : str
        Why its settings were refused; else empty.
    """

    number: int
    values: Mapping[str, Setting]
    figures: Sequence[Figures]
    scores: Sequence[float]
    seconds: float
    refusal: str = ""

    @property
    def score(self) -> float | None:
        """Of all questions; None where it was not asked all."""
        return self.scores[-1] if len(self.scores) == len(STEPS) and not self.refusal else None


class Draw:
    """The trial at hand."""

    def __init__(self, study: Study, live: LiveTrial, values: Mapping[str, Setting]) -> None:
        self._study, self._live = study, live
        self.number = live.number
        self.values = values
        self.figures: list[Figures] = []
        self._score = 0.0

    def report(self, figures: Figures, score: float) -> bool:
        """Note what it has after a rung; return whether it is to go on to the next."""
        step = STEPS[len(self.figures)]
        self.figures.append(figures)
        self._score = score
        self._live.report(score, step)
        is_last = len(self.figures) == len(STEPS)
        # The start is what others are compared with.
        return not is_last and (self.number == 0 or not self._live.should_prune())

    def finish(self, seconds: float, refusal: str = "") -> FrozenTrial:
        """End it, and return it as it is to be kept."""
        from optuna.trial import TrialState

        self._live.set_user_attr("figures", [asdict(one) for one in self.figures])
        self._live.set_user_attr("seconds", round(seconds, 3))
        if refusal:
            self._live.set_user_attr("refusal", refusal)
            return self._study.tell(self._live, state=TrialState.FAIL)
        if len(self.figures) < len(STEPS):
            return self._study.tell(self._live, state=TrialState.PRUNED)
        return self._study.tell(self._live, self._score)


class Trials:
    """All trials of a search.

    Parameters
    ----------
    path : Path
        The SQLite file; made if there is none.
    spaces : sequence of Space
        What is to be found.
    header : mapping
        All that the trials depend on, as JSON.
    seed : int
        Of the draws.

    Raises
    ------
    OutputError
        The file has trials of another search, another process is writing it, or it cannot be written.
    FormatError
        It is damaged, or no file of trials.
    """

    def __init__(
        self, path: Path, spaces: Sequence[Space], header: Mapping[str, Any], seed: int
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.path, self._spaces, self._seed = path, spaces, seed
        self._stack = ExitStack()
        try:
            self._lock()
            self._kept = self._open(json.loads(json.dumps(header)))
            with self._trouble():
                self._frozen = list(self._kept.trials)
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        """Make the file, and keep others from writing it; SQLite's own locks last a transaction."""
        try:
            file = self._stack.enter_context(self.path.open("ab"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                "another search is writing it; wait for that one", path=self.path
            ) from error
        except OSError as error:
            raise OutputError(f"cannot be written ({error.strerror})", path=self.path) from error

    def _open(self, header: dict[str, Any]) -> Study:
        import optuna

        self._check_file()
        with self._trouble():
            storage = optuna.storages.RDBStorage(
                "sqlite://",
                engine_kwargs={"creator": lambda: sqlite3.connect(self.path, timeout=60)},
            )
            self._stack.callback(storage.remove_session)
            study = optuna.create_study(
                storage=storage, study_name=STUDY, direction="maximize", load_if_exists=True
            )
            found = study.user_attrs.get(HEADER)
            if found is None:
                study.set_user_attr(HEADER, header)
        if found not in (None, header):
            other = [key for key in header if found.get(key) != header[key]]
            raise OutputError(
                f"holds trials of a search with other {' and '.join(other) or 'fields'}; finish that with "
                "its own command, choose another -o, or remove the file",
                path=self.path,
            )
        return study

    def _check_file(self) -> None:
        """Refuse what is there and no file of trials, before optuna adds its tables to it."""
        with self._trouble(), closing(sqlite3.connect(self.path, timeout=60)) as database:
            tables = [name for (name,) in database.execute("select name from sqlite_master")]
            (state,) = database.execute("pragma quick_check(1)").fetchone()
            if state != "ok" or (tables and "studies" not in tables):
                raise ValueError(state if state != "ok" else "a database of another kind")

    @contextmanager
    def _trouble(self) -> Iterator[None]:
        """Turn what SQLite and optuna say of a file into one sentence."""
        from optuna.exceptions import OptunaError
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (
            OptunaError,
            SQLAlchemyError,
            sqlite3.Error,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            reason = error.__cause__ or error
            reason = getattr(reason, "orig", None) or reason
            text = " ".join(str(reason).split())[:200]
            if isinstance(reason, sqlite3.OperationalError):
                raise OutputError(f"cannot be written ({text})", path=self.path) from error
            raise FormatError(
                f"is no file of trials that can be read ({text}); remove it, or choose another -o",
                path=self.path,
            ) from error

    # -- what was found ---------------------------------------------------------------------------

    @property
    def finished(self) -> list[Trial]:
        """All trials that are over, in order."""
        return [_as_trial(one) for one in self._frozen]

    @property
    def looks(self) -> list[dict[str, Any]]:
        """What was found when the held-out questions were asked, as JSON; in order."""
        found: list[dict[str, Any]] = self._kept.user_attrs.get(LOOKS, [])
        return found

    def note_look(self, look: Mapping[str, Any]) -> None:
        """Keep what was found with the held-out questions."""
        with self._trouble():
            self._kept.set_user_attr(LOOKS, [*self.looks, look])

    @property
    def outputs(self) -> list[str]:
        """SHA-256 of all that the search has written beside its trials."""
        found: list[str] = self._kept.user_attrs.get(OUTPUTS, [])
        return found

    def note_output(self, sha256: str) -> None:
        """Keep the hash of what is about to be written, so that another run knows it for its own."""
        if sha256 not in self.outputs:
            with self._trouble():
                self._kept.set_user_attr(OUTPUTS, [*self.outputs, sha256])

    # -- drawing ----------------------------------------------------------------------------------

    def draw(self) -> Draw:
        """Draw the next trial: the start first, then the start with each other word."""
        import optuna

        number, first = len(self._frozen), first_values(self._spaces)
        words = [space for space in self._spaces if isinstance(space, Choices)]
        n_even = max([STARTUP, *(EACH * len(space.options) for space in words)])
        digest = hashlib.sha256(f"{self._seed} {number}".encode()).digest()
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=len(first) + n_even,
            multivariate=True,
            seed=int.from_bytes(digest[:4], "little"),
        )
        pruner = optuna.pruners.SuccessiveHalvingPruner(
            min_resource=STEPS[0], reduction_factor=HALVING
        )
        study = optuna.create_study(sampler=sampler, pruner=pruner, direction="maximize")
        study.add_trials(self._frozen)
        if number < len(first):
            study.enqueue_trial(first[number])
        elif number < len(first) + n_even:  # each word as often as the others
            study.enqueue_trial(
                {space.name: space.options[number % len(space.options)] for space in words}
            )
        live = study.ask({space.name: _distribution(space) for space in self._spaces})
        return Draw(study, live, {space.name: live.params[space.name] for space in self._spaces})

    def keep(self, frozen: FrozenTrial) -> Trial:
        """Write a finished trial to the disk."""
        with self._trouble():
            self._kept.add_trial(frozen)
        self._frozen.append(frozen)
        return _as_trial(frozen)

    def close(self) -> None:
        """Close the file."""
        self._stack.close()


def first_values(spaces: Sequence[Space]) -> list[dict[str, Setting]]:
    """List the values of the first trials: the start, then the start with each other word.

    A method that the even draws meet once, with poor values, would hardly be drawn again.

    Examples
    --------
    >>> first_values([Range("lambda", 0.0, 1.0, False, 0.5), Choices("type", ("Q8_0", "F16"), "Q8_0")])
    [{'lambda': 0.5, 'type': 'Q8_0'}, {'lambda': 0.5, 'type': 'F16'}]
    """
    start = {space.name: space.start for space in spaces}
    words = [space for space in spaces if isinstance(space, Choices)]
    return [start] + [
        start | {space.name: word}
        for space in words
        for word in space.options
        if word != space.start
    ]


def _distribution(space: Space) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if isinstance(space, Range):
        return FloatDistribution(space.low, space.high, log=space.is_log)
    return CategoricalDistribution(space.options)


def _as_trial(frozen: FrozenTrial) -> Trial:
    return Trial(
        frozen.number,
        frozen.params,
        [Figures(**one) for one in frozen.user_attrs["figures"]],
        [frozen.intermediate_values[step] for step in sorted(frozen.intermediate_values)],
        frozen.user_attrs["seconds"],
        frozen.user_attrs.get("refusal", ""),
    )

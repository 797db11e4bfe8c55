"""Everything edgemerge raises on purpose.

::

    EdgemergeError                the command line prints str(e) and exits 1
    ├─ RecipeError(path, field)       the request is wrong
    ├─ FormatError(path, tensor)      the file is wrong: truncated, bad header, unsupported type
    ├─ MismatchError(tensor, shapes)  the models do not fit together
    ├─ BudgetError(needed, budget)    carries the smallest budget that works
    ├─ OutputError(path)              the result cannot be written there
    ├─ VerificationError(path)        the file is not what was written, or not what was signed
    ├─ ClusterError                   other machines cannot do the work, or not any more
    └─ RuntimeFailure(detail)         llama.cpp refused, or the extra that holds it is missing

Each message is one sentence: what is wrong, where, what to do about it.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from edgemerge.shown_paths import shown_path

__all__ = [
    "BudgetError",
    "ClusterError",
    "EdgemergeError",
    "FormatError",
    "MismatchError",
    "OutputError",
    "RecipeError",
    "RuntimeFailure",
    "Stopped",
    "VerificationError",
]


class EdgemergeError(Exception):
    """Base of all errors that edgemerge raises on purpose; each can be pickled, so crosses processes."""

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (type(self), self.args, vars(self))


class Stopped(Exception):
    """Another thread failed, or the user interrupted: give up at once.

    Only threads of a merge raise it, and the thread that waits for them takes it for the end of the work.
    """


class RecipeError(EdgemergeError):
    """The request is wrong: an unknown method, a missing weight, a value out of range."""

    def __init__(
        self, message: str, *, path: str | PathLike[str] | None = None, field: str | None = None
    ) -> None:
        self.path = Path(path) if path is not None else None
        self.field = field
        super().__init__(f"{shown_path(path)}: {message}" if path is not None else message)


class FormatError(EdgemergeError):
    """A model file is damaged, hostile or of a kind that edgemerge does not read."""

    def __init__(
        self, message: str, *, path: str | PathLike[str], tensor: str | None = None
    ) -> None:
        self.path = Path(path)
        self.tensor = tensor
        shown = shown_path(path)
        where = f"{shown}: tensor {tensor!r}" if tensor is not None else shown
        super().__init__(f"{where}: {message}")


class MismatchError(EdgemergeError):
    """The models of one merge do not fit together."""

    def __init__(
        self, message: str, *, tensor: str | None = None, shapes: tuple[object, ...] = ()
    ) -> None:
        self.tensor = tensor
        self.shapes = shapes
        super().__init__(message)


class BudgetError(EdgemergeError):
    """The memory budget cannot work; `needed` is the smallest one that does, in bytes."""

    def __init__(self, message: str, *, needed: int, budget: int) -> None:
        self.needed = needed
        self.budget = budget
        super().__init__(message)


class OutputError(EdgemergeError):
    """The result cannot be written: it exists already, or the disk has no room."""

    def __init__(self, message: str, *, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        super().__init__(f"{path}: {message}")


class VerificationError(EdgemergeError):
    """A file is not what was written, not what was signed, or nobody can tell."""

    def __init__(self, message: str, *, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        super().__init__(f"{shown_path(path)}: {message}")


class ClusterError(EdgemergeError):
    """The machines of a cluster cannot do the work; the same call may go on later."""


class RuntimeFailure(EdgemergeError):
    """llama.cpp refused a model, or the extra that holds it is not installed."""

    def __init__(self, message: str, *, detail: str = "") -> None:
        self.detail = detail
        super().__init__(message)


def _restore(
    kind: type[EdgemergeError], args: tuple[object, ...], attributes: dict[str, object]
) -> EdgemergeError:
    """Make an error again from its parts: pickle would call its class without the keywords."""
    error = kind.__new__(kind, *args)
    vars(error).update(attributes)
    return error

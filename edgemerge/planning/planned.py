"""The result of a merge that is planned and not done: all of a model but its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.types import FileState, Plan, TensorSpec, UInt8

__all__ = ["PlannedSource"]


class PlannedSource:
    """A `Source` with the tensors and metadata that a plan decides; no tensor can be read.

    Parameters
    ----------
    the_plan : Plan
        Of the merge.
    path : Path
        What its result is called.
    """

    def __init__(self, the_plan: Plan, path: Path) -> None:
        self.path = path
        self.architecture = str(get_value(the_plan.metadata, "general.architecture"))
        self._metadata = the_plan.metadata
        self._specs = {job.out.name: job.out for job in the_plan.jobs}

    def specs(self) -> Mapping[str, TensorSpec]:
        """All tensors by GGUF name."""
        return self._specs

    def metadata(self) -> Mapping[str, bytes]:
        """GGUF key -> typed value."""
        return self._metadata

    def read_rows(self, name: str, start: int, stop: int, out_u8: UInt8) -> NoReturn:
        """Raise FormatError."""
        raise FormatError(
            "is the result of a stage that is not made yet, and this plan depends on its values; "
            "merge the stages one by one, each as a recipe of its own",
            path=self.path,
            tensor=name,
        )

    def forget(self, name: str, n_rows: int | None = None) -> None:
        """Do nothing."""

    def notes(self) -> Sequence[str]:
        """Say nothing."""
        return ()

    def work_bytes(self) -> int:
        """Take nothing: rows go straight to where they are read into."""
        return 0

    def states(self) -> Sequence[FileState]:
        """Return nothing."""
        return ()

    def check_unchanged(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

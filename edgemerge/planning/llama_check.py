"""Will llama.cpp run what is about to be written? Asked of the header, before the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from edgemerge.formats.llama_rules import find_violations
from edgemerge.types import Source, TensorJob

__all__ = ["check_runs"]


def check_runs(metadata: Mapping[str, bytes], jobs: Sequence[TensorJob], base: Source) -> list[str]:
    """Check an output's header by llama.cpp's own rules.

    A GGUF that breaks a rule already keeps its fault, and the user is told: it may be for another
    program. Of a directory no GGUF is made that cannot be loaded.

    Parameters
    ----------
    metadata : mapping of GGUF key to typed value
        Of the output.
    jobs : sequence of TensorJob
        All its tensors.
    base : Source
        The model that the metadata is from.

    Returns
    -------
    list of str
        One sentence for each fault that the base has too, or that only some texts bring out.

    Raises
    ------
    FormatError
        llama.cpp would abort at the output, and the base is not such a file itself.
    """
    specs = {job.out.name: job.out for job in jobs}
    found = find_violations(metadata, specs, base.architecture)
    if not found:
        return []
    known: set[str] = set()
    if not base.path.is_dir():
        known = {str(v) for v in find_violations(base.metadata(), base.specs(), base.architecture)}
    for violation in found:
        if str(violation) not in known and not violation.depends_on_text:
            raise replace(violation, is_mended=False).error(base.path)
    return [f"llama.cpp will not run the output as it is: it {violation}" for violation in found]

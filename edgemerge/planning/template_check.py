"""Can Jinja read the chat template of what is about to be written? Asked before the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgemerge.finding.cache import folder_name
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.planning.vocabulary import TEMPLATE_KEY
from edgemerge.types import Source

__all__ = ["check_template"]


def check_template(metadata: Mapping[str, bytes], sources: Sequence[Source]) -> list[str]:
    """Say that an output's chat template is broken, and whose it is; it is copied all the same.

    Parameters
    ----------
    metadata : mapping of GGUF key to typed value
        Of the output.
    sources : sequence of Source
        The models that it may be from; one of none is the recipe's.
    """
    template = _text_of(metadata)
    if not template:
        return []
    # Only a template pays for the import.
    from edgemerge.formats.template_process import find_template_fault

    if (fault := find_template_fault(template)) is None:
        return []
    owners = [one for one in sources if _text_of(one.metadata()).strip() == template.strip()]
    whose = f"{folder_name(owners[0].path)}: its chat template" if owners else "the chat_template"
    return [
        f"{whose} is no Jinja ({fault}), so run, chat and serve will refuse the output; give another as "
        "chat_template of a recipe"
    ]


def _text_of(metadata: Mapping[str, bytes]) -> str:
    found = get_value(metadata, TEMPLATE_KEY)
    return found if isinstance(found, str) else ""

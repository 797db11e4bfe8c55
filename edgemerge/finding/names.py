"""Names of models on the Hugging Face hub: `org/name`, `org/name@revision`, `org/name:Q4_K_M`."""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["HubName", "read_hub_name"]

MAX_LENGTH = 96  # of org/name, as the hub has it (huggingface_hub's `validate_repo_id`)
FILE_ENDS = (".gguf", ".safetensors", ".yml", ".yaml", ".json", ".bin", ".pt", ".pth")

_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_NAME = re.compile(
    rf"(?P<repo>{_WORD}/{_WORD})(?::(?P<type>{_WORD}))?(?:@(?P<revision>[^@:\s]+))?(?::(?P<late>{_WORD}))?",
    re.ASCII,
)


class HubName(NamedTuple):
    """A model on the hub."""

    repo: str  # org/name
    revision: str | None = None  # a branch, tag or commit; None: main
    file_type: str | None = None  # which GGUF of the repository, as in Q4_K_M

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}" + (f":{self.file_type}" if self.file_type else "")


def read_hub_name(text: str, revision: str | None = None) -> HubName | None:
    """Read a name; None where the text can be none.

    Parameters
    ----------
    text : str
        `org/name[:TYPE][@REVISION]`, in either order of type and revision.
    revision : str, optional
        Stands for one in the text.
    """
    match = _NAME.fullmatch(text)
    if match is None or (match["type"] and match["late"]):
        return None
    repo = match["repo"]
    if len(repo) > MAX_LENGTH or "--" in repo or ".." in repo or repo.endswith(FILE_ENDS):
        return None
    return HubName(repo, match["revision"] or revision, match["type"] or match["late"])

"""What llama.cpp would die of, or refuse without saying why: one finding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from edgemerge.errors import FormatError

__all__ = ["EXPORT_AGAIN", "Violation"]

EXPORT_AGAIN = "export the model again with llama.cpp's converter"


@dataclass(frozen=True, slots=True)
class Violation:
    """One rule of llama.cpp's that a model breaks.

    Attributes
    ----------
    what : str
        What the model has or lacks, to stand behind its name.
    remedy : str
        What to do about it where `edgemerge convert` does not mend it.
    is_mended : bool
        Whether `edgemerge convert` writes a file without it.
    tensor : str, optional
        GGUF name of the tensor that it is about.
    depends_on_text : bool
        Whether llama.cpp loads the model, and aborts at some texts only.
    """

    what: str
    remedy: str = EXPORT_AGAIN
    is_mended: bool = False
    tensor: str | None = None
    depends_on_text: bool = False

    def error(self, path: Path) -> FormatError:
        """Make the error for a model that was to be run.

        Parameters
        ----------
        path : Path
            Its file.
        """
        remedy = self.remedy
        if self.is_mended:
            remedy = f"make a file that runs with edgemerge convert {quote(str(path))} -o NEW.gguf"
        return FormatError(
            f"{self.what}, so llama.cpp cannot run it; {remedy}", path=path, tensor=self.tensor
        )

    def __str__(self) -> str:
        where = f"tensor {self.tensor!r} " if self.tensor else ""
        return f"{where}{self.what}"

"""The files that a model is in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from edgemerge.errors import FormatError, RuntimeFailure
from edgemerge.formats.gguf.kind import check_is_model
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.gguf.model import GgufFile, GgufModel
from edgemerge.formats.llama_rules import find_violations
from edgemerge.suggestions import suggest_path

__all__ = ["check_adapter", "check_writes", "find_fingerprint", "model_files", "open_gguf"]
__all__ += ["reads_whole"]

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# Architectures whose graphs assert what `llama_decode` alone does not give: an encoder's output, another
# model's layers.
_NEEDING_MORE = {
    "t5": "answers what its encoder has read (llama-cli runs it)",
    "eagle3": "guesses the next words of another model",
    "dflash": "guesses the next words of another model",
    "t5encoder": "reads for another model",
}
# Architectures for which llama.cpp keeps no cache (`create_memory` of src/llama-model.cpp): each text is
# computed as a whole. The last few write, but not word by word.
_WITHOUT_MEMORY = (
    "bert jina-bert-v2 jina-bert-v3 nomic-bert nomic-bert-moe neo-bert eurobert modern-bert"
)
_WITHOUT_MEMORY += " gemma-embedding wavtokenizer-dec dream llada llada-moe rnd1"
_SAMPLE, _N_SAMPLES = 1 << 16, 64  # bytes and places of a file that tell one model from another


def model_files(path: Path) -> list[Path]:
    """Files of a model that llama.cpp can be given: one, or all of those that it is split into.

    Parameters
    ----------
    path : Path
        A GGUF file; of a split model, any part.

    Raises
    ------
    RuntimeFailure, FormatError
        As of `open_gguf`.
    """
    with closing(open_gguf(path)) as source:
        return source.files()


def find_fingerprint(files: Sequence[Path]) -> str:
    """Tell models apart by their header, and by places all over their weights: all would take minutes.

    Parameters
    ----------
    files : sequence of Path
        Of the model, then its adapters.

    Raises
    ------
    OSError
        A file cannot be read.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            for i in range(_N_SAMPLES):
                file.seek(i * max(size - _SAMPLE, 0) // (_N_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
    return f"fp_{digest.hexdigest()[:12]}"


def open_gguf(path: Path) -> GgufModel:
    """Open a model's file by its header alone, before llama.cpp has to: bad files are named better here.

    Parameters
    ----------
    path : Path
        A GGUF file; of a split model, any part.

    Raises
    ------
    RuntimeFailure
        There is no such file, or it is a folder.
    FormatError
        It is no GGUF, is cut off or damaged, a part of it is missing, it is no model, or one at which
        llama.cpp would end the process.
    """
    _check_file(path)
    source = GgufModel(path)
    try:
        check_is_model(path, source.metadata())
        if source.architecture in _NEEDING_MORE:
            raise FormatError(
                f"is a {source.architecture} model, which only {_NEEDING_MORE[source.architecture]}; "
                "give a model that writes text by itself",
                path=path,
            )
        for violation in find_violations(source.metadata(), source.specs(), source.architecture):
            raise violation.error(path)
    except BaseException:
        source.close()
        raise
    return source


def reads_whole(source: GgufModel) -> bool:
    """Tell whether a model computes each text at once, with nothing kept of it, as encoders do."""
    return source.architecture in _WITHOUT_MEMORY.split()


def check_writes(path: Path) -> None:
    """Refuse a model that does not continue a text, for what generates and scores.

    Raises
    ------
    RuntimeFailure
        It embeds texts, or writes them in another way than word by word.
    """
    with closing(open_gguf(path)) as source:
        if reads_whole(source):
            raise RuntimeFailure(
                f"{path}: a {source.architecture} model does not continue a text: ask edgemerge serve for "
                "its embeddings, or give another model"
            )


def check_adapter(path: Path, model: Path) -> None:
    """See that a LoRA adapter is a sound GGUF by its header, before llama.cpp has to read it.

    Parameters
    ----------
    path : Path
        The adapter.
    model : Path
        The GGUF file that it is to be added to.

    Raises
    ------
    RuntimeFailure
        There is no such file, or it is a folder.
    FormatError
        It is no GGUF, is cut off or damaged, a delta, or one at which llama.cpp would end the process.
    """
    if path.is_dir():
        raise RuntimeFailure(
            f"{path}: is a folder; make a GGUF of it with llama.cpp's convert_lora_to_gguf.py first"
        )
    if not path.is_file():
        raise RuntimeFailure(f"{path}: there is no such file{suggest_path(path)}")
    with closing(GgufFile(path)) as file:
        if get_value(file.metadata, "general.type") == "delta":
            raise FormatError(
                "is a delta, which llama.cpp does not add; make a model of it: edgemerge convert BASE+DELTA",
                path=path,
            )
        if f"{EMBEDDING}.lora_a" in file.specs and _is_tied(model):
            # `build_lora_mm` of src/llama-graph.cpp finds the embedding's factors by the head's name, and
            # multiplies them in the order of an embedding: GGML_ASSERT(ggml_can_mul_mat(a, b)).
            raise FormatError(
                f"changes the embedding, which is the head of {model.name} too, and llama.cpp cannot add "
                "that; make a model of both: edgemerge convert MODEL+ADAPTER",
                path=path,
            )


def _is_tied(model: Path) -> bool:
    with closing(open_gguf(model)) as source:
        return HEAD not in source.specs()


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise RuntimeFailure(f"{path}: is a folder; make a GGUF of it with edgemerge convert first")
    if not path.is_file():
        raise RuntimeFailure(f"{path}: there is no such file{suggest_path(path)}")

"""Token ids of texts by a model's own vocabulary, through llama.cpp in a process of its own.

llama.cpp takes more memory than a merge's budget may have, and is loaded for the vocabulary alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgemerge.errors import RecipeError, RuntimeFailure
from edgemerge.formats.gguf.metadata import encode_value, get_value
from edgemerge.formats.gguf.writer import make_layout
from edgemerge.formats.json_file import read_object

__all__ = ["tokenize"]

SPACE_KEY = "tokenizer.ggml.add_space_prefix"
MARK = re.compile(rb'"prepend_scheme"\s*:\s*"first"')
MARK_BYTES = 256  # more than the mark has
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
SPM = "llama"  # tokenizer.ggml.model of SentencePiece, which begins texts with bos unless told otherwise


def tokenize(metadata: Mapping[str, bytes], texts: Sequence[str], path: Path) -> list[list[int]]:
    """Cut texts into tokens, each text with the token before it that begins texts of this model.

    Parameters
    ----------
    metadata : mapping of str to bytes
        The model's, with its vocabulary.
    texts : sequence of str
        What to cut.
    path : Path
        The model, for errors.

    Raises
    ------
    RecipeError
        llama-cpp-python is not installed.
    RuntimeFailure
        llama.cpp does not read the vocabulary.
    """
    if find_spec("llama_cpp") is None:
        raise RecipeError(
            "gate_mode cheap_embed cuts prompts into tokens by llama.cpp: install it with "
            "pip install 'edgemerge[run]', or write gate_mode: random",
            field="gate_mode",
        )
    first = _first_token(metadata)
    if first and _joins_bos(path):
        metadata = {**metadata, SPACE_KEY: encode_value(False, "bool")}
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocabulary.gguf"
        vocabulary.write_bytes(make_layout(metadata, []).header)
        done = subprocess.run(
            # With -P nothing in the user's folder is taken for a module.
            [sys.executable, "-P", "-m", "edgemerge.formats.tokenizer.prompts", str(vocabulary)],
            input=json.dumps(list(texts)).encode(),
            capture_output=True,
            check=False,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
    try:
        found: list[list[int]] = json.loads(done.stdout)
    except ValueError:
        raise RuntimeFailure(
            f"{path}: llama.cpp does not read its vocabulary; update llama-cpp-python",
            detail=done.stderr.decode(errors="replace").strip()[-2000:],
        ) from None
    return [[*first, *ids] for ids in found]


def _first_token(metadata: Mapping[str, bytes]) -> list[int]:
    """Return the token bos where texts begin with it, as llama.cpp does (`llama_vocab::impl::load`)."""
    is_spm = get_value(metadata, "tokenizer.ggml.model") == SPM
    bos = get_value(metadata, "tokenizer.ggml.bos_token_id", 1 if is_spm else None)
    begins = get_value(metadata, "tokenizer.ggml.add_bos_token", is_spm)
    return [bos] if begins and isinstance(bos, int) else []


def _joins_bos(folder: Path) -> bool:
    """Tell whether a text that follows bos begins without a space, as far as a directory says so.

    mergekit writes bos before each prompt as text. Where a tokenizer puts a space before the first word of a
    whole text only, the prompt's first word has none then. Which do is as in transformers 5
    (`LlamaTokenizer`, `_get_prepend_scheme`).
    """
    config, file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not config.is_file() or not file.is_file():
        return False
    stated, kept = read_object(config), b""
    if stated.get("tokenizer_class") in LLAMA_CLASSES:
        return not stated.get("legacy", False)
    with file.open("rb") as opened:
        while piece := opened.read(1 << 16):
            kept = kept[-MARK_BYTES:] + piece
            if MARK.search(kept):
                return True
    return False


def _answer(path: str) -> None:
    """Read texts from stdin; write a list of token ids for each."""
    import llama_cpp as api

    parameters: Any = api.llama_model_default_params()
    parameters.vocab_only = True
    model = api.llama_model_load_from_file(path.encode(), parameters)
    if model is None:
        return
    vocabulary = api.llama_model_get_vocab(model)
    found = []
    for text in json.load(sys.stdin):
        raw = text.encode()
        ids = (api.llama_token * (len(raw) + 16))()
        count = api.llama_tokenize(vocabulary, raw, len(raw), ids, len(ids), False, True)
        found.append(list(ids[: max(0, count)]))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    _answer(sys.argv[1])

"""Token ids of texts by a model's own vocabulary, which is all that llama.cpp loads for this."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgemerge.formats.gguf.metadata import encode_value, get_value
from edgemerge.formats.gguf.writer import make_layout
from edgemerge.formats.json_file import read_object
from edgemerge.formats.llama_process import ask_llama, load_backends

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
    first = _first_token(metadata)
    if first and _joins_bos(path):
        metadata = {**metadata, SPACE_KEY: encode_value(False, "bool")}
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocabulary.gguf"
        vocabulary.write_bytes(make_layout(metadata, []).header)
        raw = ask_llama(
            __name__,
            vocabulary,
            json.dumps(list(texts)).encode(),
            what="cutting prompts into tokens",
            shown=path,
        )
    found: list[list[int]] = json.loads(raw)
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

    load_backends(api)
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

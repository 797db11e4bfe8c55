"""The tokenizer files of a Hugging Face directory, made of GGUF's `tokenizer.*` keys.

Three kinds can be made: byte-level BPE whose way of cutting words edgemerge knows by name, SentencePiece's
BPE, and that of Gemma 4, which has merges in place of scores. SentencePiece's gets a tokenizer.model too,
which keeps its scores.

GGUF does not tell how added tokens treat the spaces around them. They are written to leave them alone, as
llama.cpp does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.metadata import Array, encode_value, get_value
from edgemerge.formats.tokenizer.bpe import OTHER_NAMES, PRE_TOKENIZERS, Step
from edgemerge.formats.tokenizer.gemma4 import VISIBLE
from edgemerge.formats.tokenizer.read import ADD_KEYS, BOS_BY_DEFAULT, ID_KEYS
from edgemerge.formats.tokenizer.sentencepiece_file import (
    CONTROL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    write_sentencepiece,
)
from edgemerge.formats.tokenizer.written_spm import list_merges

__all__ = ["tokenizer_files"]

REMEDY = "give the tokenizer of a directory with tokenizer_source, or write a GGUF"
# Names of llama.cpp's src/llama-vocab.cpp for ways of cutting that it knows under another name too.
SAME_CUTS = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "pixtral": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "llama4": "gpt-4o",
} | {other: name for (_, name), other in OTHER_NAMES.items()}
KINDS = ("gpt2", "llama", "gemma4")
ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")
TEMPLATE = "tokenizer.chat_template"
Json = dict[str, Any]


class _Vocabulary:
    """What GGUF says of the tokens."""

    def __init__(self, path: Path, metadata: Mapping[str, bytes]) -> None:
        self.path, self._metadata = path, metadata
        self.kind = self.get("model")
        if self.kind not in KINDS:
            raise self.refuse(f"is of the kind {self.kind!r}, not {', '.join(KINDS)}")
        self.texts = self.strings("tokens")
        self.types = [int(kind) for kind in self._numbers("token_type")]

    def scores(self) -> list[float]:
        """Return the score of each token."""
        return [float(score) for score in self._numbers("scores")]

    def strings(self, key: str) -> list[str]:
        """Return the items of an array of texts."""
        if not isinstance(values := self.get(key), Array) or not values.is_text:
            raise self.refuse(f"has no {key}")
        return [str(text) for text in values]

    def _numbers(self, key: str) -> list[Any]:
        values = self.get(key)
        if not isinstance(values, Array) or values.is_text or len(values) != len(self.texts):
            raise self.refuse(f"has no {key} for every token")
        return list(values)

    def get(self, key: str) -> Any:
        return get_value(self._metadata, f"tokenizer.ggml.{key}")

    def refuse(self, what: str) -> FormatError:
        return FormatError(
            f"its tokenizer {what}, so no tokenizer.json can be made of it; {REMEDY}",
            path=self.path,
        )

    def used(self) -> Iterator[tuple[str, int]]:
        """Yield the tokens that text may become, or that mean something, with their ids."""
        for i, (text, kind) in enumerate(zip(self.texts, self.types, strict=True)):
            if kind != UNUSED:
                yield text, i

    def special(self, role: str) -> tuple[int, str] | None:
        """Return id and text of a special token."""
        i = self.get(ID_KEYS[role])
        is_token = type(i) is int and 0 <= i < len(self.texts)
        return (i, self.texts[i]) if is_token else None

    def adds(self, role: str, *, default: bool) -> bool:
        stated = self.get(ADD_KEYS[role])
        return default if stated is None else bool(stated)


def tokenizer_files(
    path: Path, metadata: Mapping[str, bytes], context_length: int
) -> dict[str, bytes]:
    """Make the files: name -> content.

    Parameters
    ----------
    path : Path
        The model, named in errors.
    metadata : mapping of GGUF key to typed value
        Of which those of the tokenizer count.
    context_length : int
        Tokens of the longest text.

    Raises
    ------
    FormatError
        The tokenizer is of a kind that no tokenizer.json can be made of here.
    """
    vocabulary = _Vocabulary(path, metadata)
    files = {}
    if vocabulary.kind == "gpt2":
        parts = _bpe(vocabulary)
    elif vocabulary.kind == "gemma4":
        parts = _spm(vocabulary, _merges(vocabulary))
    else:
        texts, scores = vocabulary.texts, vocabulary.scores()
        parts = _spm(vocabulary, [*list_merges(texts, scores, vocabulary.types)])
        files = {"tokenizer.model": _sentencepiece(vocabulary)}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added(vocabulary)),
        **parts,
    }
    files["tokenizer.json"] = json.dumps(whole, ensure_ascii=False, indent=1).encode() + b"\n"
    config = _config(vocabulary, context_length)
    files |= _templates(metadata, config)
    files["tokenizer_config.json"] = (
        json.dumps(config, ensure_ascii=False, indent=2).encode() + b"\n"
    )
    return files


def _added(vocabulary: _Vocabulary) -> Iterator[Json]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for text, i in vocabulary.used():
        kind = vocabulary.types[i]
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            is_special = kind != USER_DEFINED or (
                vocabulary.kind == "gemma4" and text.encode() in VISIBLE
            )
            yield {"id": i, "content": text, **flags, "special": is_special}


# -- byte-level BPE ---------------------------------------------------------------------------------


def _bpe(vocabulary: _Vocabulary) -> Json:
    stated = str(vocabulary.get("pre"))
    wanted = SAME_CUTS.get(stated, stated)
    known = [(steps, ignores) for steps, ignores, name in PRE_TOKENIZERS if name == wanted]
    if not known:
        raise vocabulary.refuse(f"cuts text in the way {stated!r}, which is not known here")
    steps, ignores = known[0]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        # Where a cut goes with either, llama.cpp takes words that are tokens whole with one name only.
        "ignore_merges": wanted == "tekken" if ignores is None else ignores,
        "vocab": dict(vocabulary.used()),
        "merges": _merges(vocabulary),
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    adds_bos = encode_value(stated, "str") in BOS_BY_DEFAULT
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*map(_step, steps)]},
        "post_processor": _template(vocabulary, bos=adds_bos)
        or {**byte_level, "trim_offsets": False, "use_regex": True},
        "decoder": {**byte_level, "use_regex": True},
        "model": model,
    }


def _merges(vocabulary: _Vocabulary) -> list[list[str]]:
    return [text.split(" ", 1) for text in vocabulary.strings("merges")]


def _step(step: Step) -> Json:
    match step:
        case ("Split", regex, behavior, invert):
            pattern = {"Regex": regex}
            return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}
        case ("Digits", individual):
            return {"type": "Digits", "individual_digits": individual}
        case ("ByteLevel", regex):
            flags = {"add_prefix_space": False, "trim_offsets": True, "use_regex": regex}
            return {"type": "ByteLevel", **flags}
    raise AssertionError(step)


# -- SentencePiece's BPE ----------------------------------------------------------------------------


def _spm(vocabulary: _Vocabulary, merges: list[Any]) -> Json:
    adds_space = vocabulary.get("add_space_prefix") is not False
    unknown = vocabulary.special("unk") or next(
        ((i, text) for text, i in vocabulary.used() if vocabulary.types[i] == UNKNOWN), None
    )
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if adds_space else []
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [prepend, replace] if adds_space else [replace],
        },
        "pre_tokenizer": None,
        "post_processor": _template(vocabulary, bos=True),
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else unknown[1],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": dict(vocabulary.used()),
            "merges": merges,
        },
    }


def _sentencepiece(vocabulary: _Vocabulary) -> bytes:
    count = max((i + 1 for _, i in vocabulary.used()), default=0)
    pieces = [
        (text.replace(" ", "▁").encode(), score, kind)
        for text, score, kind in zip(
            vocabulary.texts, vocabulary.scores(), vocabulary.types, strict=True
        )
    ]
    adds_space = vocabulary.get("add_space_prefix") is not False
    return write_sentencepiece(pieces[:count], adds_space=adds_space)


# -- what surrounds a text --------------------------------------------------------------------------


def _template(vocabulary: _Vocabulary, *, bos: bool) -> Json | None:
    """Say which tokens are added to a text; None for none. `bos` is what llama.cpp does by default."""
    if vocabulary.adds("sep", default=False):
        raise vocabulary.refuse("puts a token between two texts")
    first = vocabulary.special("bos") if vocabulary.adds("bos", default=bos) else None
    last = vocabulary.special("eos") if vocabulary.adds("eos", default=False) else None
    if first is None and last is None:
        return None

    def put(token: tuple[int, str] | None, number: int) -> list[Json]:
        return [] if token is None else [{"SpecialToken": {"id": token[1], "type_id": number}}]

    def around(name: str, number: int) -> list[Json]:
        text = {"Sequence": {"id": name, "type_id": number}}
        return [*put(first, number), text, *put(last, number)]

    tokens = {text: i for i, text in filter(None, (first, last))}
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            text: {"id": text, "ids": [i], "tokens": [text]} for text, i in tokens.items()
        },
    }


def _config(vocabulary: _Vocabulary, context_length: int) -> Json:
    config: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }
    for role in ROLES:
        if (token := vocabulary.special(role)) is not None:
            config[f"{role}_token"] = token[1]
    for role in ("bos", "eos"):
        if (adds := vocabulary.get(ADD_KEYS[role])) is not None:
            config[f"add_{role}_token"] = adds
    if vocabulary.kind != "gpt2" and vocabulary.get("add_space_prefix") is False:
        config["add_prefix_space"] = False
    return config


def _templates(metadata: Mapping[str, bytes], config: Json) -> dict[str, bytes]:
    """Return the file of the chat template; where there are several, write them to tokenizer_config.json."""
    names = [key for key in metadata if key.startswith(f"{TEMPLATE}.")]
    default = get_value(metadata, TEMPLATE)
    if not names:
        return {} if default is None else {"chat_template.jinja": str(default).encode()}
    named = {key.removeprefix(f"{TEMPLATE}."): get_value(metadata, key) for key in names}
    if default is not None:
        named = {"default": default, **named}
    config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    return {}

"""What `llama_vocab::impl::load` and the tokenizers of src/llama-vocab.cpp take for granted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from edgemerge.formats.gguf.metadata import get_value, value_kind
from edgemerge.formats.llama_rules.charsmap import leaves_table
from edgemerge.formats.llama_rules.rwkv import stuck_byte
from edgemerge.formats.llama_rules.token_texts import TokenTexts
from edgemerge.formats.llama_rules.violation import Violation

__all__ = [
    "CHARSMAP_KEY",
    "KINDS",
    "NAME_KEY",
    "PHI3_TEXTS",
    "SPECIAL_KEYS",
    "TOKENS_KEY",
    "TYPES_KEY",
]
__all__ += ["adds_nothing", "check_vocabulary", "names_phi3"]

TOKENS_KEY, TYPES_KEY = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
NAME_KEY = "general.name"
CHARSMAP_KEY = "tokenizer.ggml.precompiled_charsmap"
MODEL_KEY, PRE_KEY = "tokenizer.ggml.model", "tokenizer.ggml.pre"

# special token -> key; llama.cpp's `special_token_types`
SPECIAL_KEYS = {
    name: f"tokenizer.ggml.{key}"
    for name, key in (
        ("bos", "bos_token_id"),
        ("eos", "eos_token_id"),
        ("eot", "eot_token_id"),
        ("eom", "eom_token_id"),
        ("unk", "unknown_token_id"),
        ("sep", "seperator_token_id"),
        ("pad", "padding_token_id"),
        ("mask", "mask_token_id"),
    )
}
# key -> types that llama.cpp reads; it refuses any other. The first is what we write.
KINDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(SPECIAL_KEYS.values(), ("u32",)),
    **{f"tokenizer.ggml.add_{name}_token": ("bool",) for name in ("bos", "eos", "sep")},
    "tokenizer.ggml.add_space_prefix": ("bool",),
    "tokenizer.ggml.token_type_count": ("u32",),
    "tokenizer.ggml.scores": ("[f32]", "[i32]"),
    TYPES_KEY: ("[i32]",),
}

BYTE = 6  # LLAMA_TOKEN_TYPE_BYTE of include/llama.h
# Tokenizer model -> ids of bos, eos and sep where no key names them.
_DEFAULTS = {
    "llama": (1, 2, None),
    "bert": (101, None, 102),
    "gpt2": (11, 11, None),
    "hybriddna": (11, 11, None),
    "whitespace": (11, 11, None),
    "t5": (None, 1, None),
    "plamo2": (1, 2, None),
}
_WITHOUT_BOS = ("chatglm-bpe", "glm4", "glm5")  # pre-tokenizers that take the default away
_ADDING_BOS = (
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken"
)
_ALWAYS_BOS = ("gemma4", "granite-embed-multi-311m")
# Attributes are set by the model's name, and these tokens looked up with `at`.
PHI3_TEXTS = (b"</s>", b"<unk>", b"<s>", b"<|endoftext|>")


def check_vocabulary(metadata: Mapping[str, bytes]) -> Iterator[Violation]:
    """Yield what ends llama.cpp as it loads a vocabulary, or later as it tokenises a text.

    Parameters
    ----------
    metadata : mapping of GGUF key to typed value
        What is not there, or shorter than it should be, is left to llama.cpp: it says so.
    """
    model = get_value(metadata, MODEL_KEY)
    if model in ("none", "no_vocab"):
        yield Violation(
            f"has no vocabulary ({MODEL_KEY} is {model})",
            "get it with its tokenizer, or export it again from a folder that has one",
        )
        return
    yield from _check_kinds(metadata)
    raw = metadata.get(TOKENS_KEY)
    if not isinstance(model, str) or raw is None or value_kind(raw) != "[str]":
        return
    texts = TokenTexts(raw)
    if not len(texts):
        yield Violation(f"has a vocabulary without tokens ({TOKENS_KEY} is empty)")
        return
    yield from _check_repeated(texts)
    if model == "llama":
        yield from _check_bytes(texts)
    if model == "bert" and _has_byte_types(metadata):
        yield Violation(f"has tokens for bytes in a vocabulary that has none ({MODEL_KEY} is bert)")
    if get_value(metadata, PRE_KEY) == "whitespace" and model in ("gpt2", "hybriddna"):
        # `find_bpe_rank` asserts that no piece has a space; only the tokenizer "whitespace" takes them out
        yield Violation(
            f"states {PRE_KEY} as whitespace and {MODEL_KEY} as {model}, which do not fit"
        )
    if model == "t5" and leaves_table(_charsmap(metadata)):
        yield Violation(f"has a table of characters ({CHARSMAP_KEY}) that points outside itself")
    if model == "rwkv" and (byte := stuck_byte(texts.texts())) is not None:
        yield Violation(
            f"has tokens that begin with the byte 0x{byte:02X}, and none that is that byte"
        )
    for name in adds_nothing(metadata, len(texts)):
        yield Violation(
            f"says that {name} is put around every text, and names no such token",
            is_mended=model != "bert",
        )
    if names_phi3(metadata) and not all(texts.has(PHI3_TEXTS)):
        yield Violation(
            f"is called {get_value(metadata, NAME_KEY)!r}, and by that name llama.cpp looks for tokens of "
            "Phi-3 that it does not have",
            is_mended=True,
        )


def _check_kinds(metadata: Mapping[str, bytes]) -> Iterator[Violation]:
    for key, kinds in KINDS.items():
        if key in metadata and (kind := value_kind(metadata[key])) not in kinds:
            yield Violation(
                f"states {key} as {kind}, which llama.cpp reads as {kinds[0]} alone", is_mended=True
            )


def _check_repeated(texts: TokenTexts) -> Iterator[Violation]:
    """GGML_ASSERT(id_to_token.size() == token_to_id.size())."""
    if repeated := texts.repeated():
        text, ids = next(iter(repeated.items()))
        more = f" (and {len(repeated) - 1} more texts)" if len(repeated) > 1 else ""
        yield Violation(
            f"has the token {text.decode('utf-8', 'replace')!r} under the ids {ids[0]} and {ids[1]}{more}",
            is_mended=True,
        )


def _check_bytes(texts: TokenTexts) -> Iterator[Violation]:
    """`byte_to_token` throws for a byte that no token stands for, out of `llama_tokenize`."""
    named = texts.has(b"<0x%02X>" % byte for byte in range(256))
    plain = texts.has(bytes([byte]) for byte in range(256))
    if lacking := [byte for byte in range(256) if not named[byte] and not plain[byte]]:
        yield Violation(
            f"has a SentencePiece vocabulary without a token for {len(lacking)} of the 256 bytes "
            f"(<0x{lacking[-1]:02X}>), and ends at the first character that it does not know",
            "get the model with a vocabulary that was trained with byte_fallback",
            depends_on_text=True,
        )


def _charsmap(metadata: Mapping[str, bytes]) -> bytes:
    raw = metadata.get(CHARSMAP_KEY, b"")
    return raw[16:] if raw and value_kind(raw) in ("[u8]", "[i8]") else b""


def _has_byte_types(metadata: Mapping[str, bytes]) -> bool:
    """`token_to_byte` aborts for WordPiece, and is called for every token of type BYTE."""
    raw = metadata.get(TYPES_KEY)
    if raw is None or value_kind(raw) != "[i32]":
        return False
    return bool((np.frombuffer(raw, "<i4", offset=16) == BYTE).any())


def adds_nothing(metadata: Mapping[str, bytes], n_tokens: int) -> list[str]:
    """List what llama.cpp would add to a text (bos, eos, sep) and does not have, which `tokenize` asserts.

    Parameters
    ----------
    metadata : mapping of GGUF key to typed value
        Of the model.
    n_tokens : int
        Size of the vocabulary; larger ids are no ids.
    """
    model, pre = get_value(metadata, MODEL_KEY), get_value(metadata, PRE_KEY)
    if model in ("rwkv", "plamo2", "test"):  # which add nothing, whatever the keys say
        return []
    defaults = dict(zip(("bos", "eos", "sep"), _DEFAULTS.get(str(model), (None,) * 3), strict=True))
    if pre in _WITHOUT_BOS:
        defaults["bos"] = None
    always = {
        "bos": model in ("bert", "gemma4") or pre in _ALWAYS_BOS,
        "eos": False,
        "sep": model == "bert",
    }
    usual = {
        "bos": model == "llama" or pre in (*_ADDING_BOS.split(), "chameleon"),
        "eos": model == "t5",
        "sep": False,
    }
    found = []
    for name, default in defaults.items():
        if (model == "bert" and name == "eos") or (model != "bert" and name == "sep"):
            continue  # never added
        stated = get_value(metadata, f"tokenizer.ggml.add_{name}_token", usual[name])
        ids = [get_value(metadata, SPECIAL_KEYS[name]), default]
        is_there = any(isinstance(i, int) and 0 <= i < n_tokens for i in ids)
        if (stated is True or always[name]) and not is_there:
            found.append(name)
    return found


def names_phi3(metadata: Mapping[str, bytes]) -> bool:
    """Tell whether llama.cpp takes a model for Phi-3 by its name."""
    name = str(get_value(metadata, NAME_KEY, "")).lower()
    return "phi-3" in name or "phi3" in name

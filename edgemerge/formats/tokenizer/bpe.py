"""Byte-level BPE vocabularies (GGUF's tokenizer model "gpt2") from tokenizer.json.

llama.cpp knows how to cut text into words only by name, `tokenizer.ggml.pre`. Its converter finds
the name by hashing the ids of a test text, which needs the whole of transformers and every
vocabulary listed; here it is found by what tokenizer.json says of the cutting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.tokenizer.added import AddedToken
from edgemerge.formats.tokenizer.sentencepiece_file import CONTROL, NORMAL, UNUSED, USER_DEFINED
from edgemerge.formats.tokenizer.spm import looks_special, refuse_id, user_text

__all__ = ["bpe_vocabulary", "joined_merges"]

Json = dict[str, Any]
Step = tuple[str | bool, ...]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_REGEX = _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
QWEN2_REGEX = _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST
QWEN35_REGEX = (
    _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_REGEX = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O_REGEX = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
COVERING = (LLAMA3_REGEX, QWEN2_REGEX, QWEN35_REGEX, TEKKEN_REGEX, GPT4O_REGEX)
DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿ"
    "ᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ"  # noqa: RUF001
    "ΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻"  # noqa: RUF001
    "𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
DEEPSEEK_PUNCTUATION = r"\s?[!-/:-~！-／：-～‘-‟　-。]+"  # noqa: RUF001

_BYTES: Step = ("ByteLevel", False)  # bytes to letters, no cutting
_GPT2: Step = ("ByteLevel", True)  # the same after GPT-2's regex
_DIGITS: Step = ("Digits", True)


def _split(regex: str) -> Step:
    return ("Split", regex, "Isolated", False)


# (steps, ignore_merges) -> name. ignore_merges (a word that is a token is taken whole) goes with
# the name in llama.cpp; None: both are met under this name.
PRE_TOKENIZERS: tuple[tuple[tuple[Step, ...], bool | None, str], ...] = (
    ((_split(LLAMA3_REGEX), _BYTES), True, "llama-bpe"),
    ((_split(LLAMA3_REGEX), _BYTES), False, "smaug-bpe"),
    ((_split(QWEN2_REGEX), _BYTES), False, "qwen2"),
    ((_split(QWEN35_REGEX), _BYTES), False, "qwen35"),
    ((_split(TEKKEN_REGEX), _BYTES), None, "tekken"),
    ((_split(GPT4O_REGEX), _BYTES), None, "gpt-4o"),
    ((_DIGITS, _GPT2), False, "smollm"),
    ((_GPT2,), False, "gpt-2"),
    (
        (
            _split("[\r\n]"),
            _split(r"\s?\p{L}+"),
            _split(r"\s?\p{P}+"),
            _split(DEEPSEEK_CJK),
            _DIGITS,
            _BYTES,
        ),
        False,
        "deepseek-coder",
    ),
    (
        (
            _split("[\r\n]"),
            _split(rf"\s?[{DEEPSEEK_LETTERS}]+"),
            _split(DEEPSEEK_PUNCTUATION),
            _split(r"\s+$"),
            _split(DEEPSEEK_CJK),
            _DIGITS,
            _BYTES,
        ),
        False,
        "deepseek-llm",
    ),
)

# (model type, name above) -> what the converter calls the same cutting in that family's vocabulary
OTHER_NAMES: dict[tuple[str, str], str] = {
    **{
        (f"granite{kind}", ours): theirs
        for kind in ("", "moe", "moeshared", "moehybrid")
        for ours, theirs in (("smaug-bpe", "dbrx"), ("smollm", "refact"))
    },
    ("falcon_h1", "llama-bpe"): "falcon-h1",
    ("lfm2", "llama-bpe"): "lfm2",
    ("llama4_text", "gpt-4o"): "llama4",
    ("olmo2", "smaug-bpe"): "dbrx",
    ("olmo3", "smaug-bpe"): "dbrx",
    ("phi3", "smaug-bpe"): "dbrx",
}


# Model type -> what the converter calls every way of cutting that its published vocabularies have.
# llama.cpp has one cut for them, and merges that were learnt with a finer one hardly ever tell.
NAMES_OF_ALL: dict[str, str] = {"falcon_h1": "falcon-h1"}
FINER_STEPS = ("Digits", "Punctuation", "Split", "ByteLevel")


def bpe_vocabulary(
    path: Path,
    tokenizer_json: Json,
    added: list[AddedToken],
    vocab_size: int,
    model_type: str,
    notes: list[str],
) -> dict[str, bytes]:
    """Return the `tokenizer.ggml.*` keys of a byte-level BPE (`_set_vocab_gpt2`).

    Parameters
    ----------
    path : Path
        The directory, named in errors.
    tokenizer_json : dict
        The file of this name.
    added : list of AddedToken
        Tokens beside its vocabulary.
    vocab_size : int
        Number of tokens to return; ids that no token has become `[PADn]`.
    model_type : str
        config.json's, which chooses among names for one way of cutting.
    notes : list of str
        What llama.cpp does otherwise is added to it.
    """
    model = tokenizer_json["model"]
    _refuse_unknown_model(path, tokenizer_json)
    tokens: list[str | None] = [None] * vocab_size
    types = [UNUSED] * vocab_size
    for text, i in model["vocab"].items():
        _put(path, tokens, i, text)
        types[i] = NORMAL
    for token in added:
        i, text = token.id, token.text
        _put(path, tokens, i, text)
        types[i] = CONTROL if token.special or looks_special(text) else USER_DEFINED
        if types[i] == USER_DEFINED:
            tokens[i] = user_text(text)
    return {
        "model": encode_value("gpt2", "str"),
        "pre": encode_value(_pre_tokenizer(path, tokenizer_json, model_type, notes), "str"),
        "tokens": encode_value(
            [f"[PAD{i}]" if text is None else text for i, text in enumerate(tokens)], "[str]"
        ),
        "token_type": encode_value(types, "[i32]"),
        "merges": encode_value(joined_merges(model["merges"]), "[str]"),
    }


def _put(path: Path, tokens: list[str | None], i: object, text: str) -> None:
    if type(i) is not int or not 0 <= i < len(tokens):
        raise refuse_id(path, text, i, len(tokens))
    if tokens[i] not in (None, text):
        raise FormatError(
            f"tokenizer.json gives the id {i} to two tokens, {tokens[i]!r:.42} and {text!r:.42}; "
            "get the file again",
            path=path,
        )
    tokens[i] = text


def joined_merges(merges: list[Any]) -> list[str]:
    """Turn pairs into GGUF's "left right", where a space inside a part is written as U+0120.

    In place, so that the pairs go as the strings come: there are 280 000 in Llama 3.
    """
    for i, pair in enumerate(merges):
        if not isinstance(pair, str):
            left, right = pair
            merges[i] = f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}"
    return merges


def _refuse_unknown_model(path: Path, tokenizer_json: Json) -> None:
    model = tokenizer_json["model"]
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model.get("type") != "BPE" or model.get("byte_fallback") or affixes:
        raise FormatError(
            f"its tokenizer.json is of type {str(model.get('type'))[:40]!r}, not a byte-level BPE; "
            "give the model with its tokenizer.model, or a GGUF",
            path=path,
        )


def _pre_tokenizer(path: Path, tokenizer_json: Json, model_type: str, notes: list[str]) -> str:
    normalizers = [
        step["type"] for step in _flatten(tokenizer_json.get("normalizer"), "normalizers")
    ]
    # llama.cpp does not normalise; its converter accepts NFC, which leaves nearly all text alone.
    if normalizers not in ([], ["NFC"]):
        raise FormatError(
            f"its tokenizer normalises text by {', '.join(normalizers)[:80]}, which llama.cpp "
            "cannot do for a BPE; use a model with another tokenizer",
            path=path,
        )
    steps = tuple(map(_step, _flatten(tokenizer_json.get("pre_tokenizer"), "pretokenizers")))
    ignore_merges = bool(tokenizer_json["model"].get("ignore_merges", False))
    for known, ignores, name in PRE_TOKENIZERS:
        if steps == known and ignores in (None, ignore_merges):
            return OTHER_NAMES.get((model_type, name), name)
    shown = ", ".join(str(step[0]) for step in steps)
    name_of_all = NAMES_OF_ALL.get(model_type)
    if name_of_all and "ByteLevel" in shown and all(step[0] in FINER_STEPS for step in steps):
        notes.append(
            f"its tokenizer cuts text by {shown}, llama.cpp as {name_of_all}: ids may differ in rare texts"
        )
        return name_of_all
    raise FormatError(
        f"its tokenizer cuts text in a way ({shown or 'none'}) that edgemerge knows no llama.cpp "
        "name for; give a GGUF of it (convert_hf_to_gguf.py of llama.cpp knows more tokenizers)",
        path=path,
    )


def _flatten(step: Json | None, children: str) -> list[Json]:
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [leaf for child in step[children] for leaf in _flatten(child, children)]


def _step(step: Json) -> Step:
    """Return what one step does to text, without what only concerns offsets into it."""
    match step["type"]:
        case "Split":
            regex: str = step["pattern"].get("Regex", "")
            behavior, invert = str(step.get("behavior")), bool(step.get("invert", False))
            # Where a regex matches everything, to drop what does not match is to isolate what does.
            if regex in COVERING and behavior == "Removed" and invert:
                behavior, invert = "Isolated", False
            return ("Split", regex, behavior, invert)
        case "Digits":
            return ("Digits", bool(step.get("individual_digits", False)))
        case "ByteLevel" if not step.get("add_prefix_space", True):
            return ("ByteLevel", bool(step.get("use_regex", True)))
        case kind:
            return (str(kind),)

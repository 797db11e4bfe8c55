"""Models with odd headers and tokenizers, drawn from a seed: small ones, changed in one to three places.

`odd_model(bases, seed)` is a function of the seed alone, so a number is enough to tell of a finding.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from edgemerge.formats.gguf.metadata import value_kind
from edgemerge.formats.gguf.types import block_size, row_bytes
from tests.support.architecture_models import ARCHITECTURES as ARCHITECTURES_DIR
from tests.support.architecture_models import NAMES, convert
from tests.support.odd_kinds import headers, write_kind
from tests.support.odd_values import (
    ARCHITECTURES,
    DTYPES,
    EXTRA,
    FLOATS,
    KINDS,
    MODELS,
    NUMBERS,
    PRES,
    SPECIAL,
)
from tests.support.open_gguf import SCORES, TOKENS, TYPES, OddModel, load_base
from tests.support.tiny_bert import write_tiny_bert
from tests.support.tiny_gguf import write_tiny_gguf


def make_bases(folder: Path) -> list[OddModel]:
    """A Llama with SentencePiece, a BERT, small models of all that we convert, hybrids and the like."""
    paths = [write_tiny_gguf(folder / "llama.gguf"), write_tiny_bert(folder / "bert.gguf")]
    paths += [convert(ARCHITECTURES_DIR / name, folder / f"{name}-hub.gguf") for name in NAMES]
    paths += [write_kind(kind, folder / kind)[0] for kind in headers() if kind != "bert"]
    return [load_base(path) for path in paths]


def odd_model(bases: Sequence[OddModel], seed: int) -> OddModel:
    """Draw a base and change it."""
    rng = random.Random(seed)
    base = bases[0] if rng.random() < 0.5 else rng.choice(bases)
    model = OddModel(dict(base.metadata), dict(base.tensors))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.choice(CHANGES)
        model.changes.append(change(model, rng))
    return model


# -- tokens ---------------------------------------------------------------------------------------


def change_texts(model: OddModel, rng: random.Random) -> str:
    texts = model.texts()
    if len(texts) < 2:
        return "no tokens"
    i, j = rng.sample(range(len(texts)), 2)
    odd = [
        texts[j],
        b"",
        b"\0",
        texts[j] + b"\0x",
        b"\xff\xfe",
        b"x" * 70000,
        b" ",
        b"\n",
        b"[EMPTY_5]",
    ]
    odd += [b"<0x41>", b"<|im_end|>", b"\xe2\x96", b"<s>"]
    texts[i] = rng.choice(odd)
    return model.set(TOKENS, texts, "[str]")[:20] + f" {i}: {texts[i][:20]!r}"


def change_bytes(model: OddModel, rng: random.Random) -> str:
    texts = model.texts()
    lost = set(rng.sample(range(256), rng.choice((1, 128, 256))))
    names = {b"<0x%02X>" % byte for byte in lost}
    model.set(TOKENS, [b"-" + t[1:] if t in names else t for t in texts], "[str]")
    return f"{len(lost)} byte pieces renamed"


def change_count(model: OddModel, rng: random.Random) -> str:
    key = rng.choice((TOKENS, TYPES, SCORES))
    items: list[object] = list(model.texts() if key == TOKENS else model.listed(key))
    if not items:
        return "nothing to cut"
    n = rng.choice((0, 1, len(items) - 1, len(items) + 1))
    items = [*items, items[-1]][:n]
    model.set(key, items, value_kind(model.metadata[key]))
    return f"{key}: {n} items"


def cut_vocabulary(model: OddModel, rng: random.Random) -> str:
    """All of a model for fewer tokens: then the special ids lie beyond them."""
    n = rng.choice((1, 2, 3, 12, 103))
    for key in (TOKENS, TYPES, SCORES):
        if key in model.metadata:
            items = model.texts() if key == TOKENS else model.listed(key)
            model.set(key, items[:n], value_kind(model.metadata[key]))
    for name in ("token_embd.weight", "output.weight"):
        if name in model.tensors:
            (_, width), dtype, data = model.tensors[name]
            model.tensors[name] = ((n, width), dtype, data[: n * row_bytes(dtype, width)])
    return f"a vocabulary of {n}"


def change_types(model: OddModel, rng: random.Random) -> str:
    n = len(model.texts())
    kinds = rng.choice(([6], [3], [5], [0], [-1], [99], list(range(-1, 9))))
    return model.set(
        TYPES, [rng.choice(kinds) for _ in range(n)], rng.choice(("[i32]", "[i32]", "[f32]"))
    )


def change_scores(model: OddModel, rng: random.Random) -> str:
    n = len(model.texts())
    if rng.random() < 0.2:
        return model.set(SCORES, [1] * n, rng.choice(("[i32]", "[u32]")))
    return model.set(SCORES, [rng.choice(FLOATS[:-3] + FLOATS) for _ in range(n)], "[f32]")


def change_special(model: OddModel, rng: random.Random) -> str:
    key = f"tokenizer.ggml.{rng.choice(SPECIAL)}_token_id"
    value = rng.choice((0, 5, len(model.texts()), 2**31, -1))
    kind = rng.choice(("u32", "i64")) if value >= 0 else "i32"
    return model.set(key, value, kind)


def drop_special(model: OddModel, rng: random.Random) -> str:
    for name in SPECIAL:
        model.metadata.pop(f"tokenizer.ggml.{name}_token_id", None)
    key = f"tokenizer.ggml.add_{rng.choice(('bos', 'eos', 'sep'))}_token"
    return "no special ids, " + model.set(key, rng.random() < 0.8, "bool")


def change_tokenizer(model: OddModel, rng: random.Random) -> str:
    return model.set("tokenizer.ggml.model", rng.choice(MODELS), "str")


def change_pre(model: OddModel, rng: random.Random) -> str:
    if rng.random() < 0.5 and "tokenizer.ggml.merges" not in model.metadata:
        model.set("tokenizer.ggml.merges", ["t h", "th e"], "[str]")
        model.set("tokenizer.ggml.model", "gpt2", "str")
    return model.set("tokenizer.ggml.pre", rng.choice(PRES), "str")


def change_merges(model: OddModel, rng: random.Random) -> str:
    odd = [["abc"], [""], [" "], ["a  b"], ["a b c"], ["\0 x"], [" a"], ["a "], []]
    return model.set("tokenizer.ggml.merges", rng.choice(odd), "[str]")


def add_charsmap(model: OddModel, rng: random.Random) -> str:
    model.set("tokenizer.ggml.model", "t5", "str")
    raw = [rng.randrange(256) for _ in range(rng.choice((0, 3, 8, 64, 1024)))]
    if len(raw) > 8 and rng.random() < 0.7:
        raw[:4] = [*(len(raw) // 2 // 4 * 4).to_bytes(4, "little")]
    model.set("tokenizer.ggml.precompiled_charsmap", raw, "[u8]")
    return f"a charsmap of {len(raw)} bytes"


# -- numbers --------------------------------------------------------------------------------------


def change_number(model: OddModel, rng: random.Random) -> str:
    own = [key for key in model.metadata if key.startswith(f"{model.architecture}.")]
    if not own:
        return "no keys"
    key = rng.choice(own)
    kind = value_kind(model.metadata[key])
    if kind.startswith("["):
        return model.set(key, [0] * rng.choice((0, 1, 2, 3)), kind)
    return model.set(key, odd_value(kind, rng), kind)


def change_kind(model: OddModel, rng: random.Random) -> str:
    key = rng.choice([key for key in model.metadata if key != "general.architecture"])
    if key == "general.alignment":
        return "alignment"
    kind = rng.choice(KINDS)
    value = [1, 2] if kind.startswith("[") else odd_value(kind, rng)
    return model.set(key, value, kind)


def drop_key(model: OddModel, rng: random.Random) -> str:
    key = rng.choice([key for key in model.metadata if key != "general.architecture"])
    del model.metadata[key]
    return f"no {key}"


def add_number(model: OddModel, rng: random.Random) -> str:
    key, kind = rng.choice(list(EXTRA.items()))
    return model.set(f"{model.architecture}.{key}", odd_value(kind, rng), kind)


def change_heads(model: OddModel, rng: random.Random) -> str:
    """Numbers per layer."""
    keys = (
        "attention.head_count",
        "attention.head_count_kv",
        "feed_forward_length",
        "expert_used_count",
    )
    n = rng.choice((1, 2, 2, 2, 3))
    values = [rng.choice((0, 1, 2, 3, 4, 128)) for _ in range(n)]
    return model.set(
        f"{model.architecture}.{rng.choice(keys)}", values, rng.choice(("[u32]", "[i32]"))
    )


def change_scaling(model: OddModel, rng: random.Random) -> str:
    kind = rng.choice(("none", "linear", "yarn", "longrope", "su", "dynamic", ""))
    return model.set(f"{model.architecture}.rope.scaling.type", kind, "str")


def odd_value(kind: str, rng: random.Random) -> object:
    if kind == "str":
        return rng.choice(("", "x", "phi3", "\0", "ü" * 300))
    if kind == "bool":
        return rng.random() < 0.5
    if kind == "f32":
        return rng.choice(FLOATS)
    if kind == "i32":
        return rng.choice((*NUMBERS[:-1], -1))
    limit = {"u8": 255, "u16": 65535}.get(kind, 2**32 - 1)
    return min(limit, rng.choice(NUMBERS))


# -- tensors --------------------------------------------------------------------------------------


def change_dtype(model: OddModel, rng: random.Random) -> str:
    name = rng.choice(list(model.tensors))
    shape, _, _ = model.tensors[name]
    fitting = [dtype for dtype in DTYPES if shape[-1] % block_size(dtype)[0] == 0]
    dtype = rng.choice(fitting)
    stem = name.split(".", 2)[-1] if name.startswith("blk.") else name
    for other, (dims, old, _) in list(model.tensors.items()):
        if other.endswith(stem) and dims[-1] == shape[-1] and old != dtype:
            n_bytes = math.prod(dims[:-1]) * row_bytes(dtype, dims[-1])
            model.tensors[other] = (dims, dtype, bytes(n_bytes))
    return f"{stem} as {dtype}"


def drop_tensor(model: OddModel, rng: random.Random) -> str:
    name = rng.choice(list(model.tensors))
    del model.tensors[name]
    return f"no {name}"


def reshape_tensor(model: OddModel, rng: random.Random) -> str:
    name = rng.choice(list(model.tensors))
    shape, _, data = model.tensors[name]
    size = math.prod(shape)
    new = rng.choice((shape[::-1], (size,), (1, *shape), (size, 1), (1, 1, 1, size)))
    model.tensors[name] = (new, "F32", bytes(4 * size) if len(data) != 4 * size else data)
    return f"{name} of {new}"


def add_tensor(model: OddModel, rng: random.Random) -> str:
    names = [
        "rope_freqs.weight",
        "blk.0.attn_q.bias",
        "blk.0.attn_output.bias",
        "blk.0.attn_q_norm.weight",
    ]
    names += [
        "output.bias",
        "blk.7.attn_q.weight",
        "extra.weight",
        "blk.0.attn_q.scale",
        "output_norm.bias",
    ]
    name = rng.choice(names)
    n, dtype = rng.choice((1, 4, 8, 16, 64)), rng.choice(("F32", "F32", "F16"))
    model.tensors[name] = ((n,), dtype, bytes(n * block_size(dtype)[1]))
    return f"{name} of {n} {dtype}"


def change_architecture(model: OddModel, rng: random.Random) -> str:
    old, new = model.architecture, rng.choice(ARCHITECTURES)
    model.metadata = {
        f"{new}{key.removeprefix(old)}" if key.startswith(f"{old}.") else key: value
        for key, value in model.metadata.items()
    }
    return model.set("general.architecture", new, "str")


def change_name(model: OddModel, rng: random.Random) -> str:
    return model.set(
        "general.name", rng.choice(("My Phi-3", "a\nb", "modern-bert", "", "\0")), "str"
    )


CHANGES: list[Callable[[OddModel, random.Random], str]] = [
    *(
        change_texts,
        change_texts,
        change_bytes,
        change_count,
        cut_vocabulary,
        change_types,
        change_scores,
    ),
    *(change_special, drop_special, change_tokenizer, change_tokenizer, change_pre, change_merges),
    *(add_charsmap, change_number, change_number, change_number, change_kind, drop_key, add_number),
    *(
        add_number,
        change_heads,
        change_scaling,
        change_dtype,
        change_dtype,
        drop_tensor,
        reshape_tensor,
    ),
    *(add_tensor, change_architecture, change_name),
]

"""What a model file holds, gathered from its header: no tensor data is read.

`edgemerge.planning.losses` says what a merge would make of it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgemerge.finding.cache import folder_name
from edgemerge.formats.gguf.metadata import Array, Value, decode_value, get_value
from edgemerge.formats.quants.filetypes import FILE_TYPES
from edgemerge.types import Source

__all__ = [
    "Inspection",
    "Provenance",
    "SpecialToken",
    "Template",
    "Tokenizer",
    "TypeShare",
    "inspect_model",
    "read_provenance",
    "read_transplant",
    "shorten",
]

TEMPLATE_KEY = "tokenizer.chat_template"
SPECIAL_TOKEN = re.compile(r"tokenizer\.ggml\.(\w+)_token_id")
LONG = 64  # entries; of longer lists JSON gets the length and the first few

# `llama_ftype` in llama.h: the names of the file types that edgemerge does not make.
_OTHER_FILE_TYPES = {19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS"}
_OTHER_FILE_TYPES |= {24: "IQ1_S", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 31: "IQ1_M"}
_OTHER_FILE_TYPES |= {36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0"}
_OTHER_FILE_TYPES |= {41: "Q2_0"}


@dataclass(frozen=True, slots=True)
class TypeShare:
    """All tensors of one ggml type."""

    dtype: str
    tensors: int
    elements: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """One of the tokens that have a task, such as `bos`, `eos`, `eot`, `padding`."""

    role: str
    id: Value
    text: str | None  # None: the vocabulary has no such token


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The vocabulary and how text is cut into it."""

    model: Value  # llama (SentencePiece), gpt2 (BPE), t5 (Unigram), bert, …
    pre: Value | None  # how text is split before BPE
    n_tokens: int
    special: tuple[SpecialToken, ...]


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template; models may have further ones by name, for tools for instance."""

    name: str | None  # None: the default
    text: str

    @property
    def first_line(self) -> str:
        """The first line that is not empty."""
        return next((line for line in self.text.splitlines() if line.strip()), "")


@dataclass(frozen=True, slots=True)
class Provenance:
    """What `edgemerge merge` wrote into its output."""

    version: str
    method: str
    seed: Value | None
    inputs: tuple[tuple[str, str], ...]  # file name, CRC-32 of its tensors in hexadecimal
    recipe: str  # JSON, models by file name
    hub: tuple[str, ...] = ()  # org/name@commit of each input, empty for one that is not of the hub
    stages: str = ""  # JSON: name, recipe and inputs of each merge that was done before
    transplant: str = ""  # whose tokens the model got, if another's

    def inputs_from(self) -> list[tuple[str, str, str]]:
        """List name, checksum and `org/name@commit` of each input; empty text of one not of the hub."""
        hub = [*self.hub, *[""] * len(self.inputs)]
        return [(name, crc32, hub[i]) for i, (name, crc32) in enumerate(self.inputs)]


@dataclass(frozen=True, slots=True)
class Inspection:
    """One model. A number is what the file states: None where it is silent, an Array if by layer."""

    path: str
    name: str
    architecture: str
    n_tensors: int
    elements: int
    active_elements: int  # of them, those that compute one token; fewer in a mixture of experts
    nbytes: int
    file_type: str | None
    layers: Value | None
    width: Value | None
    feed_forward: Value | None
    heads: Value | None
    kv_heads: Value | None
    head_size: Value | None  # of keys
    value_size: Value | None
    experts: Value | None
    experts_used: Value | None
    context: Value | None
    rope: Mapping[str, Value]  # all of ARCH.rope.…, without the prefix
    is_tied: bool  # the output is the embedding
    tokenizer: Tokenizer | None
    templates: tuple[Template, ...]
    types: tuple[TypeShare, ...]  # largest share first
    provenance: Provenance | None

    @property
    def bits(self) -> float:
        """Stored bits per parameter."""
        return 8 * self.nbytes / max(1, self.elements)


def inspect_model(source: Source) -> Inspection:
    """Gather what a model's header says.

    Parameters
    ----------
    source : Source
        An open model; no tensor data is read.
    """
    specs, metadata, arch = source.specs(), source.metadata(), source.architecture

    def stated(key: str) -> Value | None:
        return get_value(metadata, f"{arch}.{key}")

    heads = stated("attention.head_count")
    head_size = stated("attention.key_length") or _quotient(stated("embedding_length"), heads)
    return Inspection(
        path=str(source.path),
        name=str(get_value(metadata, "general.name", folder_name(source.path))),
        architecture=arch,
        n_tensors=len(specs),
        elements=sum(spec.n_elements for spec in specs.values()),
        active_elements=_active_elements(source),
        nbytes=sum(spec.nbytes for spec in specs.values()),
        file_type=_file_type(get_value(metadata, "general.file_type")),
        layers=stated("block_count"),
        width=stated("embedding_length"),
        feed_forward=stated("feed_forward_length"),
        heads=heads,
        kv_heads=stated("attention.head_count_kv") or heads,
        head_size=head_size,
        value_size=stated("attention.value_length") or head_size,
        experts=stated("expert_count"),
        experts_used=stated("expert_used_count"),
        context=stated("context_length"),
        rope={
            key.removeprefix(f"{arch}.rope."): decode_value(raw)
            for key, raw in metadata.items()
            if key.startswith(f"{arch}.rope.")
        },
        is_tied="token_embd.weight" in specs and "output.weight" not in specs,
        tokenizer=_tokenizer(metadata),
        templates=tuple(_templates(metadata)),
        types=_type_shares(source),
        provenance=read_provenance(metadata),
    )


def _quotient(width: Value | None, heads: Value | None) -> int | None:
    """Size of a head where none is stated: llama.cpp's `n_embd / n_head` (`load_hparams`)."""
    if isinstance(width, int) and isinstance(heads, int) and heads:
        return width // heads
    return None


def _active_elements(source: Source) -> int:
    """Count the parameters of one token: of `…_exps` tensors, which stack experts, a few of many."""
    count, used = (
        get_value(source.metadata(), f"{source.architecture}.{key}")
        for key in ("expert_count", "expert_used_count")
    )
    total = sum(spec.n_elements for spec in source.specs().values())
    if not isinstance(count, int) or not isinstance(used, int) or not 0 < used < count:
        return total
    stacked = sum(spec.n_elements for name, spec in source.specs().items() if "_exps." in name)
    return total - stacked + stacked * used // count


def _file_type(number: Value | None) -> str | None:
    if not isinstance(number, int):
        return None
    names = {row.id: row.name for row in FILE_TYPES.values()} | _OTHER_FILE_TYPES
    return names.get(number, f"unknown ({number})")


def _tokenizer(metadata: Mapping[str, bytes]) -> Tokenizer | None:
    model = get_value(metadata, "tokenizer.ggml.model")
    if model is None:
        return None
    tokens = get_value(metadata, "tokenizer.ggml.tokens")
    pieces = tokens if isinstance(tokens, Array) else ()
    special = []
    for key in metadata:
        if match := SPECIAL_TOKEN.fullmatch(key):
            number = decode_value(metadata[key])
            special.append(SpecialToken(match[1], number, _entry(pieces, number)))
    return Tokenizer(
        model=model,
        pre=get_value(metadata, "tokenizer.ggml.pre"),
        n_tokens=len(pieces),
        special=tuple(special),
    )


def _entry(pieces: Sequence[object], number: Value) -> str | None:
    """Return a token of the vocabulary, if it is one."""
    if isinstance(number, int) and 0 <= number < len(pieces):
        return str(pieces[number])
    return None


def _templates(metadata: Mapping[str, bytes]) -> Iterator[Template]:
    """Yield the default template first, then those by name (`tokenizer.chat_template.NAME`)."""
    if TEMPLATE_KEY in metadata:
        yield Template(None, str(decode_value(metadata[TEMPLATE_KEY])))
    for key, raw in metadata.items():
        if key.startswith(f"{TEMPLATE_KEY}."):
            yield Template(key.removeprefix(f"{TEMPLATE_KEY}."), str(decode_value(raw)))


def _type_shares(source: Source) -> tuple[TypeShare, ...]:
    tensors: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for spec in source.specs().values():
        tensors[spec.dtype] += 1
        elements[spec.dtype] += spec.n_elements
        sizes[spec.dtype] += spec.nbytes
    return tuple(
        TypeShare(dtype, tensors[dtype], n_elements, sizes[dtype])
        for dtype, n_elements in elements.most_common()
    )


def read_provenance(metadata: Mapping[str, bytes]) -> Provenance | None:
    """Read what `edgemerge.merging.run` wrote; another program may have changed it since.

    None where nothing says that edgemerge made the file.
    """
    method = get_value(metadata, "edgemerge.method")
    if method is None:
        return None
    names, checksums = (
        value if isinstance(value := get_value(metadata, f"edgemerge.{key}"), Array) else ()
        for key in ("inputs", "input_crc32")
    )
    hub = get_value(metadata, "edgemerge.input_hub")
    transplant = read_transplant(metadata)
    return Provenance(
        version=str(get_value(metadata, "edgemerge.version", "?")),
        method="transplant" if transplant else str(method),
        seed=get_value(metadata, "edgemerge.seed"),
        inputs=tuple(
            (str(name), f"{crc:08x}")
            for name, crc in zip(names, checksums, strict=False)
            if isinstance(crc, int)
        ),
        recipe=str(get_value(metadata, "edgemerge.recipe", "")),
        hub=tuple(map(str, hub)) if isinstance(hub, Array) else (),
        stages=str(get_value(metadata, "edgemerge.stages", "")),
        transplant=transplant,
    )


def read_transplant(metadata: Mapping[str, bytes]) -> str:
    """Say whose tokens a model got, and how; nothing where it has its own."""
    donor, k = (get_value(metadata, f"edgemerge.transplant.{key}") for key in ("donor", "k"))
    return "" if donor is None else f"tokens of {donor}, k {k}"


def shorten(value: Any) -> Any:
    """Make a value fit for JSON: of a long array, such as a vocabulary, its length; no infinity or NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: shorten(item) for key, item in value.items()}
    if isinstance(value, list | tuple | Array) and len(value) > LONG:
        return {"length": len(value), "first": [shorten(item) for item in value[:4]]}
    if isinstance(value, list | tuple | Array):
        return [shorten(item) for item in value]
    return value

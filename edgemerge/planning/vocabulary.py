"""Which vocabulary the output has, and what models whose vocabularies differ lose.

Without a word on tokens in the recipe, the output has the base's, and rows are merged by their number: an
embedding that was padded, or got rows for added tokens, by the rows that all models have. With one, rows are
merged by the text of their tokens (`edgemerge.planning.token_maps`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgemerge.errors import MismatchError, RecipeError
from edgemerge.finding.cache import folder_name
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.tokenizer.extend import (
    ADDED,
    UNITABLE,
    Extension,
    NewToken,
    added_token,
)
from edgemerge.formats.tokenizer.spm import ADDED_SCORE
from edgemerge.formats.tokenizer.table import TOKENS_KEY, TYPES_KEY, TokenTables
from edgemerge.types import Recipe, Source

__all__ = [
    "BY_TEXT",
    "EMBEDDING",
    "OUTPUT",
    "TEMPLATE_KEY",
    "TOKENS_KEY",
    "Vocabulary",
    "choose_vocabulary",
    "compare_tokenizers",
    "differ_in_size",
    "find_owner",
    "has_rows_of_tokens",
    "names_outsider",
    "note_templates",
    "note_vocabularies",
]

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
TEMPLATE_KEY = "tokenizer.chat_template"
MODEL_KEY, PRE_KEY = "tokenizer.ggml.model", "tokenizer.ggml.pre"
FIRST_TOKEN = 16  # byte of an encoded list of strings: two types of 4 bytes, a count of 8
MOST_RENAMED = 0.01  # of the common tokens; with more, two vocabularies have little in common
NAMED = ("base", "union")
BY_TEXT = (
    "give fine-tunes of one base, or a recipe with tokenizer_source: base, which merges rows by the text of "
    "their tokens"
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of an output."""

    owner: Source  # whose tokenizer it is, to which tokens may have been added
    metadata: Mapping[str, bytes]  # the `tokenizer.` keys
    by_text: bool  # how rows are found; else by their number
    n_padding: int = 0  # tokens at the end that have no text
    notes: tuple[str, ...] = ()
    tables: TokenTables = field(default_factory=TokenTables)

    @property
    def n_rows(self) -> int | None:
        """Rows of the embedding; None where the model does not tell its tokens."""
        raw = self.metadata.get(TOKENS_KEY)
        return None if raw is None else int.from_bytes(raw[8:FIRST_TOKEN], "little")


def has_rows_of_tokens(name: str) -> bool:
    """Tell whether a tensor has one row for each token."""
    return name in (EMBEDDING, OUTPUT)


def names_outsider(recipe: Recipe) -> Path | None:
    """Return the model whose tokenizer is wanted, where it is none of those that are merged."""
    source = recipe.tokenizer_source
    if source is None or source in NAMED or Path(source) in recipe.models():
        return None
    return Path(source)


def find_owner(recipe: Recipe, sources: Mapping[Path, Source]) -> Source:
    """Return the open model whose tokenizer the output has, to which tokens may be added."""
    source, first = recipe.tokenizer_source, sources[recipe.models()[0]]
    return first if source is None or source in NAMED else sources.get(Path(source), first)


def choose_vocabulary(
    recipe: Recipe, sources: Mapping[Path, Source], outside: Source | None = None
) -> Vocabulary:
    """Make the vocabulary that a recipe asks for.

    Parameters
    ----------
    recipe : Recipe
        What is wanted.
    sources : mapping of Path to Source
        The open models of the merge.
    outside : Source, optional
        The model that `tokenizer_source` names, where it is none of these.

    Raises
    ------
    RecipeError
        The vocabularies cannot be joined, or there is nothing that tokens could be added to.
    """
    source, outsider = recipe.tokenizer_source, names_outsider(recipe)
    known = sources if outsider is None or outside is None else {**sources, outsider: outside}
    owner = find_owner(recipe, known)
    plain = {k: v for k, v in owner.metadata().items() if k.startswith("tokenizer.")}
    extends = bool(recipe.tokens or recipe.pad_to_multiple_of)
    if source is None and not extends:
        return Vocabulary(owner, plain, by_text=False)
    if TOKENS_KEY not in plain:
        if extends or any(TOKENS_KEY in other.metadata() for other in sources.values()):
            raise RecipeError(
                f"{owner.path} tells no tokens, which the recipe asks for; name another model as "
                "tokenizer_source",
                field="tokenizer",
            )
        return Vocabulary(owner, plain, by_text=False)
    return _extend(recipe, sources, owner)


def _extend(recipe: Recipe, sources: Mapping[Path, Source], owner: Source) -> Vocabulary:
    """Add to a model's vocabulary what the recipe says, and leave out its padding."""
    tables, notes = TokenTables(), list[str]()
    extension = Extension(owner.metadata(), tables)
    stated = int.from_bytes(owner.metadata()[TOKENS_KEY][8:FIRST_TOKEN], "little")
    if recipe.tokenizer_source == "union":
        others = [other for other in sources.values() if other is not owner and _adds(owner, other)]
        notes += _check_kinds(owner, others)
        counts = extension.join([other.metadata() for other in others])
        notes += [
            f"the union has {count} token{'s' * (count > 1)} more of {folder_name(other.path)}"
            for other, count in zip(others, counts, strict=True)
            if count
        ]
    for text in recipe.tokens:
        if extension.find(text.encode()) is None:
            extension.add(_find_kind(text, sources, tables))
            notes.append(f"the token {text!r} is added")
    n_padding = extension.pad(recipe.pad_to_multiple_of or 1)
    if len(extension) < stated:
        n_left = stated - len(extension)
        notes.append(
            f"the last {n_left} rows of {folder_name(owner.path)} have no token, and are left out"
        )
    if n_padding:
        notes.append(f"{n_padding} rows of padding follow, each the mean of all tokens' rows")
    return Vocabulary(owner, extension.metadata(), True, n_padding, tuple(notes), tables)


def _adds(owner: Source, other: Source) -> bool:
    """Tell whether a model may have tokens that another lacks, or says more of them."""
    keys = (TOKENS_KEY, TYPES_KEY)
    ours, theirs = owner.metadata(), other.metadata()
    return TOKENS_KEY in theirs and any(ours.get(key) != theirs.get(key) for key in keys)


def _check_kinds(owner: Source, others: Sequence[Source]) -> list[str]:
    """Refuse a union of vocabularies that spell their tokens differently."""
    notes, kind = [], str(get_value(owner.metadata(), MODEL_KEY))
    for other in others:
        theirs = str(get_value(other.metadata(), MODEL_KEY))
        if kind not in UNITABLE or theirs != kind:
            raise RecipeError(
                f"a union is made of {', '.join(UNITABLE.values())} vocabularies, all of one kind, and "
                f"that of {owner.path} is {UNITABLE.get(kind, kind)}, that of {other.path} "
                f"{UNITABLE.get(theirs, theirs)}; give base or one of the models as tokenizer_source",
                field="tokenizer_source",
            )
        cuts = [get_value(one.metadata(), PRE_KEY) for one in (owner, other)]
        if cuts[0] != cuts[1]:
            notes.append(
                f"text is cut into words as {folder_name(owner.path)} does ({cuts[0]}), not as "
                f"{folder_name(other.path)} ({cuts[1]})"
            )
    return notes


def _find_kind(text: str, sources: Mapping[Path, Source], tables: TokenTables) -> NewToken:
    """Return a token as the first model has it that knows its text, else as one that is added."""
    for source in sources.values():
        if TOKENS_KEY in source.metadata():
            table = tables.of(source.metadata())
            found = table.find_text(text.encode())
            if found is not None and table.types[found] in ADDED:
                return NewToken(table.text(found), int(table.types[found]), ADDED_SCORE)
    return added_token(text)


def differ_in_size(sources: Sequence[Source]) -> bool:
    """Tell whether models have different numbers of tokens; all of them must state theirs."""
    counts = {_count(source) for source in sources}
    return len(counts) > 1 and None not in counts


def note_vocabularies(owner: Source, other: Source, remedy: str = BY_TEXT) -> list[str]:
    """Compare a model's tokens with those that the output gets; `remedy` is for the error.

    Returns
    -------
    list of str
        One sentence for each difference that does not prevent the merge.

    Raises
    ------
    MismatchError
        The vocabularies have little in common.
    """
    ours, theirs = owner.metadata().get(TOKENS_KEY), other.metadata().get(TOKENS_KEY)
    if ours is None or theirs is None or ours == theirs:
        return []
    left, right = _count(owner) or 0, _count(other) or 0
    renamed = sum(a != b for a, b in zip(_tokens(ours), _tokens(theirs), strict=False))
    if renamed > MOST_RENAMED * min(left, right):
        specs = [source.specs().get(EMBEDDING) for source in (owner, other)]
        raise MismatchError(
            f"the vocabularies differ: {left} tokens in {owner.path} and {right} in {other.path}, and "
            f"{renamed} of those that both have are not the same; {remedy}",
            tensor=EMBEDDING,
            shapes=tuple(spec.shape if spec else None for spec in specs),
        )
    notes = []
    if right > left:
        notes.append(
            f"{folder_name(other.path)} has {right} tokens and {folder_name(owner.path)} {left}: its last "
            f"{right - left} rows are left out"
        )
    elif right < left:
        notes.append(
            f"{folder_name(other.path)} has {right} tokens and {folder_name(owner.path)} {left}: the last "
            f"{left - right} rows, which it lacks, are merged without it"
        )
    if renamed:
        notes.append(
            f"{folder_name(other.path)} spells some tokens differently from {folder_name(owner.path)}"
        )
    return notes


def compare_tokenizers(owner: Source, other: Source) -> list[str]:
    """Say for what merges nothing that the vocabularies of two models are not the same, if so."""
    models = f"{folder_name(owner.path)} and {folder_name(other.path)}"
    try:
        notes = note_vocabularies(owner, other)
    except MismatchError:
        return [f"the tokenizers of {models} have little in common"]
    return [f"the tokenizers of {models} differ"] if notes else []


def note_templates(owner: Source, sources: Sequence[Source]) -> list[str]:
    """Say that the output has no chat template though some model has one."""
    have = [folder_name(source.path) for source in sources if TEMPLATE_KEY in source.metadata()]
    if not have or TEMPLATE_KEY in owner.metadata():
        return []
    return [
        f"the output has no chat template, as {folder_name(owner.path)} has none; {have[0]} has one, "
        "and gives it as tokenizer_source"
    ]


def _count(source: Source) -> int | None:
    raw = source.metadata().get(TOKENS_KEY)
    return None if raw is None else int.from_bytes(raw[8:FIRST_TOKEN], "little")


def _tokens(raw: bytes) -> Iterator[bytes]:
    """Yield the texts of an encoded list of strings."""
    at = FIRST_TOKEN
    while at < len(raw):
        stop = at + 8 + int.from_bytes(raw[at : at + 8], "little")
        yield raw[at + 8 : stop]
        at = stop

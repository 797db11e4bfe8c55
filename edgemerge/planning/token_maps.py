"""Which rows of embeddings and heads stand for the output's tokens, by the rules of mergekit 0.1.5.

Each model's row of a token is its own (mergekit tokenizer/embed.py, `PermutedVocabulary`). Where a model
lacks the token, the recipe's rule for it counts. Without one it gets the row of the only model that has it;
else the base's, where the base has it; else the mean over the models that have it. A token of no model is
zeros. The models are those of a slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from edgemerge.budget import aligned
from edgemerge.errors import MismatchError, RecipeError
from edgemerge.formats.tokenizer.table import TOKENS_KEY, TokenTable
from edgemerge.planning.compatibility import find_head
from edgemerge.planning.vocabulary import Vocabulary, differ_in_size
from edgemerge.token_rows import MEAN, PADDING, ZERO, Int16, Int32, RowMap, TokenRule, own_rows
from edgemerge.types import Source, TensorJob, TensorSpec

__all__ = ["PER_TOKEN", "TokenMaps", "describe_rows", "memory_of_rows"]

# Tensors with an entry for each token that are not brought to another vocabulary.
PER_TOKEN = ("output.bias", "per_layer_token_embd.weight")


class TokenMaps:
    """Makes the map of every tensor of tokens.

    Parameters
    ----------
    vocabulary : Vocabulary
        The output's.
    rules : mapping of str to TokenRule
        The recipe's, by the text of the token.
    sources : sequence of Source
        The models of the merge; the first is taken for a model that does not tell its tokens.
    """

    def __init__(
        self, vocabulary: Vocabulary, rules: Mapping[str, TokenRule], sources: Sequence[Source]
    ) -> None:
        self._vocabulary, self._rules = vocabulary, rules
        if vocabulary.by_text:
            self._target = vocabulary.tables.of(vocabulary.metadata)
            self._n_tokens = len(self._target) - vocabulary.n_padding
            self._first = next(one for one in sources if TOKENS_KEY in one.metadata())
        self._own: dict[Path, Int32] = {}
        self._made: dict[tuple[object, ...], RowMap | None] = {}

    def find(
        self, name: str, models: Sequence[Source], specs: Sequence[TensorSpec], base: Path | None
    ) -> RowMap | None:
        """Map the rows of one tensor; None where all inputs have the output's rows as they are.

        Parameters
        ----------
        name : str
            The output's tensor.
        models : sequence of Source
            Its inputs.
        specs : sequence of TensorSpec
            Their tensors, of one width.
        base : Path or None
            The model whose row is taken before others'; it need not be among them.

        Raises
        ------
        RecipeError
            A rule takes a row from a model that has no such row here.
        MismatchError
            Rows go by their number, and the model that gives the vocabulary has no weights here.
        """
        counts = tuple(spec.n_rows for spec in specs)
        key = (tuple(model.path for model in models), counts, base)
        if key not in self._made:
            if self._vocabulary.by_text:
                self._made[key] = self._by_text(models, counts, base)
            else:
                self._made[key] = self._by_number(name, models, counts)
        return self._made[key]

    # -- by number -------------------------------------------------------------------------------

    def _by_number(
        self, name: str, models: Sequence[Source], counts: Sequence[int]
    ) -> RowMap | None:
        """Take rows as they come; those that a model lacks are those of the vocabulary's owner."""
        owner = self._vocabulary.owner
        if not differ_in_size([owner, *models]):
            return None
        n_rows = find_head(owner, name).n_rows
        lender = next((i for i, model in enumerate(models) if model is owner), None)
        if lender is None and min(counts) < n_rows:
            raise MismatchError(
                f"tensor {name!r} has {n_rows} rows in {owner.path}, which gives the "
                "vocabulary but no weights here; name another model as tokenizer_source",
                tensor=name,
            )
        rows = np.arange(n_rows, dtype=np.int32)
        donors = [np.where(rows < n, i, lender or 0).astype(np.int16) for i, n in enumerate(counts)]
        return RowMap(tuple(donors), (rows,) * len(counts))

    # -- by text ---------------------------------------------------------------------------------

    def _by_text(
        self, models: Sequence[Source], counts: Sequence[int], base: Path | None
    ) -> RowMap | None:
        own = [
            np.where(found < n, found, -1)
            for found, n in zip(map(self._find_own, models), counts, strict=True)
        ]
        places = np.arange(self._n_tokens, dtype=np.int32)
        has = np.stack([found >= 0 for found in own])
        i_base = next((i for i, model in enumerate(models) if model.path == base), None)
        lenders = _default_lenders(has, i_base)
        taken = np.where(lenders >= 0, np.stack(own)[np.maximum(lenders, 0), places], places)
        forced = np.zeros(self._n_tokens, np.bool_)
        for text, rule in self._rules.items():
            self._apply(text, rule, models, own, lenders, taken, forced)
        donors, rows = [], []
        for i, found in enumerate(own):
            is_own = (found >= 0) & ~forced
            donors.append(np.where(is_own, i, lenders).astype(np.int16))
            rows.append(np.where(is_own, found, taken).astype(np.int32))
        n_padding = self._vocabulary.n_padding
        if not n_padding and all(
            n == self._n_tokens and (d == i).all() and (r == places).all()
            for i, (n, d, r) in enumerate(zip(counts, donors, rows, strict=True))
        ):
            return None
        padding = np.full(n_padding, PADDING, np.int16)
        further = np.arange(self._n_tokens, self._n_tokens + n_padding, dtype=np.int32)
        return RowMap(
            tuple(np.concatenate([one, padding]) for one in donors),
            tuple(np.concatenate([one, further]) for one in rows),
            n_padding,
        )

    def _table(self, model: Source) -> TokenTable:
        source = model if TOKENS_KEY in model.metadata() else self._first
        return self._vocabulary.tables.of(source.metadata())

    def _find_own(self, model: Source) -> Int32:
        """Find each token of the output in a model: its id there, or -1."""
        if model.path not in self._own:
            self._own[model.path] = self._table(model).find(self._target.keys[: self._n_tokens])
        return self._own[model.path]

    def _apply(
        self,
        text: str,
        rule: TokenRule,
        models: Sequence[Source],
        own: Sequence[Int32],
        lenders: Int16,
        taken: Int32,
        forced: np.ndarray,
    ) -> None:
        """Write what a rule says of a token into the last three."""
        token = self._target.find_text(text.encode())
        assert token is not None  # it was added
        forced[token] = rule.force
        if rule.source == "default":
            return
        if rule.source == "zero":
            lenders[token], taken[token] = ZERO, token
            return
        if not rule.force and all(found[token] >= 0 for found in own):
            return  # every model has a row of its own
        i = next((i for i, model in enumerate(models) if model.path == rule.model), None)
        if i is None:
            _refuse(text, f"the row of {rule.model}, which is not merged here")
        row = self._row(rule, int(own[i][token]), models[i])
        if not 0 <= row < len(self._table(models[i])):
            what = "it" if rule.token is None else f"the token {rule.token!r}"
            _refuse(text, f"a row of {rule.model}, which does not have {what}")
        lenders[token], taken[token] = i, row

    def _row(self, rule: TokenRule, own: int, model: Source) -> int:
        if rule.token is None:
            return own
        if isinstance(rule.token, int):
            return rule.token
        found = self._table(model).find_text(rule.token.encode())
        return -1 if found is None else found


def _default_lenders(has: np.ndarray, i_base: int | None) -> Int16:
    """Choose for each token who lends a row to models without it; `has`: (models, tokens)."""
    count = has.sum(axis=0)
    lenders = np.full(has.shape[1], MEAN, np.int16)
    if i_base is not None:
        lenders[has[i_base]] = i_base
    lenders[count == 1] = np.argmax(has, axis=0)[count == 1]
    lenders[count == 0] = ZERO
    return lenders


def _refuse(text: str, what: str) -> NoReturn:
    raise RecipeError(
        f"tokenizer.tokens gives {text!r} {what}; name a model that is merged, and a token of it",
        field="tokenizer.tokens",
    )


def memory_of_rows(job: TensorJob) -> tuple[int, int]:
    """Return what reading mapped rows takes of an arena: fixed bytes, and bytes per row of a block."""
    if job.rows is None or job.is_byte_copy:
        return 0, 0
    n_cols, n_inputs = job.out.n_cols, len(job.inputs)
    fixed = aligned(4 * n_cols) + aligned(1)
    if not job.rows.n_padding:
        return fixed, 0
    return fixed + aligned(8 * n_cols) + aligned(4 * n_cols * n_inputs) + aligned(1), 4 * n_cols


def describe_rows(rows: RowMap, names: Sequence[str], counts: Sequence[int]) -> Iterator[str]:
    """Say of each input how many rows are its own, and where the others come from.

    Parameters
    ----------
    rows : RowMap
        Of a tensor of tokens.
    names : sequence of str
        Of the inputs' models.
    counts : sequence of int
        Rows that the inputs have.
    """
    n_tokens = rows.n_rows - rows.n_padding
    for i, (name, count) in enumerate(zip(names, counts, strict=True)):
        donors = rows.donors[i][:n_tokens]
        n_own = int((donors == i).sum())
        parts = [
            f"{n} of {names[donor]}"
            for donor in range(len(names))
            if donor != i and (n := int((donors == donor).sum()))
        ]
        if n := int((donors == MEAN).sum()):
            parts.append(f"{n} the mean of the models that have them")
        if n := int((donors == ZERO).sum()):
            parts.append(f"{n} zero")
        left = count - np.unique(own_rows(rows, i)).size
        ends = f"; {left} of its rows {'are' if left > 1 else 'is'} left out" if left else ""
        if parts or ends:
            yield f"rows of {name}: {', '.join([f'{n_own} its own', *parts])}{ends}"

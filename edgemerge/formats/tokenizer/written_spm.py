"""Merges of a tokenizer.json from the scores of SentencePiece's BPE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from edgemerge.formats.tokenizer.sentencepiece_file import NORMAL

__all__ = ["list_merges"]


def list_merges(
    texts: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> Iterator[list[str]]:
    """Yield the pairs that make tokens, the pair that is merged first before the others.

    As `generate_merges` of transformers' tokenization_utils_tokenizers.py. SentencePiece merges the pair
    whose token has the best score. Of equal scores the pair with the longer left side comes first.

    Parameters
    ----------
    texts, scores, types : sequence
        One for each token. Only normal tokens are made by merges.
    """
    ids = {text: i for i, text in enumerate(texts) if types[i] == NORMAL}
    order = sorted(ids.values(), key=lambda i: -scores[i])
    for _, group in groupby(order, key=lambda i: scores[i]):
        pairs: list[tuple[str, str]] = []
        for i in group:
            cuts = ((texts[i][:at], texts[i][at:]) for at in range(1, len(texts[i])))
            found = [(left, right) for left, right in cuts if left in ids and right in ids]
            pairs += sorted(found, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        pairs.sort(key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True)
        yield from map(list, pairs)

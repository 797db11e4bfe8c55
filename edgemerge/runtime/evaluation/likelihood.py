"""How likely a model finds each option of a question: lm-evaluation-harness's `loglikelihood`.

An option's score is the log-likelihood of its tokens after the prompt. All prompts of a task begin alike,
with a description and worked examples. That beginning is computed once and stays in the model's memory. The
prompt of a question is computed once for all its options: its tokens belong to one sequence per option.
Several questions go into one batch. A model with a running state (Mamba, LFM2) can reuse neither: its prompts
are computed for each option of more than one token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.engine.scores import log_total
from edgemerge.runtime.evaluation.questions import Question
from edgemerge.runtime.llama import Context, Model
from edgemerge.types import Float32, Float64

__all__ = [
    "REMEDY",
    "Likelihoods",
    "NoNumbers",
    "check_context",
    "check_numbers",
    "log_likelihoods",
    "option_likelihoods",
    "score_questions",
]

# Limits of one batch, unless a single question needs more. 256 tokens were the fastest of 64 to
# 512: all sequences of a batch are in one memory, so attention's cost grows with the square. 256
# sequences is llama.cpp's limit.
_TOKENS, _SEQUENCES = 256, 256
_LOGITS_BYTES = 64 * 2**20


REMEDY = "damaged or too large; merge it with smaller weights, or get it again"


class NoNumbers(RuntimeFailure):
    """A model computes NaN, infinity, or what no perplexity can be told of."""


@dataclass(frozen=True, slots=True)
class Likelihoods:
    """What a model makes of the options of one question.

    Attributes
    ----------
    totals : tuple of float
        Log-likelihood of each option, a natural logarithm.
    n_tokens : tuple of int
        Tokens of each option.
    cut : bool
        Whether the prompt lost its beginning, for want of context.
    """

    totals: tuple[float, ...]
    n_tokens: tuple[int, ...]
    cut: bool = False


@dataclass(frozen=True, slots=True)
class _Group:
    """Options of one question that have one prompt, as tokens."""

    question: int
    prompt: list[int]
    options: list[int]  # which options these are
    endings: list[list[int]]
    cut: bool = False

    @property
    def n_sequences(self) -> int:
        """Sequences it takes: an ending of one token is read off the prompt's and needs none."""
        return max(1, sum(len(ending) > 1 for ending in self.endings))

    @property
    def n_outputs(self) -> int:
        """Rows of logits: one after the prompt, one after each token of an ending but its last."""
        return 1 + sum(len(ending) - 1 for ending in self.endings)

    @property
    def n_tokens(self) -> int:
        """Tokens to run: the prompt's and the endings', whose last predicts nothing."""
        return len(self.prompt) - 1 + self.n_outputs


@dataclass(frozen=True, slots=True)
class _Pass:
    """Batches of questions whose prompts begin alike."""

    prefix: list[int]
    batches: list[list[_Group]]  # prompts without the prefix


def option_likelihoods(model: Model, questions: Sequence[Question]) -> list[Likelihoods]:
    """Log-likelihood of every option of every question.

    Parameters
    ----------
    model : Model
        A loaded model.
    questions : sequence of Question
        Prompts longer than the model's context lose their beginning.

    Raises
    ------
    RuntimeFailure
        An option is empty or longer than the context, or llama.cpp failed.
    """
    found: dict[int, Likelihoods] = {}
    for finished in score_questions(model, questions):
        found |= finished
    return [found[i] for i in range(len(questions))]


def score_questions(
    model: Model,
    questions: Sequence[Question],
    *,
    n_ctx: int | None = None,
    skip: Collection[int] = (),
) -> Iterator[dict[int, Likelihoods]]:
    """Score questions and yield, after each batch, those that it finished, by index.

    How questions are cut into batches depends on all of them, whatever is skipped: a run that goes
    on where another stopped gives the same bits. In another batch they would not: with float32
    weights an option's log-likelihood moves by 1e-5, with quantised ones, where llama.cpp rounds
    activations to 8 bits, the least difference turns roundings over (by up to 0.7 in 12 questions
    after 700 tokens of examples, Gemma-3-270M Q4_K_M).

    Parameters
    ----------
    model : Model
        A loaded model.
    questions : sequence of Question
        Prompts longer than the context lose their beginning.
    n_ctx : int, optional
        Tokens of context; by default the model's own.
    skip : collection of int
        Indices of questions that need no score.

    Raises
    ------
    RuntimeFailure
        `n_ctx` exceeds the model's, an option is empty or longer than the context, or llama.cpp
        failed.
    """
    n_ctx = check_context(model, n_ctx)
    if len(skip) == len(questions):
        return
    groups = [g for i, item in enumerate(questions) for g in _split(model, i, item, n_ctx)]
    # a vocabulary of 262 144 makes a row of logits a megabyte
    n_outputs = _LOGITS_BYTES // (4 * model.n_vocab)
    share = not model.keeps_state  # which cannot be cut back to the prompts' beginning
    whole = _make_pass([group for group in groups if not group.cut], n_outputs, share=share)
    cut = _make_pass([group for group in groups if group.cut], n_outputs, share=False)
    for one in (whole, cut):
        yield from _run_pass(model, one, questions, skip)


def check_context(model: Model, n_ctx: int | None) -> int:
    """Tokens of context to use: what was asked for, or else the model's own.

    Raises
    ------
    RuntimeFailure
        The model was not trained on that many.
    """
    if n_ctx is not None and n_ctx > model.n_ctx_train:
        raise RuntimeFailure(
            f"{model.path}: its context is {model.n_ctx_train} tokens, not {n_ctx}: "
            f"give -c {model.n_ctx_train} or less"
        )
    return n_ctx or model.n_ctx_train


def check_numbers(model: Model, values: Sequence[float] | Float64) -> None:
    """Refuse a model whose logits are NaN or infinite: among such options the first would count as chosen.

    Raises
    ------
    NoNumbers
        A value is none.
    """
    if not np.isfinite(values).all():
        raise NoNumbers(
            f"{model.path}: computes NaN or infinity instead of likelihoods, so its weights are {REMEDY}"
        )


def log_likelihoods(logits: Float32, rows: Sequence[int], tokens: Sequence[int]) -> Float64:
    """Log-likelihood of each token by its row of logits, summed in double precision.

    Parameters
    ----------
    logits : (n, n_vocab) float32
        As llama.cpp gives them.
    rows, tokens : (k,) int
        Pairs of a row and the token that came after it.

    Returns
    -------
    (k,) float64
        Natural logarithms.
    """
    result = np.empty(len(tokens))
    norms: dict[int, float] = {}
    for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        if row not in norms:  # row by row: a double copy of all rows would be the largest buffer
            norms[row] = log_total(logits[row])
        result[i] = float(logits[row, token]) - norms[row]
    return result


def _split(model: Model, index: int, question: Question, n_ctx: int) -> list[_Group]:
    """Tokens of a question: one group, or several where options cannot use one computed prompt.

    Those cut to the context are one group each. So is each option of several tokens where the model keeps a
    running state, which llama.cpp computes for one sequence at a time.
    """
    # lm-evaluation-harness's _encode_pair: spaces at the prompt's end belong to the option
    text = question.prompt.rstrip()
    spaces = question.prompt[len(text) :]
    prompt = model.tokenize(text)
    # The continuation is what the whole text has after the prompt's tokens: tokenised by itself,
    # an option could come out differently.
    endings = [
        model.tokenize(f"{text}{spaces} {option}")[len(prompt) :] for option in question.options
    ]
    for option, ending in zip(question.options, endings, strict=True):
        if not ending:
            raise RuntimeFailure(f"the option {option!r} adds no token to {text[-80:]!r}")
        if len(ending) > n_ctx:
            raise RuntimeFailure(
                f"{model.path}: the option {option[:80]!r} has {len(ending)} tokens, more than the "
                f"context of {n_ctx}"
            )
    prompt = model.bos + prompt
    # lm-evaluation-harness cuts each sequence from the left, by itself; the last token is no input
    rooms = [n_ctx - len(ending) + 1 for ending in endings]
    if len(prompt) <= min(rooms):
        alone = [i for i, ending in enumerate(endings) if model.keeps_state and len(ending) > 1]
        together = [i for i in range(len(endings)) if i not in alone]
        parts = [part for part in (together, *([i] for i in alone)) if part]
        return [_Group(index, prompt, part, [endings[i] for i in part]) for part in parts]
    return [
        _Group(index, prompt[-room:], [i], [ending], cut=True)
        for i, (room, ending) in enumerate(zip(rooms, endings, strict=True))
    ]


def _make_pass(groups: Sequence[_Group], n_outputs: int, *, share: bool) -> _Pass:
    """Take off what all prompts begin with, but for a last token each; cut into batches."""
    prefix = _common_prefix([group.prompt[:-1] for group in groups]) if share and groups else []
    shorter = [replace(group, prompt=group.prompt[len(prefix) :]) for group in groups]
    return _Pass(prefix, list(_batches(shorter, n_outputs)))


def _common_prefix(sequences: Sequence[list[int]]) -> list[int]:
    """Longest beginning of all: that of the first and the last in order of size."""
    first, last = min(sequences), max(sequences)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return [token for token, _ in same]


def _batches(groups: Sequence[_Group], n_outputs: int) -> Iterator[list[_Group]]:
    """Cut the groups, in order, into batches within the limits."""
    limits = np.array([_TOKENS, _SEQUENCES, n_outputs])
    batch: list[_Group] = []
    taken = np.zeros(3, dtype=np.int64)
    for group in groups:
        needs = np.array([group.n_tokens, group.n_sequences, group.n_outputs])
        if batch and np.any(taken + needs > limits):
            yield batch
            batch, taken = [], np.zeros(3, dtype=np.int64)
        batch.append(group)
        taken += needs
    if batch:
        yield batch


def _run_pass(
    model: Model, one: _Pass, questions: Sequence[Question], skip: Collection[int]
) -> Iterator[dict[int, Likelihoods]]:
    """Run the batches that hold something to score."""
    totals: dict[int, dict[int, tuple[float, int]]] = {}
    wanted = [b for b in one.batches if any(group.question not in skip for group in b)]
    if not wanted:
        return
    # of all batches, not of those wanted: buffers of another size might round differently
    n_batch = max(sum(group.n_tokens for group in batch) for batch in one.batches)
    n_sequences = max(sum(group.n_sequences for group in batch) for batch in one.batches)
    with model.context(
        len(one.prefix) + n_batch,
        n_batch=n_batch,
        n_sequences=n_sequences,
        n_outputs=max(sum(group.n_outputs for group in batch) for batch in one.batches),
        exact=True,
    ) as context:
        _feed_prefix(context, one.prefix, n_batch, n_sequences)
        for batch in wanted:
            if one.prefix:
                context.truncate(len(one.prefix))
            else:
                context.clear()
            finished: dict[int, Likelihoods] = {}
            for group, values in zip(batch, _run(context, batch, len(one.prefix)), strict=True):
                found = totals.setdefault(group.question, {})
                found |= dict(zip(group.options, values, strict=True))
                if len(found) == len(questions[group.question].options):
                    del totals[group.question]
                    sums, counts = zip(*(found[i] for i in sorted(found)), strict=True)
                    check_numbers(model, sums)
                    finished[group.question] = Likelihoods(sums, counts, group.cut)
            yield {i: found for i, found in finished.items() if i not in skip}


def _feed_prefix(context: Context, prefix: Sequence[int], n_batch: int, n_sequences: int) -> None:
    """Compute the tokens that all sequences begin with."""
    part = context.batch(n_batch)
    for start in range(0, len(prefix), n_batch):
        part.clear()
        tokens = prefix[start : start + n_batch]
        part.add_all(tokens, start, 0, n_sequences=n_sequences, output=False)
        context.run(part)


def _run(context: Context, batch: Sequence[_Group], n_prefix: int) -> list[list[tuple[float, int]]]:
    """Log-likelihood and number of tokens of each ending of each group, computed together."""
    inputs = context.batch(sum(group.n_tokens for group in batch))
    first = 0  # sequence of a group
    for group in batch:
        n_prompt, n_sequences = len(group.prompt), group.n_sequences
        start = inputs.add_all(group.prompt, n_prefix, first, n_sequences=n_sequences, output=False)
        inputs.want(start + n_prompt - 1)
        long = [ending[:-1] for ending in group.endings if len(ending) > 1]
        for sequence, tokens in enumerate(long, first):
            inputs.add_all(tokens, n_prefix + n_prompt, sequence, output=True)
        first += n_sequences
    context.run(inputs)
    logits = inputs.all_logits()
    result = []
    row = 0
    for group in batch:
        result.append(_sum_endings(logits[row : row + group.n_outputs], group.endings))
        row += group.n_outputs
    return result


def _sum_endings(logits: Float32, endings: Sequence[Sequence[int]]) -> list[tuple[float, int]]:
    """Log-likelihoods and lengths of endings.

    Parameters
    ----------
    logits : (1 + sum of (len(ending) - 1), n_vocab) float32
        First the row after the prompt, which all endings start from, then the rows of each ending.
    endings : sequence of token sequences
        None of them empty.
    """
    rows: list[int] = []
    after = 1
    for ending in endings:
        rows += [0, *range(after, after + len(ending) - 1)]
        after += len(ending) - 1
    values = log_likelihoods(logits, rows, [token for ending in endings for token in ending])
    ends = np.cumsum([len(ending) for ending in endings])[:-1]
    return [(float(part.sum()), len(part)) for part in np.split(values, ends)]

"""Loads a model as an engine wants it: one context for all of its sequences."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

from edgemerge.errors import FormatError, RuntimeFailure
from edgemerge.machine.process import read_process
from edgemerge.runtime.board.device import default_threads
from edgemerge.runtime.engine.options import KEPT_PART, ROWS, EngineFacts, EngineOptions
from edgemerge.runtime.engine.slots import Slots
from edgemerge.runtime.engine.store import Store
from edgemerge.runtime.llama import Context, Model
from edgemerge.runtime.model_files import find_fingerprint, open_gguf, reads_whole
from edgemerge.runtime.template import Template, load_template

__all__ = ["Loaded", "load"]

_LONGEST_PAIR = 1024  # tokens: each has a row of logits, which for 150 000 tokens is 600 KB
_LEAST = 512  # tokens of a context: less is no use, whatever the memory
_RANK = "4"  # enum llama_pooling_type of llama.h, as text of metadata


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready.

    Attributes
    ----------
    model, context, slots
        What computes. Above the sequences of `slots` there are as many again for embeddings.
    template : Template or None
        Its chat template.
    facts : EngineFacts
        What it says of itself.
    n_rows : int
        Most logits of one batch.
    whole : bool
        Whether a text has to be in one batch, as for an encoder or a model that orders texts.
    """

    model: Model
    context: Context
    slots: Slots
    template: Template | None
    facts: EngineFacts
    n_rows: int
    whole: bool

    @property
    def spare_sequences(self) -> range:
        """Sequences of the context that `slots` does not have."""
        return range(self.slots.n_all, self.facts.n_sequences + self.slots.n_all)


def load(options: EngineOptions) -> Loaded:
    """Load a model and make its context.

    Raises
    ------
    RuntimeFailure
        llama.cpp is not installed, refuses a file, or has no memory for the context.
    FormatError
        A file is damaged, or breaks a rule of llama.cpp's that would end the process.
    """
    process = read_process()
    base = process.rss - process.file  # Python and its libraries
    with closing(open_gguf(options.path)) as source:
        is_encoder = reads_whole(source)
        files = source.files()
    model = Model(
        options.path,
        n_threads=options.n_threads or (default_threads() if is_encoder else None),
        n_gpu_layers=options.n_gpu_layers,
        loras=options.loras,
        encoders=True,
        rpc=options.rpc,
    )
    can_rerank = model.pooling == _RANK
    whole = is_encoder or can_rerank
    n_batch = options.n_chunk + options.n_sequences
    n_ctx = options.n_ctx
    if whole:  # an encoder has no positions after those that it was trained with
        n_ctx = n_batch = min(n_ctx, model.n_ctx_train if is_encoder else _LONGEST_PAIR)
    n_rows = n_batch if whole else options.n_sequences + ROWS
    maker = _Maker(model, options, n_batch, n_rows)
    context = maker.make(
        n_ctx if options.memory is None else maker.fit(n_ctx, options.memory - base)
    )
    n_ctx = min(n_ctx, context.n_ctx)
    n_kept = 0 if model.keeps_state else options.n_sequences
    kept_bytes = int(KEPT_PART * context.buffers.kv)
    slots = Slots(
        model.api,
        context.handle,
        options.n_sequences,
        n_kept,
        Store(model.api, context.handle, kept_bytes),
        keeps_state=model.keeps_state,
    )
    template = _load_template(model)
    buffers = context.buffers
    facts = EngineFacts(
        # llama.cpp rounds a small context up; a text has no more positions than the model was trained with
        n_ctx=min(n_ctx, model.n_ctx_train or n_ctx, options.n_longest or n_ctx),
        n_sequences=options.n_sequences,
        n_vocab=model.n_vocab,
        has_template=template is not None,
        reads_whole=is_encoder,
        can_rerank=can_rerank,
        fingerprint=find_fingerprint([*files, *(lora.path for lora in options.loras)]),
        memory={
            "weights": buffers.weights,
            "kv": buffers.kv,
            "compute": buffers.compute,
            "output": buffers.output,
            "kept": kept_bytes,
        },
    )
    return Loaded(model, context, slots, template, facts, n_rows, whole)


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes contexts of a model that differ in their tokens only."""

    model: Model
    options: EngineOptions
    n_batch: int
    n_rows: int

    def make(self, n_ctx: int) -> Context:
        """Make a context of so many tokens."""
        model, options, api = self.model, self.options, self.model.api
        kind = getattr(api, f"GGML_TYPE_{options.kv_type.upper()}")
        pools = model.pooling == _RANK  # other embeddings are pooled here
        settings = {
            "type_k": kind,
            "type_v": kind,
            "pooling_type": (api.LLAMA_POOLING_TYPE_RANK if pools else api.LLAMA_POOLING_TYPE_NONE),
        }
        if options.flash is not None:
            settings["flash_attn_type"] = int(options.flash)
        return model.context(
            n_ctx,
            n_batch=self.n_batch,
            n_ubatch=self.n_batch,
            n_sequences=options.n_sequences * (2 if model.keeps_state else 3),
            n_outputs=self.n_rows,
            **settings,
        )

    def fit(self, n_ctx: int, memory: int) -> int:
        """Find how many tokens, at most n_ctx, take so many bytes with the weights.

        What a token needs differs with the architecture: grouped heads, sliding windows, running states. So
        it is read off two small contexts. Scratch grows with the context too.
        """
        small, large = (self._size(min(n, n_ctx)) for n in (_LEAST, 2 * _LEAST))
        per_token = (large - small) / _LEAST
        room = memory - small
        if per_token <= 0.0 or room >= per_token * (n_ctx - _LEAST):
            return n_ctx
        return min(n_ctx, _LEAST + max(0, int(room / per_token)))

    def _size(self, n_ctx: int) -> int:
        with self.make(n_ctx) as probe:
            remote = probe.buffers.device if self.options.rpc else 0
            kept = int(KEPT_PART * probe.buffers.kv)
            return sum(probe.buffers.sizes.values()) - remote + kept


def _load_template(model: Model) -> Template | None:
    """Load the chat template.

    Raises
    ------
    RuntimeFailure
        It does not work, or there is no Jinja.
    """
    try:
        return load_template(model)
    except FormatError as error:
        raise RuntimeFailure(str(error)) from error

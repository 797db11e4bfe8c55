"""llama-cpp-python's `Llama`, made fit for a server.

What differs: it counts, it stops when asked, log-probabilities and embeddings cost nothing until a
request wants them, and its memory stays the same from the first request to the last.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from edgemerge.runtime.board.device import default_threads
from edgemerge.runtime.library import load_library
from edgemerge.runtime.llama import Lora
from edgemerge.runtime.model_files import check_adapter, open_gguf, reads_whole
from edgemerge.runtime.repetition import LoopWatch
from edgemerge.runtime.serve.active_request import current_run
from edgemerge.runtime.serve.chat import make_chat_handler
from edgemerge.runtime.serve.embeddings import embed
from edgemerge.runtime.serve.empty_answer import empty_completion
from edgemerge.runtime.serve.models import BATCH, OUTPUTS
from edgemerge.runtime.serve.pieces import Pieces
from edgemerge.runtime.serve.scores import TokenScore, score_token, write_logprobs
from edgemerge.runtime.thread_counts import find_threads
from edgemerge.types import Float32

_library = load_library()  # before llama_cpp itself, whose log it takes over
from llama_cpp import Llama  # noqa: E402

__all__ = ["ServedLlama"]

_api = _library.api
_ALL_LAYERS = -1
_TEMPLATE = "tokenizer.chat_template"  # and with a dot behind it, those for other uses


class ServedLlama(Llama):  # type: ignore[misc]
    """A loaded model with one context.

    Parameters
    ----------
    path : Path
        A GGUF file.
    n_ctx : int
        Tokens of context.
    n_threads : int, optional
        Threads that compute; by default as many as are fastest, which is measured.
    n_gpu_layers : int, optional
        Layers on the GPU; by default all where llama.cpp was built for one.
    loras : sequence of Lora
        Adapters to add.

    Raises
    ------
    RuntimeFailure, FormatError
        llama.cpp refuses a file, or would end the process at it.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int,
        n_threads: int | None = None,
        n_gpu_layers: int | None = None,
        loras: Sequence[Lora] = (),
    ) -> None:
        with closing(open_gguf(path)) as source:
            files = source.files()
            self.reads_whole = reads_whole(source)  # an encoder: a text at once, nothing follows it
        n_batch = n_ctx if self.reads_whole else BATCH
        _library.start()
        if n_gpu_layers is None:
            n_gpu_layers = _ALL_LAYERS if _api.llama_supports_gpu_offload() else 0
        try:
            super().__init__(
                str(files[0]),
                n_ctx=n_ctx,
                n_batch=n_batch,
                n_ubatch=n_batch,
                n_threads=n_threads or default_threads(),
                n_threads_batch=n_threads or default_threads(),
                n_gpu_layers=n_gpu_layers,
                pooling_type=_api.LLAMA_POOLING_TYPE_NONE,  # embeddings are pooled here
                verbose=False,
            )
        except ValueError as error:
            raise _library.load_failure(path) from error
        if n_threads is None and not self.reads_whole:
            n_bytes = _api.llama_model_size(self.model)
            find_threads(_api, self.ctx, n_bytes=n_bytes, most=default_threads())
        self.tokenizer_ = Pieces(self)
        if loras:
            self._add_loras(loras, path)
        # Their fallbacks are a template guessed by its text, and Llama 2's for a model that has none.
        self.chat_handler = make_chat_handler(self, self._template, path)
        self._n_alternatives: int | None = None  # that the request wants; None: no scores
        self._scores_seen: list[TokenScore] = []
        self._echoed: tuple[int, list[TokenScore]] = (
            0,
            [],
        )  # last prompt scored: alternatives, scores

    @property
    def context_params(self) -> Any:
        """Parameters of llama.cpp's context."""
        return self._context_params

    @context_params.setter
    def context_params(self, params: Any) -> None:
        # Llama has no argument for it, and llama.cpp's default reserves a row per token of a batch
        params.n_outputs_max = 0 if self.reads_whole else OUTPUTS
        self._context_params = params

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the GGUF, without chat templates."""
        return self._metadata

    @metadata.setter
    def metadata(self, found: dict[str, str]) -> None:
        # Llama would compile all templates in this process, where nothing bounds a hostile one
        self._template = found.get(_TEMPLATE)
        self._metadata = {k: v for k, v in found.items() if not k.startswith(_TEMPLATE)}

    def _add_loras(self, loras: Sequence[Lora], path: Path) -> None:
        """Add adapters; Llama's own way takes one only, and then reads the weights into memory."""
        adapters = []
        for lora in loras:
            check_adapter(lora.path)
            adapters.append(_api.llama_adapter_lora_init(self.model, os.fsencode(lora.path)))
            if not adapters[-1]:
                raise _library.failure(f"{lora.path}: llama.cpp cannot add this LoRA to {path}")
        pointers = (_api.llama_adapter_lora_p_ctypes * len(loras))(*adapters)
        scales = (ctypes.c_float * len(loras))(*(lora.scale for lora in loras))
        if _api.llama_set_adapters_lora(self.ctx, pointers, len(loras), scales):
            raise _library.failure(f"{path}: the LoRA adapters do not fit")

    # -- generation: Llama's own loop, which stops, counts and scores

    def eval(self, tokens: Sequence[int]) -> None:
        """Run tokens through the model, and stop between two batches if that is asked."""
        for start in range(0, max(len(tokens), 1), BATCH):
            current_run.get().check()
            super().eval(tokens[start : start + BATCH])

    def sample(self, *args: Any, **settings: Any) -> int:
        """Choose the next token, and keep its score where scores are wanted."""
        token: int = super().sample(*args, **settings)
        if self._n_alternatives is not None:
            self._scores_seen.append(self._score(_api.llama_get_logits_ith(self.ctx, -1), token))
        return token

    def _init_sampler(self, *args: Any, grammar: Any = None, **settings: Any) -> Any:
        """Refuse a grammar that llama.cpp cannot read; Llama would go on without one, and crash."""
        if grammar is not None:
            text, root = grammar._grammar.encode(), grammar._root.encode()
            probe = _api.llama_sampler_init_grammar(self._model.vocab, text, root)
            if not probe:
                raise ValueError("the grammar of the wanted format cannot be read")
            _api.llama_sampler_free(probe)
        return super()._init_sampler(*args, grammar=grammar, **settings)

    def generate(self, tokens: Sequence[int], **settings: Any) -> Iterator[int]:
        """Yield tokens that follow a prompt, and count both."""
        run = current_run.get()
        run.prompt_tokens += len(tokens)
        loop = LoopWatch()
        for token in super().generate(tokens, **settings):
            if not self._is_end(token):
                run.note_token()
            yield token
            if loop.push(token):
                return

    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        logprobs: int | None = None,
        echo: bool = False,
        max_tokens: int | None = 16,
        stream: bool = False,
        **settings: Any,
    ) -> Any:
        """Complete a prompt.

        Parameters
        ----------
        prompt : str or sequence of int
            A text, or its tokens exactly as they are.
        logprobs : int, optional
            Log-probabilities are wanted, and of so many of the likeliest tokens.
        echo : bool
            Whether the answer begins with the prompt; not with `stream`.
        max_tokens : int, optional
            At most so many; by default as many as there is room for. 0 with `echo`: only the prompt.
        stream : bool
            Yield pieces of the answer instead of returning it.
        **settings
            As of `Llama.create_completion`.

        Raises
        ------
        ValueError
            The prompt is empty, too long, or has tokens that the model does not know; or the model
            only embeds.
        """
        if self.reads_whole:
            raise ValueError("this model embeds texts and does not continue them")
        settings.pop("suffix", None)
        tokens = self._read_prompt(prompt)
        self._check_bias(settings.get("logit_bias"))
        self._n_alternatives = logprobs
        self._scores_seen = []
        said = self._text_of(prompt, tokens)
        scores = self._score_prompt(tokens) if echo and logprobs is not None else []
        if isinstance(prompt, str):
            scores = scores[len(tokens) - len(self._without_bos(tokens)) :]
        completion: Any
        if max_tokens == 0:
            current_run.get().prompt_tokens += len(tokens)
            completion = empty_completion(settings.get("model") or "", len(tokens))
        else:
            completion = super().create_completion(
                list(tokens), max_tokens=max_tokens, stream=stream, **settings
            )
        if stream:
            return completion if logprobs is None else self._add_to_stream(completion, len(said))
        choice = completion["choices"][0]
        if logprobs is not None:
            fresh = self._within(self._scores_seen, len(choice["text"].encode()))
            if echo and not fresh:
                # lm-evaluation-harness takes the last token of all for the answer's, even if it ends
                fresh = self._scores_seen[:1]
            start = 0 if echo else len(said)
            choice["logprobs"] = self._write_logprobs([*scores, *fresh], start)
        if echo:
            choice["text"] = said + choice["text"]
        return completion

    def _read_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            adds_bos = self._model.add_bos_token()
            tokens: list[int] = self.tokenize(prompt.encode(), add_bos=adds_bos, special=True)
        else:
            tokens = list(prompt)
        if not tokens:
            raise ValueError("the prompt is empty")
        if not all(0 <= token < self._n_vocab for token in tokens):
            raise ValueError(f"the prompt has a token that is not 0 to {self._n_vocab - 1}")
        if len(tokens) >= self._n_ctx:
            raise ValueError(
                f"Requested tokens ({len(tokens)}) exceed context window of {self._n_ctx}"
            )
        return tokens

    def write_text(self, tokens: Sequence[int]) -> str:
        """Text that gives these tokens again: with control tokens, without a vocabulary's own space."""
        pieces = [self.tokenizer_.piece(token) for token in tokens]  # refuses what is no token
        size = sum(map(len, pieces)) + 64 * len(pieces)  # room for the names of control tokens
        ids = (ctypes.c_int32 * len(pieces))(*tokens)
        buffer = ctypes.create_string_buffer(size)
        vocab = self._model.vocab
        n = _api.llama_detokenize(vocab, ids, len(pieces), buffer, size, False, True)
        if n < 0:
            raise ValueError("llama.cpp cannot write these tokens as text")
        return buffer.raw[:n].decode("utf-8", errors="replace")

    def _check_bias(self, bias: dict[Any, float] | None) -> None:
        if not all(0 <= int(token) < self._n_vocab for token in bias or ()):
            raise ValueError(f"logit_bias: a token is not 0 to {self._n_vocab - 1}")

    def _without_bos(self, tokens: list[int]) -> list[int]:
        """Tokens of a text, bar the one that `_read_prompt` put in front."""
        return tokens[1:] if self._model.add_bos_token() else tokens

    def _text_of(self, prompt: str | Sequence[int], tokens: list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        text: bytes = self.detokenize(tokens)
        return text.decode("utf-8", errors="replace")

    # -- log-probabilities

    def _score(self, logits: Any, token: int) -> TokenScore:
        """Score a token by a row of llama.cpp's logits."""
        row: Float32 = np.ctypeslib.as_array(logits, shape=(self._n_vocab,))
        return score_token(row, token, self._n_alternatives or 0)

    def _score_prompt(self, tokens: list[int]) -> list[TokenScore]:
        """Score all tokens of a prompt, and leave them in the context.

        What the last scored prompt and this one begin with is neither computed nor scored again: the
        options of a question come one after the other.
        """
        n_alternatives, old = self._echoed
        known = old if n_alternatives == self._n_alternatives else []
        common = _common_length([score.token for score in known], tokens)
        # Scores need the logits of the token before, so the last common one is computed again.
        start = max(min(common, _common_length(self._input_ids.tolist(), tokens)) - 1, 0)
        if start == 0 or not self._ctx.kv_cache_seq_rm(-1, start, -1):
            self.reset()
            self._ctx.kv_cache_clear()
            start = 0
        self.n_tokens = start
        scores = known[: start + 1] if common else [TokenScore(tokens[0], None)]
        self._requires_eval = True
        for first in range(start, len(tokens), OUTPUTS):
            current_run.get().check()
            part = tokens[first : first + OUTPUTS]
            self._batch.set_batch(batch=part, n_past=first, logits_all=True)
            self._ctx.decode(self._batch)
            self.input_ids[first : first + len(part)] = part
            self.n_tokens = first + len(part)
            for i, token in enumerate(tokens[first + 1 : first + len(part) + 1]):
                scores.append(self._score(_api.llama_get_logits_ith(self.ctx, i), token))
        self._requires_eval = False  # the last token's logits are there: sampling may begin
        self._echoed = (self._n_alternatives or 0, scores)
        return scores

    def _within(self, scores: Sequence[TokenScore], n_bytes: int) -> list[TokenScore]:
        """Take the tokens of so many bytes of text; what ends an answer is not in it."""
        taken, end = [], 0
        for score in scores:
            end += len(self.tokenizer_.piece(score.token))
            if end > n_bytes or self._is_end(score.token):
                break
            taken.append(score)
        return taken

    def _is_end(self, token: int) -> bool:
        return bool(_api.llama_vocab_is_eog(self._model.vocab, token))

    def _add_to_stream(self, chunks: Iterator[dict[str, Any]], offset: int) -> Iterator[Any]:
        """Give each piece of an answer the scores of its tokens."""
        n_written = n_bytes = 0
        for chunk in chunks:
            choice = chunk["choices"][0]
            n_bytes += len(choice["text"].encode())
            fresh = self._within(self._scores_seen, n_bytes)[n_written:]
            n_written += len(fresh)
            if fresh:
                choice["logprobs"] = self._write_logprobs(fresh, offset)
            offset += len(choice["text"])
            yield chunk

    def _write_logprobs(self, scores: Sequence[TokenScore], offset: int) -> dict[str, Any]:
        wanted = bool(self._n_alternatives)
        return write_logprobs(scores, self.tokenizer_.piece, offset, alternatives=wanted)

    # -- embeddings

    def create_embedding(self, input: str | list[str], model: str | None = None) -> dict[str, Any]:
        """Embed texts with the weights and the context that also generate.

        The pooling is what the GGUF names, else the mean over all tokens; vectors have length 1, as
        OpenAI's have.

        Parameters
        ----------
        input : str or list of str
            The texts; none longer than the context.
        model : str, optional
            Name for the answer.
        """
        texts = [input] if isinstance(input, str) else input
        prompts = [self._read_prompt(text) for text in texts]
        current_run.get().prompt_tokens += (n_tokens := sum(map(len, prompts)))
        _api.llama_set_embeddings(self.ctx, True)
        try:
            vectors = [embed(self, tokens) for tokens in prompts]
        finally:
            _api.llama_set_embeddings(self.ctx, False)
            self.reset()
            self._ctx.kv_cache_clear()
        data = [
            {"object": "embedding", "embedding": vector, "index": i}
            for i, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return {"object": "list", "data": data, "model": model or "", "usage": usage}


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))

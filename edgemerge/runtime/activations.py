"""Importances of a model's weights: squares of what is multiplied with each column, summed over a text.

As llama.cpp's llama-imatrix, whose sums these are (`IMatrixCollector::collect_imatrix` and `compute_imatrix`
of tools/imatrix/imatrix.cpp): the text is cut into chunks, each is read on its own, and llama.cpp calls back
before and after each product of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgemerge.errors import FormatError, RuntimeFailure
from edgemerge.native import KernelFile
from edgemerge.output.importance_file import Squares
from edgemerge.runtime.ggml_tensors import F32, Ggml, Tensor
from edgemerge.runtime.llama import Model
from edgemerge.runtime.worker import Worker
from edgemerge.types import Progress

__all__ = ["measure_importances"]

LEAST_TOKENS = 16  # of a batch: llama-imatrix does not look at smaller ones

importance = KernelFile("importance")


def measure_importances(
    model: Model,
    chunks: Sequence[Sequence[int]],
    *,
    n_batch: int,
    with_output: bool = False,
    progress: Progress,
) -> dict[str, Squares]:
    """Sum the squares of a model's activations over chunks of text.

    Parameters
    ----------
    model : Model
        A loaded model.
    chunks : sequence of (n_ctx,) int
        As `edgemerge.runtime.evaluation.perplexity.cut_text` gives them.
    n_batch : int
        Tokens that are computed at a time. llama.cpp keeps n_batch x n_vocab logits.
    with_output : bool
        Whether the matrix that gives the logits counts, if it is one of its own.
    progress : callable
        Called with chunks done and chunks in all; may raise to stop.

    Returns
    -------
    dict of str to Squares
        By GGUF tensor name.

    Raises
    ------
    FormatError
        The model computes infinity or NaN.
    RuntimeFailure
        Batches are too short, or llama.cpp fails, or is of another version than this reads.
    """
    if n_batch < LEAST_TOKENS:
        raise RuntimeFailure(
            f"importances need batches of {LEAST_TOKENS} tokens, and these have {n_batch}: give a larger "
            "-c or --batch"
        )
    n_ctx = len(chunks[0])
    worker = Worker()  # Ctrl-C would be lost in a callback on the main thread
    collector = _Collector(Ggml(model.library), model.path, worker, with_output=with_output)
    callback = model.api.llama_cpp.ggml_backend_sched_eval_callback(collector.watch)
    with (
        worker,
        worker.do(
            model.context, n_ctx, n_batch=n_batch, n_outputs=n_batch, cb_eval=callback
        ) as context,
    ):
        collector.is_on = True  # only now, as finding the fastest threads computes too
        for done, chunk in enumerate(chunks):
            progress(done, len(chunks))
            context.clear()
            for start in range(0, n_ctx, n_batch):
                tokens = chunk[start : start + n_batch]
                # Logits of all: else llama.cpp leaves most tokens out of the last layer.
                worker.do(context.decode, tokens, [True] * len(tokens), position=start)
                if collector.error is not None:
                    raise collector.error
        progress(len(chunks), len(chunks))
    if not collector.sums:
        raise RuntimeFailure(
            f"{model.path}: llama.cpp multiplies no matrix of its blocks here that could be watched"
        )
    return collector.sums


class _Collector:
    """Sums squares as llama.cpp calls `watch`. Until `is_on`, nothing is looked at."""

    def __init__(self, ggml: Ggml, path: Path, worker: Worker, *, with_output: bool) -> None:
        self.sums: dict[str, Squares] = {}
        self.error: BaseException | None = None
        self.is_on = False
        self._ggml = ggml
        self._path = path
        self._worker = worker
        self._with_output = with_output

    def watch(self, address: int, is_asking: bool, _user_data: object) -> bool:
        """Say whether a result's inputs are wanted; then, when it is computed, take them.

        The last answer tells whether to go on. An exception must not pass through llama.cpp.
        """
        try:
            tensor = Tensor.from_address(address)
            if is_asking:
                return self.is_on and self.error is None and self._is_wanted(tensor)
            if tensor.op == self._ggml.expert_matmul:
                self._add_experts(tensor)
            else:
                self._add_whole(tensor)
        except BaseException as error:
            self.error = error
        return self.error is None and not self._worker.is_stopped

    def _is_wanted(self, tensor: Tensor) -> bool:
        if tensor.op == self._ggml.expert_matmul:
            return bool(tensor.src[1].contents.type == F32)
        if tensor.op != self._ggml.matmul:
            return False
        x = tensor.src[1].contents
        if x.ne[1] < LEAST_TOKENS or x.type != F32:
            return False
        name = _name(tensor)
        return name.startswith("blk.") or (self._with_output and name == "output.weight")

    def _add_whole(self, tensor: Tensor) -> None:
        """Add all rows; where there are several matrices, each row to that which it is multiplied with."""
        weights, x = tensor.src[0].contents, tensor.src[1].contents
        n_matrices = weights.ne[2] * weights.ne[3]
        entry = self._entry(_name(tensor), x.ne[0], n_matrices, n_counts=1)
        outer, inner = np.divmod(np.arange(x.ne[3] * x.ne[2]), x.ne[2])
        matrices = outer % weights.ne[3] * weights.ne[2] + inner % weights.ne[2]
        rows = np.arange(x.ne[3] * x.ne[2] * x.ne[1])
        self._add(tensor, entry, rows, np.repeat(matrices, x.ne[1]))
        entry.counts += rows.size // n_matrices

    def _add_experts(self, tensor: Tensor) -> None:
        """Add each row to the experts that were chosen for it, in llama-imatrix's order."""
        weights, x = tensor.src[0].contents, tensor.src[1].contents
        n_experts = weights.ne[2]
        entry = self._entry(_name(tensor), x.ne[0], n_experts, n_counts=n_experts)
        chosen = self._ggml.read_ids(tensor.src[2].contents).T.astype(np.int64)  # (slots, tokens)
        if chosen.min() < 0 or chosen.max() >= n_experts:
            raise RuntimeFailure(f"llama.cpp chose an expert that {_name(tensor)} does not have")
        slots = np.arange(len(chosen))[:, None] % x.ne[1]
        rows = np.arange(x.ne[2])[None, :] * x.ne[1] + slots
        self._add(tensor, entry, rows.ravel(), chosen.ravel())
        entry.counts += np.bincount(chosen.ravel(), minlength=n_experts)

    def _entry(self, name: str, n_cols: int, n_matrices: int, *, n_counts: int) -> Squares:
        entry = self.sums.get(name)
        if entry is None:
            entry = Squares(
                np.zeros((n_matrices, n_cols), np.float32), np.zeros(n_counts, np.int64)
            )
            self.sums[name] = entry
        if entry.sums.shape != (n_matrices, n_cols) or entry.counts.size != n_counts:
            raise RuntimeFailure(
                f"llama.cpp uses {name} in two ways, whose importances cannot be told apart"
            )
        return entry

    def _add(
        self, tensor: Tensor, entry: Squares, rows: NDArray[np.int64], matrices: NDArray[np.int64]
    ) -> None:
        x = self._ggml.read_rows(tensor.src[1].contents)
        flat = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
        importance.add_squares(flat, rows, np.ascontiguousarray(matrices), entry.sums)
        if not np.isfinite(entry.sums).all():
            raise FormatError(
                "is multiplied with infinity or NaN, so the model is damaged; get it again",
                path=self._path,
                tensor=_name(tensor),
            )


def _name(tensor: Tensor) -> str:
    """Name the weights of a product, without what a scheduler puts around it, as in CUDA0#NAME#0."""
    name = str(tensor.src[0].contents.name.decode("utf-8", "replace"))
    parts = name.split("#")
    return parts[1] if len(parts) > 1 else name

"""Which attention heads of a model may be permuted, and which rows and columns are permuted with them.

A layer computes the same function when its KV groups are permuted, and the query heads inside each
group, jointly on the rows of q, k and v (with their biases) and the columns of o. Nothing else about
heads is free: a query head belongs to its group, and inside a head every rotary plane has a frequency
of its own. `layer_geometry` says per layer whether that holds and which tensors are cut how;
`row_order` and `column_order` turn a `HeadPlan` into indices. No tensor data is read here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edgemerge.alignment.records import HeadAxis, HeadBlocks, HeadPlan, LayerHeads, Mix, Skipped
from edgemerge.formats.architectures import layer_index
from edgemerge.formats.gguf.metadata import Array, get_value
from edgemerge.types import Float32, Source, TensorSpec

__all__ = [
    "column_mix",
    "column_order",
    "layer_geometry",
    "row_mix",
    "row_order",
    "row_runs",
]

log = logging.getLogger(__name__)

Index = NDArray[np.int64]
Sparse = tuple[Index, Index, Float32]  # indptr (n + 1,), indices (nnz,), weights (nnz,)

# Architectures whose fused attn_qkv llama.cpp cuts as [q; k; v] (`build_qkv` and its precursors).
FUSED = {"phi3", "phi2", "gpt2", "gptneox", "falcon", "qwen", "starcoder", "codeshell", "chatglm"}
FUSED |= {"dbrx", "glm4"}
# Architectures where llama.cpp sets f_max_alibi_bias by itself; others state it in their metadata.
ALIBI = {"bloom", "refact", "jina-bert-v2"}
BAICHUAN_13B_LAYERS = 40  # and of the Baichuan models, only this one

# By name without `blk.N.`. Shared by all heads, or in the residual stream: they stay as they are.
UNTOUCHED = {"attn_norm", "attn_norm_2", "attn_output_norm", "attn_rot_embd"}
MOVED = {"attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output"}
PER_HEAD = {"attn_q_norm", "attn_k_norm", "attn_sinks", "attn_sub_norm"}
LATENT = {"attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b", "attn_k_b", "attn_v_b"}
RECURRENT = ("ssm_", "time_mix_", "shortconv.")


class _Unfit(Exception):
    """A layer cannot be aligned; the text says why."""


def layer_geometry(source: Source) -> list[LayerHeads | Skipped]:
    """Say for every layer how its heads cut its tensors, or why they cannot be permuted.

    Parameters
    ----------
    source : Source
        An open model; its metadata and the shapes of its tensors are read.

    Returns
    -------
    list of LayerHeads or Skipped
        One per layer, in order. Every skipped layer is logged.
    """
    layers: dict[int, dict[str, TensorSpec]] = {}
    for name, spec in source.specs().items():
        if (layer := layer_index(name)) is not None:
            layers.setdefault(layer, {})[name.split(".", 2)[2]] = spec
    found: list[LayerHeads | Skipped] = []
    for layer, specs in sorted(layers.items()):
        try:
            found.append(_layer_heads(source, layer, specs))
        except _Unfit as reason:
            log.info("%s: layer %d is not aligned: %s", source.path, layer, reason)
            found.append(Skipped(layer, str(reason)))
    return found


def _layer_heads(source: Source, layer: int, specs: Mapping[str, TensorSpec]) -> LayerHeads:
    _refuse_model(source)
    _refuse_layer(specs)
    n_heads = _count(source, "head_count", layer, None)
    n_kv_heads = _count(source, "head_count_kv", layer, n_heads)
    if not n_heads or not n_kv_heads:
        raise _Unfit("the layer has no attention heads")
    if n_heads % n_kv_heads:
        raise _Unfit(f"{n_heads} query heads do not divide among {n_kv_heads} KV heads")
    if "attn_output.weight" not in specs:
        raise _Unfit("attn_output.weight is missing")
    key = _length(source, "key_length", specs.get("attn_q.weight"), n_heads)
    value = _length(source, "value_length", specs.get("attn_v.weight"), n_kv_heads)
    q, k = HeadBlocks("head", n_heads, key), HeadBlocks("group", n_kv_heads, key)
    v, o = HeadBlocks("group", n_kv_heads, value), HeadBlocks("head", n_heads, value)
    parts = {"attn_q": (q,), "attn_k": (k,), "attn_v": (v,), "attn_qkv": (q, k, v)}
    axes: dict[str, HeadAxis] = {}
    for stem, spec in specs.items():
        module, _, suffix = stem.rpartition(".")
        if module in parts:
            axes[spec.name] = _whole_axis(spec, suffix, parts[module])
        elif module == "attn_output" and suffix == "weight":
            axes[spec.name] = _checked(spec, HeadAxis("columns", (o,)))
        elif module in PER_HEAD:
            shared = {"attn_q_norm": q, "attn_k_norm": k, "attn_sub_norm": o}.get(module)
            if (axis := _norm_axis(spec, shared or HeadBlocks("head", n_heads, 1))) is not None:
                axes[spec.name] = axis
    return LayerHeads(layer, n_heads, n_kv_heads, key, value, axes)


# -- eligibility -----------------------------------------------------------------------------------


def _refuse_model(source: Source) -> None:
    """Refuse what forbids permuting heads in any layer of a model."""
    metadata, arch = source.metadata(), source.architecture
    baichuan_13b = (
        arch == "baichuan" and get_value(metadata, f"{arch}.block_count") == BAICHUAN_13B_LAYERS
    )
    if arch in ALIBI or baichuan_13b or get_value(metadata, f"{arch}.attention.max_alibi_bias"):
        raise _Unfit("ALiBi gives every head index a slope of its own")
    if get_value(metadata, f"{arch}.attention.shared_kv_layers"):
        raise _Unfit("layers share one another's keys and values")
    if arch not in FUSED and any(".attn_qkv." in name for name in source.specs()):
        raise _Unfit(f"the order of q, k and v in attn_qkv is not known for {arch}")


def _refuse_layer(specs: Mapping[str, TensorSpec]) -> None:
    modules = {stem.rpartition(".")[0] or stem for stem in specs}
    if any(module.startswith(RECURRENT) for module in modules):
        raise _Unfit("the layer mixes tokens by a recurrence or convolution")
    if modules & LATENT:
        raise _Unfit("latent attention (MLA) compresses keys and values across heads")
    wanted = {"attn_qkv"} if "attn_qkv" in modules else {"attn_q", "attn_k", "attn_v"}
    for module in sorted(wanted):
        if f"{module}.weight" not in specs:
            raise _Unfit(f"{module}.weight is missing")
    for stem in specs:
        module, _, suffix = stem.rpartition(".")
        known = module in UNTOUCHED | MOVED | PER_HEAD and suffix in ("weight", "bias")
        if stem.startswith("attn_") and not known:
            raise _Unfit(f"how {stem} depends on heads is not known")


def _count(source: Source, key: str, layer: int, default: int | None) -> int:
    """Read a head count, which some architectures state per layer."""
    value = get_value(source.metadata(), f"{source.architecture}.attention.{key}", default)
    if isinstance(value, Array):
        value = value[layer] if layer < len(value) else None
    if not isinstance(value, int):
        raise _Unfit(f"the metadata does not state attention.{key}")
    return value


def _length(source: Source, key: str, spec: TensorSpec | None, n_blocks: int) -> int:
    """Length of a head: as stated, else from the tensor, else an equal part of the embedding."""
    arch, metadata = source.architecture, source.metadata()
    value = get_value(metadata, f"{arch}.attention.{key}")
    if value is None and spec is not None and spec.n_rows % n_blocks == 0:
        value = spec.n_rows // n_blocks
    if value is None:
        n_embd = get_value(metadata, f"{arch}.embedding_length")
        n_heads = get_value(metadata, f"{arch}.attention.head_count")
        if isinstance(n_embd, int) and isinstance(n_heads, int) and n_heads:
            value = n_embd // n_heads
    if not isinstance(value, int) or value < 1:
        raise _Unfit(f"the length of a head ({key}) is not known")
    return value


def _whole_axis(spec: TensorSpec, suffix: str, parts: tuple[HeadBlocks, ...]) -> HeadAxis:
    """Rows of a projection, or the elements of its bias."""
    return _checked(spec, HeadAxis("rows" if suffix == "weight" else "columns", parts))


def _norm_axis(spec: TensorSpec, blocks: HeadBlocks) -> HeadAxis | None:
    """Cut a vector per head, flat or as a matrix; None where all heads share one vector."""
    if len(spec.shape) == 1 and spec.n_cols == blocks.length != blocks.count * blocks.length:
        return None
    if spec.shape == (blocks.count, blocks.length):
        return HeadAxis("rows", (HeadBlocks(blocks.owner, blocks.count, 1),))
    return _checked(spec, HeadAxis("columns", (blocks,)))


def _checked(spec: TensorSpec, axis: HeadAxis) -> HeadAxis:
    size = spec.n_rows if axis.axis == "rows" else spec.n_cols
    wanted = sum(part.count * part.length for part in axis.parts)
    is_vector = len(spec.shape) == 1
    if size != wanted or (axis.axis == "rows" and is_vector) or len(spec.shape) > 2:
        raise _Unfit(
            f"{spec.name} is {list(spec.shape)}, but the heads make its {axis.axis} {wanted}"
        )
    return axis


# -- from a plan to indices --------------------------------------------------------------------------


def row_order(plan: HeadPlan, name: str) -> Index | None:
    """Rows of the model's tensor in the reference's order of heads.

    Parameters
    ----------
    plan : HeadPlan
        Of the layer that the tensor belongs to.
    name : str
        GGUF name of the tensor in the model that is permuted.

    Returns
    -------
    (n_rows,) int64 or None
        `w[order]` is in the reference's order; None where rows stay.
    """
    return _order(plan, name, "rows")


def column_order(plan: HeadPlan, name: str) -> Index | None:
    """Columns (of o, or elements of a vector) in the reference's order of heads.

    Parameters
    ----------
    plan : HeadPlan
        Of the layer that the tensor belongs to.
    name : str
        GGUF name of the tensor in the model that is permuted.

    Returns
    -------
    (n_cols,) int64 or None
        `w[..., order]` is in the reference's order; None where columns stay.
    """
    return _order(plan, name, "columns")


def _order(plan: HeadPlan, name: str, axis: str) -> Index | None:
    cut = plan.geometry.axes.get(name)
    if cut is None or cut.axis != axis or plan.is_identity:
        return None
    orders, first = [], 0
    for part in cut.parts:
        blocks = np.array(plan.heads if part.owner == "head" else plan.kv_groups, np.int64)
        orders.append(_spread(blocks, part.length) + first)
        first += part.count * part.length
    return np.concatenate(orders)


def _spread(blocks: Index, length: int) -> Index:
    """List the indices of all elements of some blocks."""
    return (blocks[:, None] * length + np.arange(length)).reshape(-1)


def row_runs(order: Index, start: int, stop: int) -> list[tuple[int, int, int]]:
    """Cut `order[start:stop]` into runs of consecutive rows, as few reads as possible.

    Parameters
    ----------
    order : (n_rows,) int64
        From `row_order`.
    start, stop : int
        The rows wanted, in the reference's order.

    Returns
    -------
    list of (at, first, last)
        Rows [first, last) of the model's tensor belong at row `at` of the block.
    """
    rows = order[start:stop]
    if rows.size == 0:
        return []
    cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return [(a, int(rows[a]), int(rows[a]) + b - a) for a, b in pairwise(cuts)]


def row_mix(plan: HeadPlan, name: str) -> Sparse | None:
    """Rows of the soft alignment, as a CSR matrix that multiplies the model's tensor from the left.

    Parameters
    ----------
    plan : HeadPlan
        Of the layer that the tensor belongs to.
    name : str
        GGUF name of the tensor in the model that is permuted.

    Returns
    -------
    indptr (n_rows + 1,) int64, indices (nnz,) int64, weights (nnz,) float32; or None
        New row i is the sum of weights[p] times row indices[p] for p in indptr[i]..indptr[i + 1]:
        T = n P, the barycentric projection of methods of optimal transport (Imfeld et al. 2024).
    """
    return _mix(plan, name, "rows")


def column_mix(plan: HeadPlan, name: str) -> Sparse | None:
    """Columns of the soft alignment; as `row_mix`, for columns of o and elements of vectors.

    Parameters
    ----------
    plan : HeadPlan
        Of the layer that the tensor belongs to.
    name : str
        GGUF name of the tensor in the model that is permuted.
    """
    return _mix(plan, name, "columns")


def _mix(plan: HeadPlan, name: str, axis: str) -> Sparse | None:
    cut = plan.geometry.axes.get(name)
    if cut is None or cut.axis != axis or _is_identity(plan.soft_heads):
        return None
    counts, indices, weights, first = [], [], [], 0
    for part in cut.parts:
        for sources in plan.soft_heads if part.owner == "head" else plan.soft_groups:
            blocks = np.array([block for block, _ in sources], np.int64)
            counts.append(np.full(part.length, len(sources)))
            # One new row takes the same place of each of its blocks.
            indices.append(
                (_spread(blocks, part.length) + first).reshape(-1, part.length).T.ravel()
            )
            weights.append(np.tile(np.array([w for _, w in sources], np.float32), part.length))
        first += part.count * part.length
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    return indptr, np.concatenate(indices), np.concatenate(weights)


def _is_identity(mix: Mix) -> bool:
    return all(sources == ((i, 1.0),) for i, sources in enumerate(mix))

"""Types of tensors that ggml's CPU backend has no code for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from edgemerge.formats.llama_rules.violation import Violation
from edgemerge.types import TensorSpec

__all__ = ["check_tensors", "needs_f32"]

# `type_traits_cpu` of ggml-cpu.c: types without vec_dot, so that a matrix product calls a null pointer.
_NO_PRODUCT = ("Q8_1", "Q8_K", "F64", "I8", "I16", "I32", "I64")
# Tables of ids, which are no weights: `ffn_gate_tid2eid` (I32) and `d2t` (I64).
_ID_TABLES = ("ffn_gate_tid2eid.weight", "d2t")
# A row that is multiplied as a matrix is, in whatever type: `build_moe_ffn` of shared experts.
_MATRIX_ROWS = ("ffn_gate_inp_shexp.weight",)
# Of more than one dimension, and added, multiplied or convolved as vectors are.
_F32_PARTS = ("_norm.weight", "ssm_conv1d", "shortconv.conv.weight")
_F32_ENDS = (".ssm_a", ".ssm_d", ".bias")  # not ssm_dt.weight, which is a matrix


def needs_f32(spec: TensorSpec) -> bool:
    """Tell whether llama.cpp computes with a tensor in F32 alone.

    `binary_op` of ggml-cpu/binary-ops.cpp adds and multiplies F32 activations with F32 only, and aborts
    for all other types; `ggml_compute_forward_ssm_conv` reads floats.
    """
    if spec.name.endswith(_MATRIX_ROWS):
        return False
    return (
        len(spec.shape) == 1
        or spec.name.endswith(_F32_ENDS)
        or any(part in spec.name for part in _F32_PARTS)
    )


def check_tensors(specs: Mapping[str, TensorSpec]) -> Iterator[Violation]:
    """Yield the first tensor of a type that cannot be computed with, and of one that should be F32."""
    bad = next((spec for spec in specs.values() if _has_no_product(spec)), None)
    if bad is not None:
        yield Violation(
            f"has the type {bad.dtype}, which is not for weights",
            tensor=bad.name,
        )
    found = [s for s in specs.values() if s.dtype != "F32" and needs_f32(s) and s is not bad]
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        yield Violation(
            f"is {found[0].dtype} where llama.cpp computes with F32 alone{more}",
            is_mended=not any(_has_no_product(spec) for spec in found),
            tensor=found[0].name,
        )


def _has_no_product(spec: TensorSpec) -> bool:
    return spec.dtype in _NO_PRODUCT and not spec.name.endswith(_ID_TABLES)

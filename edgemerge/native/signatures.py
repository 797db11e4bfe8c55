"""The argument types of every kernel that is called from Python, in Numba's notation.

`f4[::1]` is a C-contiguous vector of float32, `u1[:,::1]` such a matrix of bytes, `i8`, `u8`, `f8`, `f4` and
`b1` are scalars. A kernel has one signature: another would be another compile. `edgemerge.native.compiler`
compiles by this table, a `Kernel` checks its arguments against it.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["KERNEL_NAMES", "SHARED", "SIGNATURES"]

# Files in kernels/ that are compiled into their callers; each may use those after it.
SHARED = ("affine_blocks", "affine_search", "lanes", "scalars", "llvm")

SIGNATURES: Mapping[str, Mapping[str, str]] = {
    "covariance": {
        "add_grams": "f4[:,::1], i8, f4[::1], f4[:,::1], f4[:,::1]",
        "combine": "f4[:,:,::1], f4[::1], f4[:,:,::1]",
        "solve_factors": "f8[::1], f8[::1], i8, f8[:,::1], f8[:,::1], f4[:,:,::1]",
    },
    "dare": {
        "drop_random": "u8, u8, u8, f4[::1]",
    },
    "della": {
        "drop_by_rank": "u8, u8, i8, f8, f8, b1, u4[::1], f4[::1]",
    },
    "deltas": {
        "measure": "f4[::1], f8[::1], f8[::1]",
        "squared_error": "f4[::1], f4[::1], f8[::1], f8[::1]",
        "scatter": "i4[::1], i8, i8, u1[::1], f4[::1], f4[::1]",
    },
    "fp4": {
        "decode_mxfp4": "u1[::1], f4[::1]",
        "decode_nvfp4": "u1[::1], f4[::1]",
        "encode_mxfp4": "f4[::1], u1[::1]",
        "encode_nvfp4": "f4[::1], u1[::1]",
    },
    "fusion": {
        "row_divergences": "f4[::1], f4[::1], i8, f8[::1], f8[::1]",
        "importances": "f4[::1], f4[::1], i8, f8[::1], f4[::1]",
        "take_important": "f8, f4[::1], f4[::1], f4[::1]",
    },
    "gram": {
        "row_grams": "f4[:,::1], i8, f8[::1], f8[:,:,::1]",
        "row_dots": "f4[::1], f4[::1], i8, f8[::1], f8[:,::1]",
        "add_rows": "f8[:,::1], f8[::1]",
        "combine_rows": "f4[:,::1], i8, f4[:,::1]",
        "add_column_dots": "f4[::1], f4[::1], f8[:,::1]",
        "combine_columns": "f4[:,::1], f4[:,::1]",
    },
    "half": {
        "decode_f16": "u2[::1], f4[::1]",
        "encode_f16": "f4[::1], u2[::1]",
        "decode_bf16": "u2[::1], f4[::1]",
        "encode_bf16": "f4[::1], u2[::1]",
    },
    "heads": {
        "draw_sketch": "u8, i8, i4[::1], f8[::1]",
        "sketch_rows": "f4[::1], i4[::1], f8[::1], f8[::1], f4[:,::1]",
        "sketch_columns": "f4[::1], i8, i4[::1], f8[::1], f8[:,::1]",
        "squared_norms": "f4[:,::1], f8[::1]",
        "squared_distances": "f4[:,::1], f4[:,::1], f8[:,::1]",
        "add_products": "f4[:,::1], f4[:,::1], f8[:,::1]",
    },
    "importance": {
        "gather_weighted": "f4[::1], f4[::1], i8, i8, f4, f4, f4[::1], f4[::1]",
        "add_squares": "f4[:,::1], i8[::1], i8[::1], f4[:,::1]",
        "add_changes": "f4[:,:,::1], i8, i8, f8, f4[:,::1], f4[::1]",
    },
    "iq1": {
        "decode_iq1_s": "u1[::1], f4[::1]",
        "decode_iq1_m": "u1[::1], f4[::1]",
    },
    "iq2": {
        "decode_iq2_xxs": "u1[::1], f4[::1]",
        "decode_iq2_xs": "u1[::1], f4[::1]",
        "decode_iq2_s": "u1[::1], f4[::1]",
    },
    "iq3": {
        "decode_iq3_xxs": "u1[::1], f4[::1]",
        "decode_iq3_s": "u1[::1], f4[::1]",
    },
    "iq4": {
        "decode_iq4_nl": "u1[::1], f4[::1]",
        "decode_iq4_xs": "u1[::1], f4[::1]",
        "search_iq4": "f4[::1], f4[::1], f4[::1]",
        "write_iq4_nl": "f4[::1], f4[::1], u1[::1]",
        "encode_iq4_nl": "f4[::1], f4[::1], u1[::1]",
        "write_iq4_xs": "f4[::1], f4[::1], u1[::1]",
        "encode_iq4_xs": "f4[::1], f4[::1], u1[::1]",
    },
    "linear": {
        "subtract": "f4[::1], f4[::1], i8[::1]",
        "weighted_sum": "f4[::1], f4[:,::1]",
        "add_changes": "f4[::1], f8, f4[:,::1], i8, i8[::1], f4[::1]",
        "add_deltas": "f4[::1], f4[::1], f8, f4[:,::1], f4[::1]",
        "add_scaled": "f4[::1], f8, f4[::1]",
    },
    "lora": {
        "add_product": "f4[:,::1], f4[:,::1], f8, f4[::1], f4[:,::1]",
        "rescale_rows": "f4[::1], f8[::1], f4[:,::1]",
    },
    "matrix_products": {
        "add_product": "f4[:,::1], f4[:,::1], f4[:,::1], f4[:,::1]",
        "project": "f4[:,::1], f4[:,::1], f4[:,::1], f4[:,::1]",
        "add_gram": "f4[:,::1], f8[:,::1]",
        "orthonormalise": "f4[:,::1], f8[::1]",
    },
    "nearswap": {
        "swap_near": "f8, f4[::1], f4[::1]",
    },
    "norms": {
        "row_norms": "f4[::1], i8, i8, f8[::1], f8[:,::1]",
        "count_overflows": "f4[::1], i8, i8[::1]",
    },
    "permute": {
        "mix_columns": "i8[::1], i8[::1], f4[::1], f4[::1], f4[::1]",
        "rotate_columns": "f4[:,:,::1], i8, i8, f4[::1], f4[::1]",
        "add_rotated_rows": "f4[:,::1], i8, i8, f4[:,::1], f4[:,::1]",
    },
    "q1_0": {
        "decode_q1_0": "u1[::1], f4[::1]",
        "encode_q1_0": "f4[::1], u1[::1]",
    },
    "q2_0": {
        "decode_q2_0": "u1[::1], f4[::1]",
        "encode_q2_0": "f4[::1], u1[::1]",
    },
    "q2_k": {
        "decode_q2_k": "u1[::1], f4[::1]",
        "write_quants_q2_k": "f4[::1], f4[::1], f4[::1], f4[::1], u1[::1]",
        "encode_q2_k": "f4[::1], f4[::1], u1[::1]",
    },
    "q3_k": {
        "decode_q3_k": "u1[::1], f4[::1]",
        "write_quants_q3_k": "f4[::1], f4[::1], f4[::1], u1[::1]",
        "encode_q3_k": "f4[::1], f4[::1], u1[::1]",
    },
    "q4_0": {
        "decode_q4_0": "u1[::1], f4[::1]",
        "encode_q4_0": "f4[::1], u1[::1]",
    },
    "q4_1": {
        "decode_q4_1": "u1[::1], f4[::1]",
        "encode_q4_1": "f4[::1], u1[::1]",
    },
    "q4_k": {
        "decode_q4_k": "u1[::1], f4[::1]",
        "write_quants_q4_k": "f4[::1], f4[::1], f4[::1], u1[::1]",
        "encode_q4_k": "f4[::1], f4[::1], u1[::1]",
    },
    "q5_0": {
        "decode_q5_0": "u1[::1], f4[::1]",
        "encode_q5_0": "f4[::1], u1[::1]",
    },
    "q5_1": {
        "decode_q5_1": "u1[::1], f4[::1]",
        "encode_q5_1": "f4[::1], u1[::1]",
    },
    "q5_k": {
        "decode_q5_k": "u1[::1], f4[::1]",
        "write_quants_q5_k": "f4[::1], f4[::1], f4[::1], u1[::1]",
        "encode_q5_k": "f4[::1], f4[::1], u1[::1]",
    },
    "q6_k": {
        "decode_q6_k": "u1[::1], f4[::1]",
        "write_q6_k": "f4[::1], f4[::1], f4[::1], f4[::1], f4[::1], u1[::1]",
        "encode_q6_k": "f4[::1], f4[::1], u1[::1]",
    },
    "q8_0": {
        "decode_q8_0": "u1[::1], f4[::1]",
        "encode_q8_0": "f4[::1], u1[::1]",
    },
    "ram": {
        "count_changes": "f8, f4[:,::1], u4[::1]",
        "add_changes": "f8, f4[::1], f4[:,::1], f4[::1]",
    },
    "sce": {
        "variances": "f4[:,::1], f4[::1]",
        "keep_marked": "f4[::1], f4[:,::1]",
        "add_agreeing": "f4[::1], f4[:,::1], f4[::1]",
    },
    "select": {
        "count_high": "f4[::1], u4[::1]",
        "count_low": "f4[::1], i8, u4[::1]",
        "count_ties": "i8, i8, f4[::1], i8[::1]",
        "find_tie": "i8, i8, f4[::1], i8[::1]",
        "keep_between": "i8, i8, f4[::1]",
    },
    "sinkhorn": {
        "sweep": "f8[::1], i4[::1], i4[::1], f8, i8, f8[:,::1], f8[:,::1]",
        "fill_plan": "f8[::1], i4[::1], i4[::1], f8, f8[:,::1], f8[::1]",
    },
    "small_matrices": {
        "multiply": "f8[:,::1], f8[:,::1], f8[:,::1]",
        "decompose": "f8[:,::1], f8[:,::1]",
    },
    "ternary": {
        "decode_tq1_0": "u1[::1], f4[::1]",
        "decode_tq2_0": "u1[::1], f4[::1]",
        "encode_tq1_0": "f4[::1], u1[::1]",
        "encode_tq2_0": "f4[::1], u1[::1]",
    },
    "ties": {
        "elect": "f4[::1], f4[::1], b1, f8, f4[:,::1], f4[:,::1], f4[::1]",
    },
    "weighted_affine": {
        "search_affine": "f4[::1], f4[::1], i8, f4[::1], f4[::1]",
        "write_q4_1_weighted": "f4[::1], f4[::1], u1[::1]",
        "write_q5_1_weighted": "f4[::1], f4[::1], u1[::1]",
    },
    "weighted_scales": {
        "write_scales_q4_k": "f4[::1], i8, f4[::1], u1[:,::1]",
        "write_scales_q2_k": "f4[::1], f4[::1], u1[:,::1]",
    },
    "weighted_symmetric": {
        "search_symmetric": "f4[::1], f4[::1], i8, f4[::1], f4[::1]",
        "write_scales_q3_k": "f4[::1], f4[::1], u1[::1]",
        "write_q4_0_weighted": "f4[::1], f4[::1], u1[::1]",
        "write_q5_0_weighted": "f4[::1], f4[::1], u1[::1]",
    },
}
"""File in kernels/ -> function -> argument types."""

KERNEL_NAMES = tuple(f"{file}.{name}" for file, kernels in SIGNATURES.items() for name in kernels)
"""All of them as FILE.KERNEL."""

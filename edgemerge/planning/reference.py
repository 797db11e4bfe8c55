"""How fast one core of the machine was that the project is measured on: an AMD EPYC with AVX-512.

`make bench ARGS='kernels profile'` measures the same on another machine. Others are compared with it by a
factor, as `Rates` says.
"""

from __future__ import annotations

__all__ = [
    "DECODE",
    "DECOMPOSE",
    "ENCODE",
    "IMPORTS",
    "KERNELS",
    "MERGE",
    "MULTIPLY",
    "OTHER_METHODS",
    "START",
    "WEIGHTED",
    "of_codec",
]

# Million elements that one core decodes and encodes in a second.
DECODE = {"F32": 13183, "F16": 16120, "BF16": 15704, "Q1_0": 3802, "Q2_0": 14908, "Q4_0": 10803}
DECODE |= {"Q4_1": 9847, "Q5_0": 8687, "Q5_1": 6893, "Q8_0": 17164, "Q2_K": 11835, "Q3_K": 8178}
DECODE |= {"Q4_K": 14282, "Q5_K": 8997, "Q6_K": 10903, "IQ4_NL": 8277, "IQ4_XS": 10978}
DECODE |= {"MXFP4": 12158, "NVFP4": 9484, "TQ1_0": 22098, "TQ2_0": 22169, "IQ1_S": 9041}
DECODE |= {"IQ1_M": 7427, "IQ2_XXS": 9303, "IQ2_XS": 8598, "IQ2_S": 8033, "IQ3_XXS": 7512}
DECODE |= {"IQ3_S": 5621}
ENCODE = {"F32": 15194, "F16": 14183, "BF16": 15207, "Q1_0": 2592, "Q2_0": 6052, "Q4_0": 2322}
ENCODE |= {"Q4_1": 2205, "Q5_0": 1790, "Q5_1": 1518, "Q8_0": 3636, "Q2_K": 366, "Q3_K": 450}
ENCODE |= {"Q4_K": 333, "Q5_K": 399, "Q6_K": 497, "IQ4_NL": 173, "IQ4_XS": 163, "MXFP4": 1044}
ENCODE |= {"NVFP4": 583, "TQ1_0": 5342, "TQ2_0": 9991}

# How many times as long encoding takes with an importance matrix, as both ran one after the other.
WEIGHTED = {"Q2_K": 10.0, "Q3_K": 12.0, "Q4_0": 28.0, "Q4_1": 52.0, "Q4_K": 5.6, "Q5_0": 24.0}
WEIGHTED |= {"Q5_1": 34.0, "Q5_K": 7.6, "Q6_K": 8.9, "IQ4_NL": 3.2, "IQ4_XS": 2.7}

# Nanoseconds of a method's own arithmetic for each element of each model, all passes together.
MERGE = {"passthrough": 0.0, "linear": 0.09, "task_arithmetic": 0.07, "slerp": 0.46, "ties": 0.78}
MERGE |= {"dare_ties": 0.5, "dare_linear": 0.4, "della": 1.84, "breadcrumbs": 1.0}
MERGE |= {"hierarchical": 0.55}
OTHER_METHODS = 1.0

# Nanoseconds of `methods.directions.eigenvectors`, for each element of the cube of the side: 11 with 64, 17
# with 256, 25 with 512.
DECOMPOSE = 17.0

# Nanoseconds of one of the products that `Method.multiplies` counts, in float32 and with 256 columns or more.
MULTIPLY = 0.03

START = 0.35  # CPU seconds until the first block: Python, imports, headers, the plan
IMPORTS = 0.12  # CPU seconds of them until what merges is imported

# Million elements a second of kernels that stand for the methods, of three models.
KERNELS = {"linear.weighted_sum": 5824, "ties.elect": 1427}


def of_codec(dtype: str, *, writes: bool) -> float:
    """Return the nanoseconds of one element of a ggml type."""
    return 1e3 / (ENCODE if writes else DECODE)[dtype]

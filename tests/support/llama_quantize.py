"""llama_model_quantize through ctypes, which is what llama-quantize calls, and models to give it.

The models are random, a few rows per tensor: the types of a file depend on names, on row lengths and on
the header alone. Nobody loads them, so that a tensor may have any name.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.quants.codec import block_size
from edgemerge.formats.quants.filetypes import FILE_TYPES
from edgemerge.types import TensorSpec


@dataclass
class Model:
    """A model's header: what decides about types."""

    architecture: str
    numbers: dict[str, int | list[int]]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def metadata(self) -> dict[str, bytes]:
        encoded = {"general.architecture": encode_value(self.architecture, "str")}
        for key, value in self.numbers.items():
            kind = "[u32]" if isinstance(value, list) else "u32"
            encoded[f"{self.architecture}.{key}"] = encode_value(value, kind)
        return encoded

    def specs(self, dtype: str | Callable[[str], str] = "F32") -> dict[str, TensorSpec]:
        dtypes = {name: dtype if isinstance(dtype, str) else dtype(name) for name in self.shapes}
        return {
            name: TensorSpec(name, shape, dtypes[name], nbytes(shape, dtypes[name]))
            for name, shape in self.shapes.items()
        }


def nbytes(shape: tuple[int, ...], dtype: str) -> int:
    block_len, block_bytes = block_size(dtype)
    return int(np.prod(shape)) // block_len * block_bytes


def make_model(
    architecture: str = "llama",
    n_layers: int = 4,
    n_cols: int = 256,
    n_ff: int = 512,
    heads: tuple[int | list[int], int | list[int]] = (4, 4),
    n_experts: int = 0,
    n_next: int = 0,
    tied: bool = False,
    fused: bool = False,
    extra: Mapping[str, tuple[int, ...]] | None = None,
) -> Model:
    """A model with the tensors that its architecture has, two rows high."""
    numbers: dict[str, int | list[int]] = {
        "context_length": 64,
        "embedding_length": 1024,
        "block_count": n_layers,
        "nextn_predict_layers": n_next,
        "attention.head_count": heads[0],
        "attention.head_count_kv": heads[1],
    }
    if n_experts:
        numbers |= {"expert_count": n_experts, "expert_used_count": 1}
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (3, n_cols),
        "rope_freqs.weight": (8,),
    }
    for i in range(n_layers):
        shapes |= {
            f"blk.{i}.{name}": shape for name, shape in layer(n_cols, n_ff, n_experts, fused)
        }
    shapes["output_norm.weight"] = (n_cols,)
    if not tied:
        shapes["output.weight"] = (3, n_cols)
    return Model(architecture, numbers, shapes | dict(extra or {}))


def layer(
    n_cols: int, n_ff: int, n_experts: int, fused: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "attn_norm.weight", (n_cols,)
    if fused:
        yield "attn_qkv.weight", (2, n_cols)
    else:
        for part in "qkv":
            yield f"attn_{part}.weight", (2, n_cols)
            yield f"attn_{part}.bias", (2,)
        yield "attn_q_norm.weight", (8,)
    yield "attn_output.weight", (2, n_cols)
    yield "ffn_norm.weight", (n_cols,)
    if n_experts:
        yield "ffn_gate_inp.weight", (n_experts, n_cols)
        yield "ffn_gate_inp_shexp.weight", (1, n_cols)
        yield "ffn_gate_exps.weight", (n_experts, 2, n_cols)
        yield "ffn_up_exps.weight", (n_experts, 2, n_cols)
        yield "ffn_down_exps.weight", (n_experts, 2, n_ff)
        yield "ffn_up_exps.bias", (n_experts, 2)
        yield "ffn_down_shexp.weight", (2, n_ff)
    else:
        yield "ffn_gate.weight", (2, n_cols)
        yield "ffn_up.weight", (2, n_cols)
        yield "ffn_down.weight", (2, n_ff)


@dataclass
class Quantiser:
    """llama_model_quantize on files in a folder of its own."""

    llama: Any
    folder: Path

    def write(self, model: Model, specs: Mapping[str, TensorSpec]) -> Path:
        path = self.folder / "in.gguf"
        writer = gguf.GGUFWriter(path, model.architecture)
        for key, value in model.numbers.items():
            add = writer.add_array if isinstance(value, list) else writer.add_uint32
            add(f"{model.architecture}.{key}", value)
        for key in ("layer_norm_rms_epsilon", "layer_norm_epsilon"):
            writer.add_float32(f"{model.architecture}.attention.{key}", 1e-5)
        rng = np.random.default_rng(0)
        for name, spec in specs.items():
            values = rng.standard_normal(spec.shape, dtype=np.float32)
            kind = gguf.GGMLQuantizationType[spec.dtype]
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def run(
        self,
        source: Path,
        file_type: str,
        overrides: Sequence[tuple[str, str]] = (),
        importance: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> dict[str, str] | None:
        """Types that llama.cpp gives the tensors of a file; None where it refuses the file.

        What it wrote stays in `out.gguf`.
        """
        params = self.llama.llama_model_quantize_default_params()
        params.ftype = FILE_TYPES[file_type].id
        params.allow_requantize = True
        params.nthread = 1
        params.tt_overrides = self._overrides(overrides)
        params.imatrix = self._importance(importance)
        target = self.folder / "out.gguf"
        if self.llama.llama_model_quantize(bytes(source), bytes(target), params):
            return None
        reader = gguf.GGUFReader(target)
        assert reader.get_field("general.file_type").contents() == FILE_TYPES[file_type].id
        return {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}

    def _overrides(self, pairs: Sequence[tuple[str, str]]) -> Any:
        """C's array of patterns and types, with an end mark; None where there are none."""
        row = self.llama.llama_model_tensor_override
        rows = [row(p.encode(), gguf.GGMLQuantizationType[dtype].value) for p, dtype in pairs]
        return (row * (len(rows) + 1))(*rows, row(None, 0)) if rows else None

    def _importance(self, weights: Mapping[str, NDArray[np.float32]] | None) -> Any:
        if weights is None:
            return None
        row = self.llama.llama_model_imatrix_data
        pointer = ctypes.POINTER(ctypes.c_float)
        rows = [row(n.encode(), w.ctypes.data_as(pointer), w.size) for n, w in weights.items()]
        return (row * (len(rows) + 1))(*rows, row(None, None, 0))


def converted(model: Model, half: str = "F16") -> dict[str, TensorSpec]:
    """The model as llama.cpp's `ModelBase.prepare_tensors` in conversion/base.py writes it."""
    parts = "FFN_GATE_INP FFN_GATE_INP_SHEXP POS_EMBD TOKEN_TYPES SSM_CONV1D SSM_CONV1D_Q"
    parts += " SSM_CONV1D_K SSM_CONV1D_V SHORTCONV_CONV TIME_MIX_FIRST TIME_MIX_W1 TIME_MIX_W2"
    parts += " TIME_MIX_DECAY_W1 TIME_MIX_DECAY_W2 TIME_MIX_LERP_FUSED V_ENC_EMBD_POS"
    parts += " A_ENC_EMBD_POS ALTUP_CORRECT_COEF ALTUP_PREDICT_COEF"
    patterns = [gguf.TENSOR_NAMES[gguf.MODEL_TENSOR[part]] for part in parts.split()]

    def dtype(name: str) -> str:
        bid = name.split(".")[1] if "." in name else ""
        always_f32 = {f"{pattern.format(bid=bid)}.weight" for pattern in patterns}
        is_matrix = len(model.shapes[name]) > 1 and name.endswith(".weight")
        return (
            half if is_matrix and "_norm.weight" not in name and name not in always_f32 else "F32"
        )

    return model.specs(dtype)

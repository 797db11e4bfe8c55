"""Which tensors of a file type get more bits, as llama.cpp's llama-quantize decides it.

A transcript of the rules of `llama_tensor_get_type_impl` in llama.cpp's src/llama-quant.cpp at
0c1e57098, for the file types of `filetypes.FILE_TYPES`; names of functions refer to that file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from edgemerge.errors import MismatchError
from edgemerge.formats.gguf.metadata import Array, get_value
from edgemerge.formats.gguf.types import block_size
from edgemerge.types import TensorSpec

__all__ = ["Mixture", "visiting_order"]

_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_ATTENTION_VALUES = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")
_LAYER = re.compile(r"blk\.(\d+)")

# Layers of the models that llama.cpp calls 70B (`LLM_TYPE_70B` in src/models/*.cpp). Architectures
# of llama's family also need grouped-query attention: 80 layers without it are the 65B model.
_LAYERS_OF_70B = {"llama": 80, "llama-embed": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}
_GROUPED_70B = ("llama", "llama-embed")

# File types whose rules ask for the layer of a tensor, and so for the number of layers.
_LAYERED = ("Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "IQ4_NL", "IQ4_XS")
# With eight experts the attention is small beside them: its output gets Q5_K in these.
_EXPERT_OUTPUT_Q5_K = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")


def visiting_order(name: str) -> tuple[int, str]:
    """Order in which llama.cpp walks the tensors, whatever their order in the file."""
    return (-1 if (layer := _layer(name)) is None else layer), name


@dataclass(slots=True)
class _Facts:
    """What the mixtures want to know of a model besides one tensor."""

    n_layers: int
    n_experts: int
    n_attention_values: int
    is_grouped_by_4: bool  # four or more query heads per key-value head
    is_70b: bool
    is_falcon: bool
    is_tied: bool


class Mixture:
    """The types of one model's tensors in one file type; ask in `visiting_order`.

    Parameters
    ----------
    file_type : str
        Name of the file type, e.g. `Q4_K_M`.
    default : str
        ggml type of a matrix that no rule singles out.
    specs : mapping of GGUF name to TensorSpec
        All tensors of the model.
    metadata : mapping of GGUF key to typed value
        block_count, expert_count, attention.head_count and the like are read from it.
    architecture : str
        GGUF's general.architecture.
    has_importance : bool
        Whether an importance matrix guides the encoders.

    Raises
    ------
    MismatchError
        The metadata lack block_count, and the file type depends on it.
    """

    def __init__(
        self,
        file_type: str,
        default: str,
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, bytes],
        architecture: str,
        *,
        has_importance: bool = False,
    ) -> None:
        self._name = file_type
        self._default = default
        self._has_importance = has_importance
        self._model = _describe(specs, metadata, architecture)
        if self._model.n_layers == 0 and (file_type in _LAYERED or has_importance):
            raise MismatchError(
                f"the model's metadata have no {architecture}.block_count, "
                f"which {file_type} depends on"
            )
        self._i_value = self._i_down = 0  # attention values and ffn_downs visited so far

    def choose(self, spec: TensorSpec) -> str:
        """Pick the ggml type of a matrix, before its row length has a say.

        Raises
        ------
        MismatchError
            The tensor's layer is not below block_count, where the mixture asks for it.
        """
        name = spec.name
        if name == "output.weight" or (self._model.is_tied and name in _EMBEDDINGS):
            return self._output(spec)
        if name in _EMBEDDINGS:
            return self._default
        if any(part in name for part in _ATTENTION_VALUES):
            self._i_value += 1
            return self._attention_value(self._i_value - 1)
        if "attn_k.weight" in name:
            return "Q8_0" if self._model.n_experts == 8 else self._default
        if "attn_output.weight" in name:
            return self._attention_output()
        if "ffn_down" in name and not ("ffn_up" in name or "ffn_gate" in name):
            self._i_down += 1
            return self._ffn_down(self._layer_of(name, self._i_down - 1))
        return self._default

    def _output(self, spec: TensorSpec) -> str:
        whole = spec.n_cols % block_size(self._default)[0] == 0
        return "Q6_K" if whole and self._default != "Q8_0" and not self._model.is_falcon else "Q8_0"

    def _attention_value(self, i: int) -> str:
        if self._model.n_experts == 8:  # small beside eight experts
            return "Q8_0"
        chosen = self._default
        match self._name:
            case "Q2_K":
                chosen = "Q4_K" if self._model.is_grouped_by_4 else "Q3_K"
            case "Q3_K_M":
                chosen = "Q5_K" if i < 2 else "Q4_K"
            case "Q3_K_L":
                chosen = "Q5_K"
            case "IQ4_NL" | "IQ4_XS" if self._model.is_grouped_by_4:
                chosen = "Q5_K"
            case "Q4_K_S" if i < 4:
                chosen = "Q5_K"
            case "Q4_K_M" | "Q5_K_M" if _gets_more_bits(i, self._model.n_attention_values):
                chosen = "Q6_K"
        # Eight query heads use each of a 70B model's value heads, so that the tensor is small.
        return "Q5_K" if self._model.is_70b and chosen in ("Q3_K", "Q4_K") else chosen

    def _attention_output(self) -> str:
        if self._model.is_falcon:
            return "Q4_K" if self._name == "Q3_K_L" else self._default
        if self._model.n_experts == 8:
            return "Q5_K" if self._name in _EXPERT_OUTPUT_Q5_K else self._default
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self._name, self._default)

    def _ffn_down(self, i: int) -> str:
        n, is_falcon = self._model.n_layers, self._model.is_falcon
        more = _gets_more_bits(i, n)
        match self._name:
            case "Q2_K":
                return "Q3_K"
            case "Q3_K_M":
                if i < n // 16:
                    return "Q5_K"
                return "Q4_K" if more or not is_falcon else "Q3_K"
            case "Q3_K_L":
                return "Q4_K" if is_falcon else "Q5_K"
            case "Q4_K_M" if is_falcon:
                return "Q6_K" if i < n // 16 else "Q5_K" if more else "Q4_K"
            case "Q4_K_M" | "Q5_K_M":
                return "Q6_K" if more else self._default
            case "Q4_K_S" if i < n // 8 and not is_falcon:
                return "Q5_K"
            case "IQ4_NL" | "IQ4_XS" if i < n // 8 and not self._has_importance:
                return "Q5_K"
            # Even with an importance matrix the first of them can come out wild in 4 and 5 bits.
            case "Q4_0" | "Q5_0" if i < n // 8 and self._has_importance:
                return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[self._name]
        return self._default

    def _layer_of(self, name: str, position: int) -> int:
        if self._model.n_experts <= 1:
            return position
        layer = _layer(name)  # several ffn_downs in a layer: the position says nothing
        if layer is None or layer >= self._model.n_layers:
            raise MismatchError(
                f"tensor {name!r} is in none of the {self._model.n_layers} layers that the "
                "model's metadata state",
                tensor=name,
            )
        return layer


def _describe(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, bytes], architecture: str
) -> _Facts:
    """Read off the metadata and the names what the mixtures depend on."""
    n_layers = _integer(metadata, f"{architecture}.block_count") or 0
    n_heads = _integer(metadata, f"{architecture}.attention.head_count")
    n_kv_heads = _integer(metadata, f"{architecture}.attention.head_count_kv")
    n_next = _integer(metadata, f"{architecture}.nextn_predict_layers") or 0
    is_grouped = n_kv_heads is not None and n_kv_heads != n_heads
    # `n_gqa`: without a count of its own there are as many key-value heads as query heads
    per_group = (n_heads or 0) // n_kv_heads if n_kv_heads else int(n_kv_heads is None)
    return _Facts(
        n_layers=n_layers,
        n_experts=_integer(metadata, f"{architecture}.expert_count") or 0,
        n_attention_values=sum(any(p in name for p in _ATTENTION_VALUES) for name in specs),
        is_grouped_by_4=per_group >= 4,
        is_70b=n_layers - n_next == _LAYERS_OF_70B.get(architecture)
        and (is_grouped or architecture not in _GROUPED_70B),
        is_falcon=architecture == "falcon",
        is_tied="output.weight" not in specs,
    )


def _integer(metadata: Mapping[str, bytes], key: str) -> int | None:
    """Return a number, or its value in the first layer where the model has one per layer."""
    value = get_value(metadata, key)
    if isinstance(value, Array):
        value = value[0] if value else None
    return value if isinstance(value, int) else None


def _layer(name: str) -> int | None:
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def _gets_more_bits(i: int, n: int) -> bool:
    """`use_more_bits`: the first and the last eighth, and every third layer between them."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2

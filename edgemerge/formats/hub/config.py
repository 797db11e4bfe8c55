"""config.json of a Hugging Face directory: checked, and as GGUF's keys of its architecture.

`edgemerge.formats.hub.families` says what there is to read for each model type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemerge.errors import FormatError
from edgemerge.formats.architectures import KINDS_OF_MODEL, Family
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.hub.changes import Bands, Change, Scaled, plain_change
from edgemerge.formats.hub.checker import Checker
from edgemerge.formats.hub.cuts import Cuts
from edgemerge.formats.hub.families import READERS
from edgemerge.formats.hub.own_keys import Shapes
from edgemerge.formats.hub.reader import OwnShapes, Reader
from edgemerge.formats.hub.rope import Rope, read_rope, rope_metadata
from edgemerge.formats.json_file import read_object

__all__ = ["EMBEDDING", "MAX_HEAD_DIM", "MAX_LAYERS", "OUTPUT", "HubConfig", "check_config"]
__all__ += ["read_config"]

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
MAX_LAYERS, MAX_HEAD_DIM = 1 << 12, 1 << 14  # lists and tables of so many are made from them
SAME_ACTIVATION = {"swish": "silu"}  # two names of one function in transformers
ROPE_THETA = 10000.0  # llama.cpp's own, where it is not told
# Models with a vision tower: their type -> types of the text model in it, and how that is read
WRAPPED = {
    "gemma3": (("gemma3_text",), "gemma3_text"),
    "gemma3n": (("gemma3n_text",), "gemma3n_text"),
    "gemma4": (("gemma4_text",), "gemma4_text"),
    "llama4": (("llama4_text",), "llama4_text"),
    "mistral3": (("ministral3", "mistral"), "ministral3"),
    "qwen3_5": (("qwen3_5_text",), "qwen3_5_text"),
    "qwen3_5_moe": (("qwen3_5_moe_text",), "qwen3_5_moe_text"),
}


@dataclass(frozen=True, slots=True)
class HubConfig:
    """What config.json says of the shapes and the arithmetic of a model."""

    model_type: str
    kind: str  # a key of `KINDS_OF_MODEL`
    n_layers: int
    n_embd: int
    n_ff: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_experts: int  # 0: a dense model
    n_ff_expert: int
    n_taps: int  # of a convolution; 0: there is none
    layer_kinds: tuple[str, ...]  # one for each layer, where these are not alike
    cuts: Cuts  # of tensors that the common rules do not fit
    vocab_size: int
    rope: Rope
    tied: bool  # whether it says that its head is the embedding
    must_tie: bool | None  # what llama.cpp computes; None: either
    quantised: str | None  # what its weights are said to be packed by
    attention_bias: bool
    mlp_bias: bool
    keys: dict[str, bytes]  # of GGUF, without the architecture's name, in the converter's order
    raw: dict[str, Any]  # config.json itself, for the tokenizer's token ids
    shapes: OwnShapes  # of tensors that only this family has
    scales: Mapping[str, Bands]  # by GGUF name without `blk.N.`

    @property
    def family(self) -> Family:
        """Names of its tensors."""
        return KINDS_OF_MODEL[self.kind]

    def change(self, stem: str) -> Change | None:
        """Return how the values of a tensor become GGUF's, by its GGUF name without `blk.N.`."""
        if bands := self.scales.get(stem):
            return Scaled(bands)
        return plain_change(self.family.norm_offset, stem)

    def expected_shape(self, stem: str) -> tuple[int, ...]:
        """Shape of a stored matrix or vector, by its GGUF name without `blk.N.`; one expert's."""
        if own := self.shapes.stored.get(stem):
            return own
        q, kv = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        name, _, suffix = stem.rpartition(".")
        # OLMo 2 normalises all heads together, the others each head by itself.
        whole = self.family.architecture == "olmo2"
        has_gate = "ffn_gate.weight" in self.family.block or self.family.halves
        up = self.n_ff if has_gate else 2 * self.n_ff
        n_out, n_in = {
            "token_embd": (self.vocab_size, self.n_embd),
            "output": (self.vocab_size, self.n_embd),
            "output_norm": (self.n_embd, 0),
            "token_embd_norm": (self.n_embd, 0),
            "shortconv.conv": (self.n_embd, self.n_taps),
            "shortconv.in_proj": (3 * self.n_embd, self.n_embd),
            "shortconv.out_proj": (self.n_embd, self.n_embd),
            "attn_norm": (self.n_embd, 0),
            "attn_q_norm": (q if whole else self.head_dim, 0),
            "attn_k_norm": (kv if whole else self.head_dim, 0),
            "post_attention_norm": (self.n_embd, 0),
            "ffn_norm": (self.n_embd, 0),
            "post_ffw_norm": (self.n_embd, 0),
            "attn_q": (q, self.n_embd),
            "attn_k": (kv, self.n_embd),
            "attn_v": (kv, self.n_embd),
            "attn_qkv": (q + 2 * kv, self.n_embd),
            "attn_output": (self.n_embd, q),
            "ffn_gate": (self.n_ff, self.n_embd),
            "ffn_up": (up, self.n_embd),
            "ffn_down": (self.n_embd, self.n_ff),
            "ffn_gate_inp": (self.n_experts, self.n_embd),
            "ffn_gate_exps": (self.n_ff_expert, self.n_embd),
            "ffn_up_exps": (self.n_ff_expert, self.n_embd),
            "ffn_down_exps": (self.n_embd, self.n_ff_expert),
        }[name]
        return (n_out,) if suffix == "bias" or n_in == 0 else (n_out, n_in)

    def required(self, stem: str) -> bool:
        """Tell whether every layer must have this tensor; llama.cpp takes the others or not."""
        if not stem.endswith(".bias") or stem in self.shapes.stored or stem == "ssm_dt.bias":
            return True
        return self.attention_bias if stem.startswith("attn") else self.mlp_bias

    def lacks(self, layer: int, stem: str) -> bool:
        """Tell whether a layer is of a kind that has no such tensor."""
        kinds = self.family.only.get(stem)
        return kinds is not None and self.layer_kinds[layer] not in kinds.split("|")

    def metadata(self) -> dict[str, bytes]:
        """Return the architecture's keys, encoded, in the converter's order."""
        return {f"{self.family.architecture}.{key}": value for key, value in self.keys.items()}


def read_config(path: Path) -> HubConfig:
    """Read and check config.json.

    Raises
    ------
    FormatError
        The model is of a kind that edgemerge does not read, or a value is missing or absurd.
    """
    return check_config(read_object(path, allows_infinity=True), path)


def check_config(raw: dict[str, Any], path: Path) -> HubConfig:
    """Check the object that a config.json holds; `path` is named in errors.

    Raises
    ------
    FormatError
        As of `read_config`.
    """
    types, unwrapped = WRAPPED.get(str(raw.get("model_type")), ((), ""))
    text = raw.get("text_config")
    if isinstance(text, dict) and text.get("model_type", unwrapped) in types:
        raw = {**raw, **text, "model_type": unwrapped}
    model_type = _model_type(raw, path)
    reader = READERS[model_type]
    check = Checker(raw, path, reader.defaults)
    check = Checker(raw | reader.restate(check), path, reader.defaults)
    _refuse_other_models(check, reader)
    n_embd = check.count("hidden_size")
    n_head = check.count("num_attention_heads")
    n_kv_head = check.count("num_key_value_heads", n_head)
    head_dim = check.count("head_dim", n_embd // n_head, most=MAX_HEAD_DIM)
    if n_head % n_kv_head:
        raise check.refuse("num_key_value_heads", n_kv_head, f"a divisor of the {n_head} heads")
    if head_dim % 2:
        raise check.refuse("head_dim", head_dim, "even, as the rotation needs")
    if reader.splits_embedding and head_dim * n_head != n_embd:
        raise check.unlike("head_dim", head_dim, f"hidden_size / {n_head} heads")
    tied = check.flag(next((key for key in reader.tie_keys if key in raw), reader.tie_keys[-1]))
    n_experts = _count_experts(check, reader)
    n_ff_expert = check.count(reader.experts[2]) if reader.experts else 0
    shapes = Shapes(check.count("num_hidden_layers", most=MAX_LAYERS), n_embd, n_head, head_dim)
    context_length = check.count("max_position_embeddings")
    rotated = check.count("global_head_dim", head_dim, most=MAX_HEAD_DIM)  # of full attention
    rope = read_rope(check, reader.ropes, rotated, context_length)
    if "rope.freq_base" not in reader.keys and rope.theta != ROPE_THETA:
        raise check.unlike("rope_theta", rope.theta, f"{ROPE_THETA:g}")
    values = {
        "context_length": encode_value(context_length, "u32"),
        **_common_keys(check, reader, shapes, n_kv_head),
        **rope_metadata(rope, has_log_multiplier="rope.scaling.yarn_log_multiplier" in reader.keys),
        **reader.own_keys(check, shapes),
    }
    kind = reader.variant(check, shapes) or model_type
    scales = reader.scales(check, shapes)
    family = KINDS_OF_MODEL[kind]
    for flag, stem in (("attention_bias", "attn_q.bias"), ("mlp_bias", "ffn_up.bias")):
        if check.flag(flag) and stem not in family.block:
            raise check.unlike(flag, True, "none")
    return HubConfig(
        model_type=model_type,
        kind=kind,
        n_layers=shapes.n_layers,
        n_embd=n_embd,
        n_ff=reader.width(check),
        n_head=n_head,
        n_kv_head=n_kv_head,
        head_dim=head_dim,
        n_experts=n_experts,
        n_ff_expert=n_ff_expert,
        n_taps=check.count("conv_L_cache") if "conv_L_cache" in reader.defaults else 0,
        layer_kinds=reader.layer_kinds(check, shapes),
        cuts=reader.cuts(check, shapes),
        vocab_size=check.count("vocab_size"),
        rope=rope,
        tied=tied,
        # A head with factors of its own is no longer the embedding.
        must_tie=False if scales.get(EMBEDDING) != scales.get(OUTPUT) else reader.tied,
        quantised=_quantised(raw),
        attention_bias=check.flag("attention_bias") or family.is_biased,
        mlp_bias=check.flag("mlp_bias"),
        keys={key: values[key] for key in reader.keys if key in values},
        raw=raw,
        shapes=reader.own_shapes(check, shapes),
        scales=scales,
    )


def _model_type(raw: dict[str, Any], path: Path) -> str:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in READERS:
        raise FormatError(
            f"model_type {str(model_type)[:80]!r} is not read from a directory (only "
            f"{', '.join(READERS)}); give a GGUF of it, which llama.cpp's convert_hf_to_gguf.py "
            "makes of the models that it knows",
            path=path,
        )
    return model_type


def _refuse_other_models(check: Checker, reader: Reader) -> None:
    """Refuse what is no plain language model of the family."""
    classes = check.raw.get("architectures")
    # The model without its head, saved by itself, is computed with the embedding as its head.
    known = (*reader.classes, reader.classes[0].replace("ForCausalLM", "Model"))
    if isinstance(classes, list) and classes and classes[0] not in known:
        raise FormatError(
            f"architecture {str(classes[0])[:80]!r} is not a language model that edgemerge "
            f"reads (only {', '.join(reader.classes)}); give the language model that it was made "
            "from",
            path=check.path,
        )
    key, wanted = reader.activation
    activation = check.get(key)
    if isinstance(activation, str):
        activation = SAME_ACTIVATION.get(activation, activation)
    if activation not in (None, wanted):
        raise check.unlike(key, activation, wanted)


def _quantised(raw: dict[str, Any]) -> str | None:
    """Return who packed the weights, going by config.json; plain weights may follow nevertheless."""
    stated = raw.get("quantization_config")
    method = stated.get("quant_method") if isinstance(stated, dict) else stated
    if stated and method:
        return str(method)[:40]
    return "mlx" if stated or raw.get("quantization") else None


def _common_keys(
    check: Checker, reader: Reader, shapes: Shapes, n_kv_head: int
) -> dict[str, bytes]:
    keys = {
        "block_count": shapes.n_layers,
        "embedding_length": shapes.n_embd,
        "attention.head_count": shapes.n_head,
        "attention.head_count_kv": n_kv_head,
        "vocab_size": check.count("vocab_size"),
    }
    if width := reader.width(check):
        keys["feed_forward_length"] = width
    if reader.states_head_dim or check.get("head_dim") is not None:
        keys |= {f"attention.{which}_length": shapes.head_dim for which in ("key", "value")}
    if reader.experts:
        keys["expert_count"] = _count_experts(check, reader)
        keys["expert_used_count"] = check.count(reader.experts[1])
    eps = encode_value(check.number(reader.eps_key, 1e-6), "f32")
    encoded = {key: encode_value(value, "u32") for key, value in keys.items()}
    return encoded | {"attention.layer_norm_rms_epsilon": eps}


def _count_experts(check: Checker, reader: Reader) -> int:
    if reader.experts is None:
        return 0
    names = reader.experts[0]
    return check.count(next((name for name in names if name in check.raw), names[0]))

"""Numbers of the header that llama.cpp asserts something of: layers, heads, experts, rotary embedding.

`load_hparams` of src/llama-model.cpp, and the assertions at the head of every `graph` in src/models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from math import isfinite

from edgemerge.formats.gguf.metadata import Array, Value, get_value
from edgemerge.formats.llama_rules.state_space import check_state_space
from edgemerge.formats.llama_rules.violation import Violation
from edgemerge.types import TensorSpec

__all__ = ["check_hyper_parameters"]

_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS of src/llama-hparams.h
_MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")  # LLAMA_ROPE_SCALING_TYPES
_HEADS = "attention.head_count"
# Architectures whose last row before the head is wider than embedding_length.
_WIDENS = ("deepseek4", "qwen4exp", "gemma4-assistant", "wavtokenizer-dec")
# Architectures that add features of an image to their first layers, and so their number.
_DEEP = ("qwen3vl", "qwen3vlmoe")
_GATINGS = 4  # LLAMA_EXPERT_GATING_FUNC_TYPE_…, from 1 on; `build_moe_ffn` aborts at others
# Architectures whose layers may use more experts than the first: `build_moe_ffn` is told how many.
_VARIES = ("nemotron_h", "nemotron_h_moe")
# Architectures that take 0 for none and have no other to put in its place.
_GATED = "bailingmoe2 bailingmoe3 deepseek32 dots1 exaone-moe kimi-linear lfm2moe minimax-m2 smallthinker"
_EPSILONS = ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon")

# Architectures whose graphs assert n_embd_head == n_rot, or take it for granted.
_ROTATING = """
apertus arcee arctic baichuan chameleon codeshell cogvlm cohere2moe dbrx deci deepseek dots1 dream ernie4_5
ernie4_5-moe exaone exaone-moe exaone4 falcon gpt-oss granite granite_swa graniteswitch grok grovemoe
hunyuan-moe hunyuan_vl hy_v3 internlm2 jais2 llada llada-moe llama llama4 maincoder mellum mistral3 olmo
olmo2 olmoe orion paddleocr pangu-embedded plamo pockettts qwen2 qwen2moe qwen2vl qwen3 qwen3moe qwen3vl
qwen3vlmoe rnd1 seed_oss smallthinker smollm3 starcoder2 talkie xverse
"""
# More in which heads of keys must be as long as those of values.
_EQUAL = """
afmoe bailingmoe2 bert bitnet bloom chatglm cohere2 command-r dflash eagle3 eurobert falcon-h1 gemma4 glm4
glm4moe gpt2 gptneox granitehybrid jais laguna lfm2 lfm2moe maple minimax-01 minimax-m2 minimax-m3
modern-bert mpt muse-glimmer nanbeige nemotron nemotron_h nemotron_h_moe neo-bert openelm phi2 phi3 qwen
qwen35 qwen35moe qwen3next qwen4exp refact spark2_5 stablelm starcoder t5
"""
# Architectures that turn by sections, for time, height and width: `ggml_rope_multi`.
_SECTIONED = ("paddleocr", "qwen2vl", "qwen35", "qwen35moe", "qwen3vl", "qwen3vlmoe", "qwen4exp")
_ROTATES_WHOLE_HEADS = frozenset(_ROTATING.split())
_HAS_EQUAL_HEADS = _ROTATES_WHOLE_HEADS | frozenset(_EQUAL.split())


def check_hyper_parameters(
    metadata: Mapping[str, bytes], specs: Mapping[str, TensorSpec], architecture: str
) -> Iterator[Violation]:
    """Yield the numbers that llama.cpp asserts something else of.

    Parameters
    ----------
    metadata : mapping of GGUF key to typed value
        Keys that are absent, or of another type than llama.cpp reads, are left to it: it names them.
    specs : mapping of GGUF name to TensorSpec
        All tensors of the model.
    architecture : str
        GGUF's general.architecture, with which the keys begin.
    """
    keys = _Keys(metadata, architecture)
    n_layers, extra = keys.read("block_count"), keys.read("nextn_predict_layers")
    if isinstance(n_layers, int) and not 0 < n_layers <= _MAX_LAYERS:
        yield keys.refuse("block_count", n_layers, f"1 to {_MAX_LAYERS}")
    if isinstance(extra, int) and isinstance(n_layers, int) and extra > n_layers:
        yield keys.refuse("nextn_predict_layers", extra, f"{n_layers} at most")
    if keys.read("context_length") == 0:
        yield keys.refuse("context_length", 0, "at least 1")
    scaling = keys.read("rope.scaling.type")
    if isinstance(scaling, str) and scaling not in _ROPE_SCALINGS:
        yield keys.refuse("rope.scaling.type", repr(scaling), f"one of {', '.join(_ROPE_SCALINGS)}")
    shared = keys.integer("attention.shared_kv_layers", 0)
    if architecture == "gemma4" and isinstance(n_layers, int) and n_layers - shared < 2:
        # asserted in `create_memory`, where others take over keys and values
        yield keys.refuse("attention.shared_kv_layers", shared, "2 less than the layers at most")
    for key in _EPSILONS:
        epsilon = keys.read(key)
        if isinstance(epsilon, float) and not (epsilon >= 0 and isfinite(epsilon)):
            yield keys.refuse(key, epsilon, "0 or more")  # asserted in ggml-cpu/ops.cpp
    yield from _check_width(keys, specs)
    for key, value, wanted in check_state_space(architecture, keys.integer):
        yield keys.refuse(key, value, wanted)
    yield from _check_experts(keys, specs)
    yield from _check_heads(keys)
    yield from _check_layers(keys, specs)


class _Keys:
    """The architecture's own keys of a header."""

    def __init__(self, metadata: Mapping[str, bytes], architecture: str) -> None:
        self.metadata = metadata
        self.architecture = architecture

    def read(self, key: str) -> Value | None:
        return get_value(self.metadata, f"{self.architecture}.{key}")

    def integer(self, key: str, default: int) -> int:
        value = self.read(key)
        return value if isinstance(value, int) else default

    def integers(self, key: str) -> list[int]:
        """One for all layers, or one for each; of a stranger's longer array the first."""
        value = self.read(key)
        listed = islice(value, _MAX_LAYERS) if isinstance(value, Array) else [value]
        return [item for item in listed if isinstance(item, int)]

    def refuse(self, key: str, value: object, wanted: str) -> Violation:
        return Violation(f"states {self.architecture}.{key} as {value}, which must be {wanted}")


def _check_width(keys: _Keys, specs: Mapping[str, TensorSpec]) -> Iterator[Violation]:
    """Check widths: `llama_context::decode` reads an embedding from a row of `embedding_length` numbers."""
    width, out = keys.integer("embedding_length", 0), keys.integer("embedding_length_out", 0)
    is_widened = any(name.startswith("dense_2.") for name in specs)
    layers, deep = keys.integer("block_count", 0), keys.integer("n_deepstack_layers", 0)
    if keys.architecture in _DEEP and deep >= max(
        1, layers
    ):  # the last has rows of the outputs alone
        yield keys.refuse("n_deepstack_layers", deep, f"{layers - 1} at most")
    if out > width and not is_widened and keys.architecture not in _WIDENS:
        yield keys.refuse("embedding_length_out", out, f"{width} at most")


def _check_experts(keys: _Keys, specs: Mapping[str, TensorSpec]) -> Iterator[Violation]:
    n, n_groups = keys.integer("expert_count", 0), keys.integer("expert_group_count", 0)
    each = keys.integers("expert_used_count")
    used = max(each, default=0)
    taken = keys.integer("expert_group_used_count", 0)
    least = 1 if keys.architecture in _GATED.split() else 0
    if n > _MAX_EXPERTS:
        yield keys.refuse("expert_count", n, f"{_MAX_EXPERTS} at most")
    elif used > n:
        yield keys.refuse("expert_used_count", used, f"{n} at most")
    elif n and not used:
        yield keys.refuse("expert_used_count", used, "at least 1")
    elif (idle := _idle_layer(each, specs)) is not None:
        yield keys.refuse("expert_used_count", 0, f"at least 1, as layer {idle} has experts")
    elif n and used > each[0] and keys.architecture not in _VARIES:
        yield keys.refuse("expert_used_count", used, f"{each[0]} at most, as in the first layer")
    elif n and not least <= keys.integer("expert_gating_func", least) <= _GATINGS:
        gating = keys.integer("expert_gating_func", least)
        yield keys.refuse("expert_gating_func", gating, f"{least} to {_GATINGS}")
    elif n_groups and (n_groups >= n or n % n_groups):
        yield keys.refuse("expert_group_count", n_groups, f"a divisor of {n}")
    elif n_groups > 1 and not 0 < taken < n_groups:
        yield keys.refuse("expert_group_used_count", taken, f"1 to {n_groups - 1}")


def _idle_layer(used: Sequence[int], specs: Mapping[str, TensorSpec]) -> int | None:
    """Find a layer whose experts do nothing, out of which llama.cpp takes the first nevertheless."""
    layers = (i for i, count in enumerate(used) if count <= 0)
    return next((i for i in layers if f"blk.{i}.ffn_down_exps.weight" in specs), None)


def _check_heads(keys: _Keys) -> Iterator[Violation]:
    heads, kv_heads = keys.integers(_HEADS), keys.integers(f"{_HEADS}_kv")
    if len(kv_heads) == 1:
        kv_heads *= len(heads)
    for n, n_kv in zip(heads, kv_heads, strict=False):
        if n_kv > 0 and n % n_kv:  # ggml_can_mul_mat: query heads are shared out evenly
            yield keys.refuse(f"{_HEADS}_kv", n_kv, f"a divisor of the {n} heads")
            break
    if not heads or heads[0] <= 0:
        return
    default = keys.integer("embedding_length", 0) // heads[0]
    key = keys.integer("attention.key_length", default)
    value = keys.integer("attention.value_length", default)
    rotated = keys.integer("rope.dimension_count", key)
    if keys.architecture in _HAS_EQUAL_HEADS and key != value:
        yield keys.refuse("attention.value_length", value, f"{key}, as attention.key_length is")
    elif keys.architecture in _ROTATES_WHOLE_HEADS and rotated != value:
        yield keys.refuse("rope.dimension_count", rotated, f"{value}, the length of a head")
    elif rotated % 2 or rotated > key:  # `ggml_compute_forward_rope`
        yield keys.refuse("rope.dimension_count", rotated, f"even, and {key} at most")
    sections = keys.integers("rope.dimension_sections")[:4]
    if (
        sections and keys.architecture in _SECTIONED and not 0 < sum(sections) <= key
    ):  # `ggml_mrope_cache_init`
        shown = f"{sections}, {sum(sections)} in all,"
        yield keys.refuse("rope.dimension_sections", shown, f"1 to {key} in all")


def _check_layers(keys: _Keys, specs: Mapping[str, TensorSpec]) -> Iterator[Violation]:
    """Graphs divide by the number of heads where a layer has them; those without attention may say 0."""
    for key, part in ((_HEADS, "attn_q"), (f"{_HEADS}_kv", "attn_k")):
        counts = keys.integers(key)
        n_layers = keys.integer("block_count", 0) if len(counts) == 1 else len(counts)
        for layer in range(min(n_layers, _MAX_LAYERS)):
            count = counts[0] if len(counts) == 1 else counts[layer]
            if count <= 0 and f"blk.{layer}.{part}.weight" in specs:
                yield keys.refuse(key, count, f"at least 1, as layer {layer} has heads")
                return

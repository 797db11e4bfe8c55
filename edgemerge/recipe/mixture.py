"""Configurations of mergekit-moe: dense models that become the experts of one model.

The schema is that of mergekit 0.1.5's `MoEMergeConfig`; our additions stand under the one key `edgemerge`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgemerge.experts import MIXTURE_PATH, ExpertInput, Mixture
from edgemerge.recipe.mergekit import OUT_DTYPES, OWN_KEYS, RecipeReader
from edgemerge.recipe.values import brief, is_utf8
from edgemerge.types import ModelInput, Recipe, Slice

__all__ = ["MixtureReader", "is_mixture"]

MARKS = ("experts", "gate_mode")
TOP_KEYS: tuple[str, ...]
TOP_KEYS = ("base_model", "experts", "gate_mode", "dtype", "experts_per_token", "shared_experts")
TOP_KEYS += ("architecture", "edgemerge")
EXPERT_KEYS: tuple[str, ...]
EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "noise_scale")
EXPERT_KEYS += ("residual_scale",)
OWN = tuple(key for key in OWN_KEYS if key not in ("align", "neurons"))
DRAWN = ("random", "uniform_random")  # gates that need no prompts
GATES = ("hidden", "hidden_last", "cheap_embed", *DRAWN)
MAX_EXPERTS = 512  # LLAMA_MAX_EXPERTS of llama.cpp
ARCHITECTURES = ("mixtral", "qwen3 moe", "qwen moe", "deepseek moe")  # mergekit's, by their names


def is_mixture(document: Mapping[str, Any]) -> bool:
    """Tell whether a document is a configuration of mergekit-moe."""
    return "merge_method" not in document and any(key in document for key in MARKS)


class MixtureReader(RecipeReader):
    """Reads one configuration."""

    def mixture(self, document: Mapping[str, Any]) -> Recipe:
        """Read the whole document.

        Returns
        -------
        Recipe
            A copy of one model, `MIXTURE_PATH`, which the recipe's `mixture` describes.

        Raises
        ------
        RecipeError
            It asks for something that does not exist, or that llama.cpp would compute otherwise.
        """
        self.check_keys(document, TOP_KEYS, "the recipe", places=dict.fromkeys(OWN, "edgemerge"))
        own = self.mapping(document.get("edgemerge") or {}, "edgemerge")
        self.check_own_keys(own, OWN, "edgemerge")
        self.refuse_shared(document)
        if document.get("base_model") is None:
            self.fail("base_model is missing: it gives all but the experts", "base_model")
        base = self.model_path(document["base_model"], "base_model")
        gate_mode = self.gate_mode(document.get("gate_mode", "hidden"))
        experts = self.experts(document.get("experts"), gate_mode)
        dtype, out_type = self.dtype(document, "dtype"), None
        if "type" in own:
            out_type = self.text(own, "type", "edgemerge.type")
        elif dtype is not None:  # nothing is computed with the weights, so it is the file's type
            out_type = OUT_DTYPES[dtype]
        return Recipe(
            method="passthrough",
            base=None,
            slices=(Slice((ModelInput(MIXTURE_PATH),)),),
            out_type=out_type,
            dtype=dtype,
            tensor_types=self.tensor_types(own.get("tensor_types", {})),
            imatrix=self.imatrix(own.get("imatrix"), "edgemerge.imatrix"),
            memory=self.memory(own["memory"]) if "memory" in own else None,
            out_format=self.out_format(own),
            seed=self.seed(own.get("seed", 0), "edgemerge.seed"),
            mixture=Mixture(base, experts, gate_mode, self.per_token(document, len(experts))),
            notes=tuple(dict.fromkeys(self.notes)),
        )

    def refuse_shared(self, document: Mapping[str, Any]) -> None:
        """Refuse the layers that llama.cpp computes otherwise than the model that mergekit writes."""
        wanted = document.get("architecture")
        known = wanted is None or (
            isinstance(wanted, str) and any(a.startswith(wanted.lower()) for a in ARCHITECTURES)
        )
        if not known:
            self.fail(
                f"architecture is {brief(wanted)}; leave it out, or write mixtral or qwen3",
                "architecture",
            )
        of_shared = isinstance(wanted, str) and wanted.lower().startswith(("deepseek", "qwen m"))
        if document.get("shared_experts") or of_shared:
            key = "shared_experts" if document.get("shared_experts") else "architecture"
            self.fail(
                f"{key} asks for a Qwen2-MoE or DeepSeek model with normalised weights of its experts, "
                "which llama.cpp does not normalise for these; leave it out to make a Mixtral (of Llama "
                "or Mistral models) or a Qwen3-MoE (of Qwen3 models)",
                key,
            )

    def gate_mode(self, value: Any) -> str:
        """Read how experts are chosen."""
        if value == "hidden_avg":
            self.fail(
                "gate_mode hidden_avg takes the mean over the padding of prompts, too, which says nothing; "
                "write gate_mode: hidden, which takes the last token of each",
                "gate_mode",
            )
        if value not in GATES:
            self.fail(f"gate_mode is {brief(value)}; choose one of {', '.join(GATES)}", "gate_mode")
        return str(value)

    def experts(self, value: Any, gate_mode: str) -> tuple[ExpertInput, ...]:
        """Read the list of experts, and see that their prompts tell them apart."""
        found = tuple(
            self.expert(entry, f"experts[{i}]", gate_mode)
            for i, entry in enumerate(self.sequence(value, "experts"))
        )
        if len(found) > MAX_EXPERTS:
            self.fail(
                f"has {len(found)} experts, and llama.cpp takes {MAX_EXPERTS} at most", "experts"
            )
        prompts = {(one.positive_prompts, one.negative_prompts) for one in found}
        if gate_mode not in DRAWN and len(prompts) == 1:
            self.fail(
                "experts all have the same prompts, so that no gate can tell them apart; give each "
                "prompts of what it is good at",
                "experts",
            )
        if len({one.path for one in found}) == 1:
            self.notes.append(
                "all experts are one model, so the mixture answers as that model does until it is trained"
            )
        return found

    def expert(self, value: Any, where: str, gate_mode: str) -> ExpertInput:
        """Read one expert."""
        entry = self.mapping(value, where)
        self.check_keys(entry, EXPERT_KEYS, where)
        if entry.get("noise_scale"):
            self.fail(
                f"{where}.noise_scale adds noise to the weights, which only helps a later training; "
                "leave it out",
                "noise_scale",
            )
        scale = entry.get("residual_scale")
        number = None if scale is None else self.number(scale)
        if scale is not None and number is None:
            self.fail(f"{where}.residual_scale must be a number", "residual_scale")
        positive = self.prompts(entry, f"{where}.positive_prompts")
        if not positive and gate_mode not in DRAWN:
            self.fail(
                f"{where}.positive_prompts is missing: the gate sends what is like them to this expert",
                "positive_prompts",
            )
        return ExpertInput(
            self.model_path(entry.get("source_model"), f"{where}.source_model"),
            positive,
            self.prompts(entry, f"{where}.negative_prompts"),
            number,
        )

    def prompts(self, entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
        """Read a list of texts."""
        texts = entry.get(where.rpartition(".")[2]) or ()
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
            self.fail(f"{where} must be a list of texts", where)
        if not all(map(is_utf8, texts)):
            self.fail(f"{where} has a text that is not UTF-8; write it anew", where)
        if isinstance(texts, str):
            self.fail(f"{where} must be a list of texts, as in [{brief(texts)}]", where)
        return tuple(texts)

    def per_token(self, document: Mapping[str, Any], n_experts: int) -> int:
        """Read how many experts compute a token."""
        value = document.get("experts_per_token", 2)
        if type(value) is not int or not 1 <= value <= n_experts:
            self.fail(
                f"experts_per_token is {brief(value)}; it must be a whole number from 1 to the "
                f"{n_experts} experts that there are",
                "experts_per_token",
            )
        return value

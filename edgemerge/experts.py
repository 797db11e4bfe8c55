"""What a mixture of experts is made of, as mergekit-moe's configurations say it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["MIXTURE_PATH", "ExpertInput", "Mixture"]

MIXTURE_PATH = Path("mixture")  # stands for the mixture where a recipe names models


@dataclass(frozen=True, slots=True)
class ExpertInput:
    """A dense model whose feed-forward layers become one expert of each layer."""

    path: Path
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    residual_scale: float | None = None  # of what the expert adds; None: 1


@dataclass(frozen=True, slots=True)
class Mixture:
    """A mixture of dense models of one architecture."""

    base: Path  # gives everything but the experts
    experts: tuple[ExpertInput, ...]
    gate_mode: str  # hidden, hidden_last (the same), cheap_embed, random or uniform_random
    experts_per_token: int

    @property
    def runs_base(self) -> bool:
        """Whether the gates are made of what the base computes."""
        return self.gate_mode.startswith("hidden")

    def models(self) -> tuple[Path, ...]:
        """Every distinct model, the base first."""
        return tuple(dict.fromkeys((self.base, *(expert.path for expert in self.experts))))

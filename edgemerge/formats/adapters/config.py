"""adapter_config.json of PEFT: what it says of the change, and the kinds that are no plain LoRA."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgemerge.errors import FormatError
from edgemerge.formats.json_file import read_object

__all__ = ["ADAPTER_CONFIG", "UNFOLD", "AdapterConfig"]

ADAPTER_CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 1_000_000
MAX_KEY, MAX_REPEATS = 300, 3  # of a regex
UNFOLD = "merge it in peft (merge_and_unload), and give the result"
# Settings of kinds that are more than an addition to a weight -> what such an adapter does.
_OTHERS = {
    "alora_invocation_tokens": "acts only after certain tokens (aLoRA)",
    "arrow_config": "chooses among adapters for each token (Arrow)",
    "layer_replication": "repeats layers of its base",
    "use_qalora": "adds to groups of inputs (QALoRA)",
    "use_bdlora": "has block-diagonal factors (BD-LoRA)",
    "monteclora_config": "draws its factors at random (MonteCLoRA)",
    "kasa_config": "changes the base as it is loaded (KaSA)",
    "velora_config": "is no plain LoRA (VeLoRA)",
}
# peft takes these out of the base's weights when it loads such an adapter.
_MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterConfig:
    """What adapter_config.json says.

    Raises
    ------
    FormatError
        It is damaged, or describes no LoRA that adds to weights.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ADAPTER_CONFIG
        self.raw = read_object(self.path, max_bytes=MAX_CONFIG_BYTES)
        kind = self.raw.get("peft_type", "LORA")
        if kind != "LORA":
            raise FormatError(
                f"is an adapter of the kind {str(kind)[:40]!r}, and only LORA is read; {UNFOLD}",
                path=self.path,
            )
        for key, what in _OTHERS.items():
            if self.raw.get(key):
                raise FormatError(
                    f"{what}, which no weight can stand for; {UNFOLD}", path=self.path
                )
        start = self.raw.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_MUTATING):
            raise FormatError(
                f"began from the base's own weights ({start[:20]}), which peft takes out of the base; save "
                "it in peft as plain LoRA (path_initial_model_for_weight_conversion), or " + UNFOLD,
                path=self.path,
            )
        self.uses_dora = self.raw.get("use_dora") is True
        self._ranks = self._pattern("rank_pattern")
        self._alphas = self._pattern("alpha_pattern")
        self._rank = self._number("r")
        self._alpha = self._number("lora_alpha")

    @property
    def base_name(self) -> str | None:
        """Name or path of the model that it was made for."""
        name = self.raw.get("base_model_name_or_path")
        return name[:200] if isinstance(name, str) and name else None

    def scale(self, names: Sequence[str], rank: int) -> float:
        """Return what a module's product is multiplied by (peft/tuners/lora/layer.py, `update_layer`).

        Parameters
        ----------
        names : sequence of str
            Of the module: as stored, and without what towers put before it.
        rank : int
            Of its factors.

        Raises
        ------
        FormatError
            The file says another rank, which peft would not load either.
        """
        names = [name.replace(".base_layer", "") for name in names]
        stated = _look_up(self._ranks, names)
        stated = self._rank if stated is None else stated
        if stated is not None and stated != rank:
            raise FormatError(
                f"says that {names[-1]} has the rank {stated:g}, and its factors have {rank}; get both files "
                "of one adapter",
                path=self.path,
            )
        alpha = _look_up(self._alphas, names)
        if alpha is None:
            alpha = self._alpha if self._alpha is not None else 8.0  # LoraConfig's default
        return alpha / math.sqrt(rank) if self.raw.get("use_rslora") is True else alpha / rank

    def tokens(self, module: str) -> tuple[int, ...]:
        """Return the tokens whose embeddings were trained in a module; none where they are not stated."""
        stated = self.raw.get("trainable_token_indices")
        if isinstance(stated, dict):  # as of peft's `_set_trainable`
            stated = next((one for name, one in stated.items() if module.endswith(name)), None)
        if not isinstance(stated, list) or not all(type(i) is int and i >= 0 for i in stated):
            return ()
        return tuple(stated)

    def _number(self, key: str) -> float | None:
        value = self.raw.get(key)
        if value is None:
            return None
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise FormatError(f"its {key} is no number; get the file again", path=self.path)
        return float(value)

    def _pattern(self, key: str) -> Mapping[str, float]:
        table: Any = self.raw.get(key) or {}
        if not isinstance(table, dict):
            raise FormatError(f"its {key} is no table; get the file again", path=self.path)
        for name, value in table.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise FormatError(f"its {key} has no number for {name[:80]!r}", path=self.path)
            if not _is_harmless(name):
                raise FormatError(
                    f"its {key} has the pattern {name[:80]!r}, which is not read; write the names of "
                    "modules instead",
                    path=self.path,
                )
        return table


def _look_up(pattern: Mapping[str, float], names: Sequence[str]) -> float | None:
    """Find a module's entry, as peft's `get_pattern_key`: the first whose key, a regex, ends its name."""
    for name in names:
        for key, value in pattern.items():
            if re.fullmatch(rf"(?:.*\.)?(?:{key})", name):
                return value
    return None


def _is_harmless(key: str) -> bool:
    """Tell whether a regex of a stranger can be tried in bounded time: few repeats, and none of a group."""
    if len(key) > MAX_KEY or len(re.findall(r"[*+{?]", key)) > MAX_REPEATS:
        return False
    if re.search(r"\)[*+{?]|\\[1-9]|\(\?", key):
        return False
    try:
        re.compile(key)
    except (re.error, RecursionError, OverflowError):
        return False
    return True

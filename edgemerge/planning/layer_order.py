"""What a layer loses where slices put it: settings that llama.cpp looks up by a layer's place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from edgemerge.errors import RecipeError
from edgemerge.finding.cache import folder_name
from edgemerge.formats.architectures import layer_index
from edgemerge.formats.gguf.metadata import Array, Value, get_value
from edgemerge.planning.compatibility import layer_settings
from edgemerge.planning.jobs import Draft
from edgemerge.types import Source

__all__ = ["check_layer_order"]

WINDOW, PATTERN = "{}.attention.sliding_window", "{}.attention.sliding_window_pattern"
# Of so many layers the last sees the whole text, or is not rotated (llama.cpp's `load_hparams`, smollm3.cpp).
PERIODS = {
    "cohere2": 4,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "llama4": 4,
    "olmo2": 4,
    "smollm3": 4,
}
WITHOUT_WINDOWS = ("gemma3", "olmo2")  # unless they state one


class _Origin(NamedTuple):
    """What a layer of the output is made of."""

    layer: int
    model: int
    origin: int  # its layer there


def check_layer_order(
    drafts: Sequence[Draft], models: Sequence[Source], *, stacked: bool
) -> list[str]:
    """Refuse slices that part layers from their settings, as the output has those of the first model.

    Parameters
    ----------
    drafts : sequence of Draft
        The tensors of the output.
    models : sequence of Source
        The open models, as `Plan.models` lists them.
    stacked : bool
        Whether there are several slices. Then also a layer that stays in its place may come from another
        model than its neighbours.

    Returns
    -------
    list of str
        What to know of layers whose kind llama.cpp knows by their number.

    Raises
    ------
    RecipeError
        The first model has an array of settings that does not fit the output's layers.
    """
    origins = sorted(set(_list_origins(drafts, stacked=stacked)))
    _check_settings(drafts, models, origins)
    return list(_note_kinds(models, origins))


def _list_origins(drafts: Sequence[Draft], *, stacked: bool) -> Iterator[_Origin]:
    """Yield layers that are elsewhere in their model; of several slices, also whose model is the first."""
    for draft in drafts:
        layer = layer_index(draft.name)
        for i, tensor in enumerate(draft.inputs):
            origin = layer_index(tensor.spec.name)
            is_leading = stacked and i == 0
            if layer is not None and origin is not None and (layer != origin or is_leading):
                yield _Origin(layer, tensor.model, origin)


def _check_settings(
    drafts: Sequence[Draft], models: Sequence[Source], origins: Sequence[_Origin]
) -> None:
    own = [_settings(model) for model in models]
    layers = {layer for draft in drafts if (layer := layer_index(draft.name)) is not None}
    changes_count = bool(layers) and len(layers) != _count_layers(models[0])
    why = "" if changes_count else next(_misfits(models, own, origins), "")
    if own[0] and (changes_count or why):
        raise RecipeError(
            f"{models[0].path} has settings per layer, which slices cannot re-order yet{why}; "
            "merge whole models",
            field="slices",
        )


def _misfits(
    models: Sequence[Source], own: Sequence[Mapping[str, Array]], origins: Sequence[_Origin]
) -> Iterator[str]:
    """Yield, for an error, which layers had other settings where they come from."""
    for layer, i_model, origin in origins:
        for key, values in own[0].items():
            if own[i_model].get(key, [])[origin : origin + 1] != values[layer : layer + 1]:
                yield (
                    f" (its layer {layer} and layer {origin} of {models[i_model].path}, which takes that "
                    f"place, differ in {key})"
                )


def _note_kinds(models: Sequence[Source], origins: Sequence[_Origin]) -> Iterator[str]:
    """Say which layers llama.cpp takes for another kind than they were trained as."""
    arch, period = models[0].architecture, _period(models[0])
    if period is None:
        return
    moved = [one for one in origins if _is_last(one.layer, period) != _is_last(one.origin, period)]
    if moved:
        layer, i_model, origin = moved[0]
        count = len({one.layer for one in moved})
        yield (
            f"llama.cpp gives one in {period} layers of {arch} another kind of attention, by its number, and "
            f"slices change the kind of {count} layer{'s' * (count > 1)} (first: layer {layer}, from layer "
            f"{origin} of {folder_name(models[i_model].path)}); ranges that shift layers by multiples of "
            f"{period} keep it"
        )


def _period(model: Source) -> int | None:
    """Return how many layers there are from one of the rarer kind to the next; None where all are alike."""
    arch, metadata = model.architecture, model.metadata()
    window = get_value(metadata, WINDOW.format(arch))
    if arch not in PERIODS or window == 0 or (window is None and arch in WITHOUT_WINDOWS):
        return None
    pattern = get_value(metadata, PATTERN.format(arch), PERIODS[arch])
    return pattern if isinstance(pattern, int) and pattern > 1 else None


def _is_last(layer: int, period: int) -> bool:
    return (layer + 1) % period == 0


def _settings(model: Source) -> dict[str, Array]:
    return layer_settings(model.metadata(), _count_layers(model))


def _count_layers(model: Source) -> Value | None:
    return get_value(model.metadata(), f"{model.architecture}.block_count")

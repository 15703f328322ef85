"""The verdict on the reliance figures, as a label and as a sentence."""

from collections.abc import Mapping
from typing import Any

THRESHOLD = 0.5  # least value of every figure in every layer for CARRY
FEW_DIRECTIONS = 0.25  # gain_dimensions / output_dimensions below which the sentence has a warning
CARRY = "experts carry the layer"
NOT_SHOWN = "experts not shown to matter"
NOT_APPLICABLE = "not applicable"
_MEANING = {
    "gate_share": "of the output's variance is not explained by a constant gain",
    "identity_share": "of the output's variance depends on which experts fire",
    "routing_necessity": "of the layer's benefit is lost when its experts are permuted",
}


def verdict(layers: Mapping[str, Mapping[str, Any]]) -> str:
    """Return CARRY if gate share, identity share and routing necessity are at least THRESHOLD in every layer, else NOT_SHOWN.

    At a half or more, most of a layer's output, and of its benefit to the model, depends on which experts fire. NOT_APPLICABLE if
    no layer has experts (all figures are None).
    """
    figures = [layer[name] for layer in layers.values() for name in _MEANING]
    if not figures or all(value is None for value in figures):
        return NOT_APPLICABLE
    return CARRY if all(value is not None and value >= THRESHOLD for value in figures) else NOT_SHOWN


def sentence(layers: Mapping[str, Mapping[str, Any]], rise: float, twin_rise: float | None) -> str:
    """Return the verdict with its grounds: each figure's lowest layer, and the comparison with the dense twin.

    Args:
        layers: the figures of each layer, by layer index.
        rise: rise in cross-entropy of the converted model over the base, nats per token.
        twin_rise: the same for the dense twin; None if it was not trained.
    """
    found = verdict(layers)
    if found == NOT_APPLICABLE:
        return "not applicable: these layers have no experts"
    lowest = {name: min(layers, key=lambda index: _or_zero(layers[index][name])) for name in _MEANING}
    failing = [name for name in _MEANING if _or_zero(layers[lowest[name]][name]) < THRESHOLD]
    grounds = [
        f"{_shown(layers[lowest[name]][name])} {meaning} (layer {lowest[name]})"
        for name, meaning in _MEANING.items()
        if name in failing or not failing
    ]
    where = "only" if failing else "at least"
    against = "the dense twin was not trained"
    if twin_rise is not None:
        gap = round(rise - twin_rise, 3)
        saved = f"{'save' if gap < 0 else 'add'} {abs(gap):.3f} nats per token over a constant gain"
        against = (
            f"cross-entropy rises by {rise:.3f} nats per token, and by {twin_rise:.3f} in the dense twin: the experts"
            f" {saved if gap else 'are as faithful as a constant gain'}"
        )
    return f"{found}: {where} {', '.join(grounds)}{_narrow(layers)}; {against}"


def _narrow(layers: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a warning if a layer's gain varies in less than FEW_DIRECTIONS of its output's directions, else "".

    A few scalar gains could then replace its experts.
    """
    ratios = {
        index: layer["gain_dimensions"] / layer["output_dimensions"]
        for index, layer in layers.items()
        if layer.get("gain_dimensions") is not None and layer["output_dimensions"]
    }
    if not ratios or min(ratios.values()) >= FEW_DIRECTIONS:
        return ""
    index = min(ratios, key=lambda index: ratios[index])
    gain, output = layers[index]["gain_dimensions"], layers[index]["output_dimensions"]
    return f", but the gain of layer {index} varies in only {gain:.1f} directions, the MLP's output in {output:.1f}"


def _or_zero(value: float | None) -> float:
    return 0.0 if value is None else value


def _shown(value: float | None) -> str:
    return "an unknown share" if value is None else f"{value:.2f}"

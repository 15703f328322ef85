"""One plain sentence on what the reliance figures say."""

from collections.abc import Mapping
from typing import Any

THRESHOLD = 0.5
FEW_DIRECTIONS = 0.25  # of the directions that the MLP's output varies in
CARRY = "experts carry the layer"
NOT_SHOWN = "experts not shown to matter"
NOT_APPLICABLE = "not applicable"
_MEANING = {
    "gate_share": "of the output's variance is beyond a constant gain",
    "identity_share": "hangs on which experts fire",
    "routing_necessity": "of the layer's use is lost when experts swap places",
}


def verdict(layers: Mapping[str, Mapping[str, Any]]) -> str:
    """The verdict over all layers: each of gate share, identity share and routing necessity is at least a half in every one.

    A half, because then more of the layer's output (or of what the model loses without it) hangs on which experts fire than does
    not. Layers without experts (figures None) make it "not applicable".
    """
    figures = [layer[name] for layer in layers.values() for name in _MEANING]
    if not figures or all(value is None for value in figures):
        return NOT_APPLICABLE
    return CARRY if all(value is not None and value >= THRESHOLD for value in figures) else NOT_SHOWN


def sentence(layers: Mapping[str, Mapping[str, Any]], rise: float, twin_rise: float | None) -> str:
    """The verdict with its grounds: of each figure the layer where it is lowest; and the gap to the dense twin.

    rise, twin_rise: of cross-entropy over the base, nats a token, of the converted model and of the dense twin (None: not trained).
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
        gap = rise - twin_rise
        against = f"the dense twin rises {twin_rise:+.3f} where this rises {rise:+.3f}: experts are {abs(gap):.3f} " + (
            "better than a constant gain" if gap < 0 else "worse than a constant gain"
        )
    return f"{found}: {where} {', '.join(grounds)}{_narrow(layers)}; {against}"


def _narrow(layers: Mapping[str, Mapping[str, Any]]) -> str:
    """A warning where some layer's gain varies in far fewer directions than its output has: then a knob would do what the experts do."""
    ratios = {
        index: layer["gain_dimensions"] / layer["output_dimensions"]
        for index, layer in layers.items()
        if layer.get("gain_dimensions") is not None and layer["output_dimensions"]
    }
    if not ratios or min(ratios.values()) >= FEW_DIRECTIONS:
        return ""
    index = min(ratios, key=lambda index: ratios[index])
    gain, output = layers[index]["gain_dimensions"], layers[index]["output_dimensions"]
    return f", but the gain of layer {index} varies in {gain:.1f} directions where the MLP's output varies in {output:.1f}"


def _or_zero(value: float | None) -> float:
    return 0.0 if value is None else value


def _shown(value: float | None) -> str:
    return "an unknown part" if value is None else f"{value:.2f}"

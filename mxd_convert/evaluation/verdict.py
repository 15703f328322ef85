"""The verdict on the reliance figures: what kind of layer was trained, as a label and as a sentence.

The thresholds stand here and nowhere else:

- DENSE, for gate and hidden share: below a tenth, one side of the product alone explains nine tenths of its variance. Layers that
  were trained as transcoders in MxD's parametrisation have hidden shares of .02 to .05, layers with two working sides .3 or more.
- SUM, for the product share: below a twentieth, a sum of the two sides explains 95 % of the product's variance.
- NEEDED, for identity share and routing necessity: below a half, most of the output, or of the layer's benefit to the model, does
  not depend on which experts fire.
- FEW_DIRECTIONS, for gain_dimensions / output_dimensions: below it, a few scalar gains could replace the experts. The sentence
  then has a warning.
"""

from collections.abc import Mapping
from typing import Any

from mxd_convert.recipe.kinds import KINDS

DENSE = 0.1
SUM = 0.05
NEEDED = 0.5
FEW_DIRECTIONS = 0.25

MIXTURE = "mixture of decoders"
TRANSCODER = "transcoder in all but name"
DENSE_LAYER = "dense layer in all but name"
NOT_SHOWN = "experts not shown to matter"
MIXED = "mixed"
NOT_APPLICABLE = "not applicable"

Layers = Mapping[str, Mapping[str, Any]]


def verdict_of(layer: Mapping[str, Any]) -> str:
    """Return the verdict on one layer of a kind with a product. MIXED: both sides matter, and their product adds little.

    A figure that is None counts as 0, because nothing is shown then. Routing necessity is left out if it was not measured.
    """
    if layer.get("gate_share") is None:
        return NOT_SHOWN
    if _low(layer, "gate_share", DENSE):
        return DENSE_LAYER
    if _low(layer, "hidden_share", DENSE):
        return TRANSCODER
    if _low(layer, "identity_share", NEEDED) or ("routing_necessity" in layer and _low(layer, "routing_necessity", NEEDED)):
        return NOT_SHOWN
    return MIXED if _low(layer, "product_share", SUM) else MIXTURE


def verdict(layers: Layers, kinds: Mapping[str, str]) -> str:
    """Return the verdict that all layers with a product share, else MIXED. NOT_APPLICABLE if no layer has a product.

    Args:
        layers: the reliance figures, by layer index.
        kinds: the kinds of the layers, by layer index.
    """
    found = set(_verdicts(layers, kinds).values())
    return NOT_APPLICABLE if not found else found.pop() if len(found) == 1 else MIXED


def sentence(layers: Layers, kinds: Mapping[str, str], twin: Mapping[str, Any] | None) -> str:
    """Return the verdict with its reasons, and the comparison with the dense twin.

    Args:
        layers: the reliance figures, by layer index.
        kinds: the kinds of the layers, by layer index.
        twin: the figures of the dense twin; None if it was not trained.
    """
    verdicts = _verdicts(layers, kinds)
    if not verdicts:
        kind = KINDS[next(iter(kinds.values()))]
        return f"not applicable: a {kind.title} has no product of two sides"
    label = verdict(layers, kinds)
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for index, one in verdicts.items():
        groups.setdefault(one, {})[index] = layers[index]
    if len(groups) == 1:
        reasons = _reason(label, next(iter(groups.values())))
    else:
        reasons = "; ".join(f"{_named(group)}: {_alone(one)} ({_reason(one, group)})" for one, group in groups.items())
    return f"{label}: {reasons}{_narrow(layers)}{_against(twin)}"


def _verdicts(layers: Layers, kinds: Mapping[str, str]) -> dict[str, str]:
    return {index: verdict_of(layer) for index, layer in layers.items() if KINDS[kinds[index]].is_product}


def _alone(label: str) -> str:
    return "a sum of its two sides" if label == MIXED else label


def _reason(label: str, layers: Layers) -> str:
    """Return the figures that decide a verdict, for the layers that have it."""
    if label == DENSE_LAYER:
        return f"the linear factor alone explains {_explained(layers, 'gate_share')} of the product's variance"
    if label == TRANSCODER:
        return f"the experts' gain alone explains {_explained(layers, 'hidden_share')} of the product's variance"
    if label == NOT_SHOWN:
        if unmeasured := {index: layer["reason"] for index, layer in layers.items() if layer.get("reason")}:
            return "; ".join(f"layer {index}: {reason}" for index, reason in unmeasured.items())
        failing = {
            name: meaning
            for name, meaning in (
                ("identity_share", "of the product's variance depends on which experts fire"),
                ("routing_necessity", "of the layer's benefit is lost when its experts are permuted"),
            )
            if any(_low(layer, name, NEEDED) for layer in layers.values() if name in layer)
        }
        return ", ".join(f"only {_lowest(layers, name)} {meaning}" for name, meaning in failing.items())
    if label == MIXED:
        return f"a sum of gain and linear factor leaves only {_range(layers, 'product_share')} of the product's variance"
    return (
        f"the gain alone leaves {_range(layers, 'hidden_share')} of the product's variance unexplained, the linear factor"
        f" {_range(layers, 'gate_share')}, and a sum of both {_range(layers, 'product_share')}"
    )


def _against(twin: Mapping[str, Any] | None) -> str:
    """Return the comparison with the dense twin, as a further clause."""
    if twin is None or twin.get("gap") is None:
        return ""
    gap, error = round(twin["gap"], 3), twin.get("gap_se")
    within = f" (standard error {error:.3f})" if error is not None else ""
    if not gap:
        return f"; cross-entropy is that of the dense twin{within}"
    return f"; cross-entropy is {abs(gap):.3f} nats per token {'lower' if gap < 0 else 'higher'} than with the dense twin{within}"


def _narrow(layers: Layers) -> str:
    """Return a warning if a layer's gain varies in less than FEW_DIRECTIONS of its output's directions, else ""."""
    ratios = {
        index: layer["gain_dimensions"] / layer["output_dimensions"]
        for index, layer in layers.items()
        if layer.get("gain_dimensions") is not None and layer["output_dimensions"]
    }
    if not ratios or min(ratios.values()) >= FEW_DIRECTIONS:
        return ""
    index = min(ratios, key=lambda index: ratios[index])
    gain, output = layers[index]["gain_dimensions"], layers[index]["output_dimensions"]
    return f"; the gain of layer {index} varies in only {gain:.1f} directions, the MLP's output in {output:.1f}"


def _named(layers: Layers) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}"


def _low(layer: Mapping[str, Any], name: str, threshold: float) -> bool:
    value = layer.get(name)
    return value is None or value < threshold


def _values(layers: Layers, name: str) -> list[float]:
    return [0.0 if (value := layer.get(name)) is None else value for layer in layers.values()]


def _lowest(layers: Layers, name: str) -> str:
    return f"{min(_values(layers, name)):.2f}"


def _range(layers: Layers, name: str) -> str:
    return _span(min(_values(layers, name)), max(_values(layers, name)))


def _explained(layers: Layers, name: str) -> str:
    return _span(1 - max(_values(layers, name)), 1 - min(_values(layers, name)))


def _span(low: float, high: float) -> str:
    first, last = (f"{100 * value:.0f}" for value in (low, high))
    return f"{first} %" if first == last else f"{first} to {last} %"

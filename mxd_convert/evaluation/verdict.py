"""One plain sentence on what the reliance figures say."""

from collections.abc import Mapping
from typing import Any

THRESHOLD = 0.5
CARRY = "experts carry the layer"
NOT_SHOWN = "experts not shown to matter"
NOT_APPLICABLE = "not applicable"


def verdict(layers: Mapping[str, Mapping[str, Any]]) -> str:
    """The verdict over all layers: each of gate share, identity share and routing necessity is at least a half in every one.

    A half, because then more of the layer's output (or of what the model loses without it) hangs on which experts fire than does
    not. Layers without experts (figures None) make it "not applicable".
    """
    figures = [layer[name] for layer in layers.values() for name in ("gate_share", "identity_share", "routing_necessity")]
    if not figures or all(value is None for value in figures):
        return NOT_APPLICABLE
    return CARRY if all(value is not None and value >= THRESHOLD for value in figures) else NOT_SHOWN

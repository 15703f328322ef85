"""The table of layer kinds that can replace an MLP: their components, and their names in tables, plots and cards.

A new kind needs a row here, a class in `modeling/layers_mxd.py`, and the keys of its config entry in
`modeling/configuration_mxd.py`.
"""

import difflib
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Kind:
    """A kind of layer: one row of the table.

    Attributes:
        name: name in recipes and config.json.
        title: name in tables and plots.
        family: name in model cards.
        tags: tags of the model card on the Hub.
        colour: colour in plots, as #rrggbb.
        marker: matplotlib marker in plots.
        unit: name of one row of the gate, "expert" or "latent".
        has_linear: whether the layer has hidden units and `D^T z`.
        adds: whether `D^T z` is added to the gain instead of multiplying it.
        has_experts: whether the layer has a gate and experts.
        learns_gate: whether the gate is trained.
        unit_norm: whether experts keep unit norm in training with `train.init: paper`.
        has_skip: whether the layer always has a linear skip path.
    """

    name: str
    title: str
    family: str
    tags: tuple[str, ...]
    colour: str
    marker: str
    unit: str = "expert"
    has_linear: bool = True
    adds: bool = False
    has_experts: bool = True
    learns_gate: bool = True
    unit_norm: bool = True
    has_skip: bool = False

    @property
    def is_product(self) -> bool:
        """Return whether the layer's output is the product of a gain and a linear factor."""
        return self.has_linear and self.has_experts and not self.adds

    def formula(self, shared_expert: bool, skip: bool) -> str:
        """Return the layer's output as a formula, such as `y = (C^T a) * (D^T z) + b`."""
        gain, linear = "c_0 + C^T a" if shared_expert else "C^T a", "D^T z"
        parts = {
            f"({gain}) * ({linear})": self.is_product,
            gain: self.has_experts and not self.is_product,
            linear: self.has_linear and not self.is_product,
            "S x": skip or self.has_skip,
            "b": True,
        }
        return "y = " + " + ".join(part for part, is_there in parts.items() if is_there)


_MXD = Kind("mxd", "MxD", "Mixture-of-Decoders", ("mxd", "mixture-of-decoders"), colour="#7b2d8b", marker="o")
_RANDOM_GATE = replace(_MXD, name="random_gate", title="MxD, random gate", learns_gate=False, colour="#c9952b", marker="^")
_TRANSCODER = Kind(
    "transcoder",
    "TopK transcoder",
    "transcoder",
    ("transcoder",),
    unit="latent",
    has_linear=False,
    unit_norm=False,
    colour="#2a788e",
    marker="s",
)
_SKIP_TRANSCODER = replace(
    _TRANSCODER,
    name="skip_transcoder",
    title="skip transcoder",
    family="skip transcoder",
    tags=("skip-transcoder",),
    has_skip=True,
    colour="#5aa64b",
    marker="D",
)
_DENSE_ASSISTED = replace(
    _TRANSCODER,
    name="dense_assisted",
    title="additive control",
    family="dense-assisted transcoder",
    tags=("dense-assisted-transcoder",),
    has_linear=True,
    adds=True,
    colour="#b5485d",
    marker="P",
)
_DENSE_TWIN = Kind(
    "dense_twin",
    "dense twin (constant gain)",
    "dense twin",
    ("dense-twin",),
    has_experts=False,
    colour="#555555",
    marker="*",
)
KINDS: dict[str, Kind] = {
    row.name: row for row in (_MXD, _TRANSCODER, _SKIP_TRANSCODER, _DENSE_ASSISTED, _DENSE_TWIN, _RANDOM_GATE)
}


def check_kind(name: str) -> str:
    """Return the name of a kind. Raises ValueError for any other name, with the closest one."""
    if name in KINDS:
        return name
    close = difflib.get_close_matches(name, KINDS, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"layer.kind: {name!r} is not one of {', '.join(KINDS)}{hint}")

"""ONE table of the kinds of layers that can replace an MLP: what each consists of, and how it is called in tables, plots and cards.

A new kind is a row here, a class in `modeling/layers_mxd.py`, and the form of its entry in `modeling/configuration_mxd.py`.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Kind:
    """A row of the table.

    name: in recipes and config.json. title: in tables and plots. family: in model cards, where `tags` are the Hub's tags.
    unit: what one row of the gate is called. has_linear: has hidden units. has_experts: has a gate and experts. learns_gate: the gate is
    trained. unit_norm: experts keep unit norm in training (`train.init: paper`). has_skip: always has a linear path from input to output.
    colour, marker: in plots.
    """

    name: str
    title: str
    family: str
    tags: tuple[str, ...]
    colour: str
    marker: str
    unit: str = "expert"
    has_linear: bool = True
    has_experts: bool = True
    learns_gate: bool = True
    unit_norm: bool = True
    has_skip: bool = False

    @property
    def is_product(self) -> bool:
        """Whether the output is a product of a gain and a linear factor."""
        return self.has_linear and self.has_experts


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
_DENSE_TWIN = Kind(
    "dense_twin",
    "dense twin (constant gain)",
    "dense twin",
    ("dense-twin",),
    has_experts=False,
    colour="#555555",
    marker="*",
)
KINDS: dict[str, Kind] = {row.name: row for row in (_MXD, _TRANSCODER, _SKIP_TRANSCODER, _DENSE_TWIN, _RANDOM_GATE)}

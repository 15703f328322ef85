"""`LayerSpec`: the kind and sizes of a layer, with its parameter and FLOP counts."""

from dataclasses import dataclass, replace
from typing import Any

from mxd_convert.modeling import configuration_mxd
from mxd_convert.recipe.kinds import KINDS, Kind


@dataclass(frozen=True)
class LayerSpec:
    """Kind and sizes of a layer. `d_hidden` is 0 without a linear factor; `n_experts` and `k` are 0 without experts."""

    kind: str
    d_in: int
    d_hidden: int
    d_out: int
    n_experts: int
    k: int
    activation: str = "gelu"
    glu: bool = False
    sparsity: str = "topk"
    skip: bool = False
    shared_expert: bool = False

    @property
    def traits(self) -> Kind:
        """The row of this kind in `recipe/kinds.py`."""
        return KINDS[self.kind]

    def entry(self) -> dict[str, Any]:
        """Return the layer's entry in config.json."""
        sizes, defaults = configuration_mxd.KINDS[self.kind]
        # a spec has no dropout: it comes from the base model
        settings = {key: getattr(self, key, default) for key, default in defaults.items()}
        return {"kind": self.kind, **{key: getattr(self, key) for key in sorted(sizes)}, **settings}

    @property
    def active(self) -> int:
        """Maximum number of active experts per token: k with top-k, all experts with L1."""
        return self.n_experts if self.sparsity == "l1" else self.k

    @property
    def parameters(self) -> int:
        """Number of parameters: encoders, decoder, gate, experts, output bias, and the optional shared expert and skip path."""
        linear = (2 if self.glu else 1) * self.d_hidden * (self.d_in + 1) + self.d_hidden * self.d_out
        gain = self.n_experts * (self.d_in + 1 + self.d_out)
        shared = self.d_out if self.shared_expert else 0
        return linear + gain + shared + self.d_out + (self.d_in * self.d_out if self.skip else 0)

    @property
    def forward_flops(self) -> int:
        """FLOPs of a forward pass, per token."""
        linear = 2 * self.d_in * self.d_hidden * (2 if self.glu else 1) + 2 * self.d_hidden * self.d_out
        gain = 2 * self.d_in * self.n_experts + 2 * self.active * self.d_out
        return linear + gain + (2 * self.d_in * self.d_out if self.skip else 0)

    @property
    def step_flops(self) -> int:
        """FLOPs of a forward and backward pass, per token, with sparse gradients of gate and experts.

        The layer's input needs no gradient, so each matrix that reads it takes two products; every other matrix takes three.
        """
        linear = 4 * self.d_in * self.d_hidden * (2 if self.glu else 1) + 6 * self.d_hidden * self.d_out
        gain = 2 * self.d_in * self.n_experts + 6 * self.active * self.d_out
        if self.traits.learns_gate:
            gain += 2 * self.active * self.d_in
        elif self.active:
            gain -= 2 * self.active * self.d_out  # the coefficients need no gradient either
        return linear + gain + (4 * self.d_in * self.d_out if self.skip else 0)

    @property
    def input_flops(self) -> int:
        """FLOPs of the gradient with respect to the layer's input, per token."""
        gain = 2 * self.active * self.d_in
        if not self.traits.learns_gate:  # otherwise `step_flops` includes the gradient of the coefficients
            gain += 2 * self.active * self.d_out
        return 2 * self.d_in * self.d_hidden * (2 if self.glu else 1) + gain + (2 * self.d_in * self.d_out if self.skip else 0)

    def match_parameters(self, expansion: int) -> "LayerSpec":
        """Return the spec with the most experts that fit the parameter count of a plain transcoder (paper, section 4.1).

        The transcoder has `expansion * d_in` latents. A spec of a kind without experts is returned unchanged.
        Raises ValueError if not even one expert fits.
        """
        if not self.traits.has_experts:
            return self
        width = expansion * self.d_in
        room = LayerSpec("transcoder", self.d_in, 0, self.d_out, width, 1).parameters - replace(self, n_experts=0).parameters
        n_experts = room // (self.d_in + self.d_out + 1)
        if n_experts < 1:
            raise ValueError(
                f"layer.expansion: {expansion} is too small: a transcoder with {width} latents has fewer parameters than the"
                f" {self.kind} layer has without experts; raise layer.expansion or set layer.experts"
            )
        return replace(self, n_experts=n_experts)

    def dense_twin(self) -> "LayerSpec":
        """Return the spec of the dense twin: the same linear factor with a constant gain."""
        return replace(self, kind="dense_twin", n_experts=0, k=0, sparsity="topk", shared_expert=False)

    def __str__(self) -> str:
        name = self.kind.replace("_", " ")
        return f"{name}, {self.n_experts:,} {self.traits.unit}s each, {self.k} active" if self.traits.has_experts else name

"""`LayerSpec`: the kind and the sizes of a layer, and what follows from them."""

from dataclasses import dataclass, replace
from typing import Any

from mxd_convert.modeling import configuration_mxd
from mxd_convert.recipe.kinds import KINDS, Kind


@dataclass(frozen=True)
class LayerSpec:
    """Kind and sizes of a layer. d_hidden is 0 without a linear factor, n_experts and k are 0 without experts."""

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

    @property
    def facts(self) -> Kind:
        """The row of the kind."""
        return KINDS[self.kind]

    def entry(self) -> dict[str, Any]:
        """Return the layer's entry in config.json."""
        sizes, defaults = configuration_mxd.KINDS[self.kind]
        settings = {key: getattr(self, key, default) for key, default in defaults.items()}  # the dropout is the base's
        return {"kind": self.kind, **{key: getattr(self, key) for key in sorted(sizes)}, **settings}

    @property
    def active(self) -> int:
        """Experts that a token may use: with L1 every gate may be positive."""
        return self.n_experts if self.sparsity == "l1" else self.k

    @property
    def parameters(self) -> int:
        """Parameters of encoder(s), decoder, gate, experts, output bias, and of the skip path if there is one."""
        linear = (2 if self.glu else 1) * self.d_hidden * (self.d_in + 1) + self.d_hidden * self.d_out
        gain = self.n_experts * (self.d_in + 1 + self.d_out)
        return linear + gain + self.d_out + (self.d_in * self.d_out if self.skip else 0)

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of a forward pass, per token."""
        linear = 2 * self.d_in * self.d_hidden * (2 if self.glu else 1) + 2 * self.d_hidden * self.d_out
        gain = 2 * self.d_in * self.n_experts + 2 * self.active * self.d_out
        return linear + gain + (2 * self.d_in * self.d_out if self.skip else 0)

    @property
    def step_flops(self) -> int:
        """Floating-point operations of forward and backward, per token, with sparse gradients of gate and experts.

        The layer's input needs no gradient: matrices that read it have two products, the others three.
        """
        linear = 4 * self.d_in * self.d_hidden * (2 if self.glu else 1) + 6 * self.d_hidden * self.d_out
        gain = 2 * self.d_in * self.n_experts + 6 * self.active * self.d_out
        if self.facts.learns_gate:
            gain += 2 * self.active * self.d_in
        elif self.active:
            gain -= 2 * self.active * self.d_out  # the coefficients need no gradient either
        return linear + gain + (4 * self.d_in * self.d_out if self.skip else 0)

    @property
    def input_flops(self) -> int:
        """Floating-point operations of the gradient of the layer's input, per token."""
        gain = 2 * self.active * self.d_in
        if not self.facts.learns_gate:  # otherwise the step already has the coefficients' gradient
            gain += 2 * self.active * self.d_out
        return 2 * self.d_in * self.d_hidden * (2 if self.glu else 1) + gain + (2 * self.d_in * self.d_out if self.skip else 0)

    def matched(self, expansion: int) -> "LayerSpec":
        """Return the spec with the most experts that keep its parameters within those of a plain transcoder of width `expansion` x `d_in`.

        A layer without experts is returned unchanged. Raises ValueError where not even one expert fits. Paper, section 4.1.
        """
        if not self.facts.has_experts:
            return self
        width = expansion * self.d_in
        room = LayerSpec("transcoder", self.d_in, 0, self.d_out, width, 1).parameters - replace(self, n_experts=0).parameters
        n_experts = room // (self.d_in + self.d_out + 1)
        if n_experts < 1:
            raise ValueError(
                f"layer.expansion: a transcoder of width {width} has fewer parameters than this kind of layer without experts;"
                " raise layer.expansion or set layer.experts"
            )
        return replace(self, n_experts=n_experts)

    def twin(self) -> "LayerSpec":
        """Return the dense twin: the same linear factor, and a constant gain."""
        return replace(self, kind="dense_twin", n_experts=0, k=0, sparsity="topk")

    def __str__(self) -> str:
        name = self.kind.replace("_", " ")
        return f"{name}, {self.n_experts:,} {self.facts.unit}s each, {self.k} active" if self.facts.has_experts else name

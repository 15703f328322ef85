"""The shape of a layer of any kind: its parameters and products, and the expert count that matches a transcoder (paper, section 4.1)."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """Kind and sizes. d_hidden is 0 without a linear factor (transcoders), n_experts and k are 0 without a gain (dense twin)."""

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
    def has_experts(self) -> bool:
        return self.kind != "dense_twin"

    @property
    def active(self) -> int:
        """Rows that a token may use: with L1 every gate may be positive."""
        return self.n_experts if self.sparsity == "l1" else self.k

    @property
    def parameters(self) -> int:
        """Of encoder(s), decoder, gate, experts, output bias, and the skip path if there is one."""
        linear = (2 if self.glu else 1) * self.d_hidden * (self.d_in + 1) + self.d_hidden * self.d_out
        gain = self.n_experts * (self.d_in + 1 + self.d_out)
        return linear + gain + self.d_out + (self.d_in * self.d_out if self.skip else 0)

    @property
    def forward_flops(self) -> int:
        """Floating point operations of a forward pass for one token: its products."""
        linear = 2 * self.d_in * self.d_hidden * (2 if self.glu else 1) + 2 * self.d_hidden * self.d_out
        gain = 2 * self.d_in * self.n_experts + 2 * self.active * self.d_out
        return linear + gain + (2 * self.d_in * self.d_out if self.skip else 0)

    @property
    def step_flops(self) -> int:
        """Floating point operations of forward and backward for one token, with sparse gradients of gate and experts.

        The layer's input needs no gradient, so what reads it has two products and the rest three.
        """
        linear = 4 * self.d_in * self.d_hidden * (2 if self.glu else 1) + 6 * self.d_hidden * self.d_out
        gain = 2 * self.d_in * self.n_experts + 6 * self.active * self.d_out
        if self.kind != "random_gate":
            gain += 2 * self.active * self.d_in
        elif self.active:
            gain -= 2 * self.active * self.d_out  # the coefficients need no gradient either
        return linear + gain + (4 * self.d_in * self.d_out if self.skip else 0)

    @property
    def input_flops(self) -> int:
        """Floating point operations of the gradient of the layer's input, for one token."""
        gain = 2 * self.active * self.d_in
        if self.kind == "random_gate":  # of the others the step has the coefficients' gradient already
            gain += 2 * self.active * self.d_out
        return 2 * self.d_in * self.d_hidden * (2 if self.glu else 1) + gain + (2 * self.d_in * self.d_out if self.skip else 0)

    def matched(self, expansion: int) -> "Shape":
        """The same with the most experts at which it has no more parameters than a plain transcoder of width `expansion` x `d_in`.

        A layer without experts is as it is. Raises ValueError where not even one expert fits.
        """
        if not self.has_experts:
            return self
        width = expansion * self.d_in
        room = Shape("transcoder", self.d_in, 0, self.d_out, width, 1).parameters - replace(self, n_experts=0).parameters
        n_experts = room // (self.d_in + self.d_out + 1)
        if n_experts < 1:
            raise ValueError(
                f"layer.expansion: a transcoder of width {width} has fewer parameters than this kind of layer without experts;"
                " raise layer.expansion or set layer.experts"
            )
        return replace(self, n_experts=n_experts)

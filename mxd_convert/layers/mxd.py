"""The MxD as it is trained: the checkpoint's layer with the paper's initialisation, the sparse operations, and the experts' unit norm."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mxd_convert.layers.sparse_ops import RowGradient, sparse_gate, weighted_rows
from mxd_convert.modeling import modeling_mxd

_FUSED = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}  # the same function, in one kernel


class MxD(modeling_mxd.MxD):
    """A Mixture of Decoders layer, initialised as in the paper; the forward pass is the checkpoint's own, with gradients that stay sparse.

    Initialisation (paper, appendix; all in `reset_parameters`):

    | parameter               | shape     | start                                |
    | ----------------------- | --------- | ------------------------------------ |
    | encoder(s), gate weight | (H,I) (N,I) | as nn.Linear                       |
    | their biases            | (H) (N)   | 0                                    |
    | decoder (D)             | (O,H)     | 0: the layer starts as its bias      |
    | experts (C)             | (N,O)     | uniform, then rows of unit norm      |
    | output bias, skip       | (O) (O,I) | 0                                    |
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sinks: dict[Tensor, RowGradient] = {}  # of the gate's weight and the experts, where an optimiser wants it so
        self.act = ACT2FN[_FUSED.get(self.activation, self.activation)]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for linear in (self.encoder, self.encoder_gate, self.gate):
            if linear is not None:
                linear.reset_parameters()
                nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.decoder.weight)
        nn.init.zeros_(self.output_bias)
        if self.skip is not None:
            nn.init.zeros_(self.skip.weight)
        bound = self.d_out**-0.5
        nn.init.uniform_(self.experts, -bound, bound)
        self.normalise_experts()

    def encode(self, x_BI: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        """As the checkpoint's, chunk by chunk of tokens: no (..., N) tensor is made, and none kept for the backward."""
        if self.sparsity == "l1":
            return super().encode(x_BI)
        weight, bias = self.gate.weight, self.gate.bias
        values_BK, indices_BK = sparse_gate(x_BI.reshape(-1, self.d_in), weight, bias, self.k, self.sinks.get(weight))
        return values_BK.view(*x_BI.shape[:-1], self.k), indices_BK.view(*x_BI.shape[:-1], self.k)

    def rows(self, values_BK: Tensor, indices_BK: Tensor) -> Tensor:
        lead = values_BK.shape[:-1]
        values_BK, indices_BK = values_BK.reshape(-1, self.k), indices_BK.reshape(-1, self.k)
        sums_BO = weighted_rows(values_BK, indices_BK, self.experts, self.sinks.get(self.experts))
        return sums_BO.view(*lead, self.d_out)

    def defer_row_gradients(self) -> None:
        """From now on the gradients of the gate's weight and of the experts are kept in `sinks`, not made whole in `.grad`."""
        if self.sparsity == "topk":
            self.sinks = {parameter: RowGradient() for parameter in (self.gate.weight, self.experts)}

    @torch.no_grad()
    def normalise_experts(self) -> None:
        """Gives every row of C unit norm, in place."""
        normalise(self.experts)

    def penalty(self, codes: tuple[Tensor, Tensor] | Tensor, weight_B: Tensor) -> Tensor:
        """The L1 norm of the coefficients, a mean over the tokens that count."""
        values = codes if isinstance(codes, Tensor) else codes[0]
        return (values.float().sum(-1) * weight_B).sum() / weight_B.sum().clamp_min(1)


def normalise(rows_ND: Tensor, which_N: Tensor | None = None) -> None:
    """Gives rows unit norm, in place: those that `which` (bool) names, or all."""
    norm_N1 = torch.linalg.vector_norm(rows_ND, dim=-1, keepdim=True).clamp_min(1e-8)
    if which_N is not None:
        norm_N1 = norm_N1.where(which_N.unsqueeze(-1), 1.0)
    rows_ND.div_(norm_N1)


def project(gradient_ND: Tensor, rows_ND: Tensor) -> None:
    """Removes from each row's gradient its component along the row (which the unit norm would undo), in place. Rows have unit norm."""
    along_N1 = (gradient_ND * rows_ND).sum(-1, keepdim=True)
    gradient_ND.addcmul_(along_N1, rows_ND, value=-1)

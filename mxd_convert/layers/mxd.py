"""The MxD as it is trained: the checkpoint's layer with the paper's initialisation and the constraint on its experts."""

from typing import Any

import torch
from torch import Tensor, nn

from mxd_convert.modeling import modeling_mxd


class MxD(modeling_mxd.MxD):
    """A Mixture of Decoders layer, initialised as in the paper; the forward pass is the checkpoint's own.

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

    @torch.no_grad()
    def normalise_experts(self) -> None:
        """Gives every row of C unit norm, in place."""
        self.experts.div_(self.experts.norm(dim=-1, keepdim=True).clamp_min(1e-8))

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Removes from the gradient of each row of C its component along that row (which the unit norm would undo), in place."""
        gradient_NO = self.experts.grad
        if gradient_NO is not None:
            along_N1 = (gradient_NO * self.experts).sum(-1, keepdim=True)
            gradient_NO.addcmul_(along_N1, self.experts, value=-1)

    def penalty(self, codes: tuple[Tensor, Tensor] | Tensor, weight_B: Tensor) -> Tensor:
        """The L1 norm of the coefficients, a mean over the tokens that count."""
        values = codes if isinstance(codes, Tensor) else codes[0]
        return (values.float().sum(-1) * weight_B).sum() / weight_B.sum().clamp_min(1)

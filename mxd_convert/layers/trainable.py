"""Trainable versions of the checkpoint's layers, with initialisation, sparse operations and unit-norm experts.

Shape suffixes: B tokens, I input width, H hidden width, O output width, N experts, K active experts.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mxd_convert.layers.sparse_ops import RowGradient, sparse_gate, weighted_rows
from mxd_convert.layers.spec import LayerSpec
from mxd_convert.modeling import layers_mxd
from mxd_convert.modeling.layers_mxd import Coefficients, FactoredLayer
from mxd_convert.recipe.kinds import KINDS

_FUSED = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}  # the same function, in one kernel

CONSTANT = 2.0  # input of the constant hidden unit's activation: no activation in use is near 0 there


class Trainable(FactoredLayer):
    """Mixin for a checkpoint's layer class: the same forward pass, with sparse gradients for gate and experts.

    Initialisation with `init: paper` (paper, appendix), set by `reset_parameters`:

    | parameter               | shape       | initial value                                      |
    | ----------------------- | ----------- | -------------------------------------------------- |
    | encoder(s), gate weight | (H,I) (N,I) | as nn.Linear                                       |
    | their biases            | (H) (N)     | 0                                                  |
    | decoder (D)             | (O,H)       | 0, so the layer returns its output bias            |
    | experts (C)             | (N,O)       | uniform, then unit-norm rows; 0 for a transcoder   |
    | output bias, skip       | (O) (O,I)   | 0                                                  |
    | shared expert           | (O)         | 0                                                  |

    With `init: tokens` an MxD is initialised as a transcoder. The rows of C are 0 and have no norm constraint.
    The linear factor is u = 1: the first hidden unit is constant, and D reads only that unit.
    `training/token_init.py` then initialises gate, experts and skip path from training tokens.
    """

    def __init__(self, *args: Any, init: str = "paper", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unit_norm = KINDS[self.kind].unit_norm and init == "paper"  # applies to the rows of C
        self.sinks: dict[Tensor, RowGradient] = {}  # by parameter, see `defer_row_gradients`
        if self.decoder is not None:
            self.act = ACT2FN[_FUSED.get(self.activation, self.activation)]
        self.reset_parameters()
        if self.gate is not None and not KINDS[self.kind].learns_gate:
            self.gate.requires_grad_(False)

    def init_rows(self) -> None:
        """Do nothing: `reset_parameters` draws all parameters, in an order that keeps a seed's values reproducible."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise all parameters in place, see the class docstring."""
        for linear in (self.encoder, self.encoder_gate, self.gate):
            if linear is not None:
                linear.reset_parameters()
                nn.init.zeros_(linear.bias)
        for projection in (self.decoder, self.skip):
            if projection is not None:
                nn.init.zeros_(projection.weight)
        nn.init.zeros_(self.output_bias)
        if self.shared_expert is not None:
            nn.init.zeros_(self.shared_expert)
        if self.experts is not None and self.unit_norm:
            bound = self.d_out**-0.5
            nn.init.uniform_(self.experts, -bound, bound)
            normalise(self.experts)
        elif self.experts is not None:
            nn.init.zeros_(self.experts)
            if self.is_product:
                self._init_constant_linear()

    def _init_constant_linear(self) -> None:
        """Initialise u = 1: make the first hidden unit constant, and let D, 0 elsewhere, read only that unit."""
        for linear in (self.encoder, self.encoder_gate):
            if linear is not None:
                nn.init.zeros_(linear.weight[0])
                nn.init.constant_(linear.bias[0], CONSTANT)
        unit = self.hidden(self.encoder.weight.new_zeros(self.d_in))[0]
        nn.init.constant_(self.decoder.weight[:, 0], 1.0 / unit.item())

    def encode(self, x_BI: Tensor) -> Coefficients:
        """Return the coefficients, as the checkpoint's layer does: (values, indices), (..., K), or dense (..., N) with L1.

        With top-k, gate values are computed in chunks of tokens, so no (..., N) tensor is allocated or saved for backward.
        """
        if self.gate is None or self.sparsity == "l1":
            return super().encode(x_BI)
        weight, bias = self.gate.weight, self.gate.bias
        values_BK, indices_BK = sparse_gate(x_BI.reshape(-1, self.d_in), weight, bias, self.k, self.sinks.get(weight))
        return values_BK.view(*x_BI.shape[:-1], self.k), indices_BK.view(*x_BI.shape[:-1], self.k)

    def gain_of(self, coefficients: Coefficients) -> Tensor:
        """Return the gain `C^T a` of the coefficients, (..., O), with a sparse gradient for the experts."""
        if self.experts is None or isinstance(coefficients, Tensor):
            return super().gain_of(coefficients)
        values_BK, indices_BK = (tensor.reshape(-1, self.k) for tensor in coefficients)
        sums_BO = weighted_rows(values_BK, indices_BK, self.experts, self.sinks.get(self.experts))
        return self._with_shared(sums_BO.view(*coefficients[0].shape[:-1], self.d_out))

    def defer_row_gradients(self) -> None:
        """Accumulate the gradients of the gate's weight and the experts in `sinks`, instead of dense tensors in `.grad`."""
        if self.gate is not None and self.sparsity == "topk":
            rows = (self.gate.weight, self.experts)
            self.sinks = {parameter: RowGradient() for parameter in rows if parameter.requires_grad}

    def penalty(self, coefficients: Coefficients, weight_B: Tensor) -> Tensor:
        """Return the L1 norm of the coefficients, averaged over tokens with weight 1."""
        values = coefficients if isinstance(coefficients, Tensor) else coefficients[0]
        return (values.float().sum(-1) * weight_B).sum() / weight_B.sum().clamp_min(1)


class MxD(Trainable, layers_mxd.MxD):
    """A trainable Mixture of Decoders layer. It takes the arguments of `modeling.layers_mxd.MxD`, and `init`."""


_CLASSES: dict[str, type[Trainable]] = {"mxd": MxD}


def trainable_class(kind: str) -> type[Trainable]:
    """Return the trainable class of a kind of layer."""
    if kind not in _CLASSES:
        shipped = layers_mxd.LAYERS[kind]
        _CLASSES[kind] = type(f"Trainable{shipped.__name__}", (Trainable, shipped), {"__doc__": shipped.__doc__})
    return _CLASSES[kind]


def new_layer(spec: LayerSpec, init: str = "paper") -> Trainable:
    """Return an initialised trainable layer. init: "paper" or "tokens", see `Trainable`. Draws from torch's default generator."""
    return trainable_class(spec.kind)(**{key: value for key, value in spec.entry().items() if key != "kind"}, init=init)


def normalise(rows_ND: Tensor, which_N: Tensor | None = None) -> None:
    """Scale rows to unit norm, in place. which_N: a bool mask of the rows to scale; None scales all."""
    norm_N1 = torch.linalg.vector_norm(rows_ND, dim=-1, keepdim=True).clamp_min(1e-8)
    if which_N is not None:
        norm_N1 = norm_N1.where(which_N.unsqueeze(-1), 1.0)
    rows_ND.div_(norm_N1)


def project(gradient_ND: Tensor, rows_ND: Tensor) -> None:
    """Remove from each row's gradient its component along the row, in place. Rows must have unit norm.

    The unit-norm constraint would undo a step along the row.
    """
    along_N1 = (gradient_ND * rows_ND).sum(-1, keepdim=True)
    gradient_ND.addcmul_(along_N1, rows_ND, value=-1)

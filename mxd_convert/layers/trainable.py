"""The layers as they are trained: the checkpoint's own, with their initialisation, the sparse operations, and the experts' unit norm."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mxd_convert.layers.sparse_ops import RowGradient, sparse_gate, weighted_rows
from mxd_convert.layers.spec import LayerSpec
from mxd_convert.modeling import layers_mxd
from mxd_convert.modeling.layers_mxd import Codes, FactoredLayer
from mxd_convert.recipe.kinds import KINDS

_FUSED = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}  # the same function, in one kernel

CONSTANT = 2.0  # what the constant hidden unit gives its activation: every one in use is far from 0 there


class Trainable(FactoredLayer):
    """Goes before a checkpoint's layer: the same forward pass, with gradients of gate and experts that stay sparse.

    Initialisation (in `reset_parameters`; `init: paper`, from the paper's appendix):

    | parameter               | shape     | start                                |
    | ----------------------- | --------- | ------------------------------------ |
    | encoder(s), gate weight | (H,I) (N,I) | as nn.Linear                       |
    | their biases            | (H) (N)   | 0                                    |
    | decoder (D)             | (O,H)     | 0: the layer starts as its bias      |
    | experts (C)             | (N,O)     | uniform, then rows of unit norm; of a transcoder 0 |
    | output bias, skip       | (O) (O,I) | 0                                    |

    With `init: tokens` an MxD begins as a transcoder: rows of C at 0 and without a norm to keep, and u = 1, by a hidden unit of no weight,
    a constant, that D starts on. (training/start.py then puts tokens of the text into gate and experts.)
    """

    def __init__(self, *args: Any, init: str = "paper", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unit_norm = KINDS[self.kind].unit_norm and init == "paper"  # of the experts
        self.sinks: dict[Tensor, RowGradient] = {}  # of the gate's weight and the experts, where an optimiser wants it so
        if self.decoder is not None:
            self.act = ACT2FN[_FUSED.get(self.activation, self.activation)]
        self.reset_parameters()
        if self.gate is not None and not KINDS[self.kind].learns_gate:
            self.gate.requires_grad_(False)

    def init_rows(self) -> None:
        """Left to `reset_parameters`: what it draws depends on the order of the draws."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for linear in (self.encoder, self.encoder_gate, self.gate):
            if linear is not None:
                linear.reset_parameters()
                nn.init.zeros_(linear.bias)
        for start in (self.decoder, self.skip):
            if start is not None:
                nn.init.zeros_(start.weight)
        nn.init.zeros_(self.output_bias)
        if self.experts is not None and self.unit_norm:
            bound = self.d_out**-0.5
            nn.init.uniform_(self.experts, -bound, bound)
            normalise(self.experts)
        elif self.experts is not None:
            nn.init.zeros_(self.experts)
            if self.decoder is not None:
                self._begin_constant()

    def _begin_constant(self) -> None:
        """u = 1: the first hidden unit has no weight, and D is 0 elsewhere."""
        for linear in (self.encoder, self.encoder_gate):
            if linear is not None:
                nn.init.zeros_(linear.weight[0])
                nn.init.constant_(linear.bias[0], CONSTANT)
        unit = self.hidden(self.encoder.weight.new_zeros(self.d_in))[0]
        nn.init.constant_(self.decoder.weight[:, 0], 1.0 / unit.item())

    def encode(self, x_BI: Tensor) -> Codes:
        """As the checkpoint's, chunk by chunk of tokens: no (..., N) tensor is made, and none kept for the backward."""
        if self.gate is None or self.sparsity == "l1":
            return super().encode(x_BI)
        weight, bias = self.gate.weight, self.gate.bias
        values_BK, indices_BK = sparse_gate(x_BI.reshape(-1, self.d_in), weight, bias, self.k, self.sinks.get(weight))
        return values_BK.view(*x_BI.shape[:-1], self.k), indices_BK.view(*x_BI.shape[:-1], self.k)

    def gain_of(self, codes: Codes) -> Tensor:
        if self.experts is None or isinstance(codes, Tensor):
            return super().gain_of(codes)
        values_BK, indices_BK = (tensor.reshape(-1, self.k) for tensor in codes)
        sums_BO = weighted_rows(values_BK, indices_BK, self.experts, self.sinks.get(self.experts))
        return sums_BO.view(*codes[0].shape[:-1], self.d_out)

    def defer_row_gradients(self) -> None:
        """From now on the gradients of the gate's weight and of the experts are kept in `sinks`, not made whole in `.grad`."""
        if self.gate is not None and self.sparsity == "topk":
            rows = (self.gate.weight, self.experts)
            self.sinks = {parameter: RowGradient() for parameter in rows if parameter.requires_grad}

    def penalty(self, codes: Codes, weight_B: Tensor) -> Tensor:
        """The L1 norm of the coefficients, a mean over the tokens that count."""
        values = codes if isinstance(codes, Tensor) else codes[0]
        return (values.float().sum(-1) * weight_B).sum() / weight_B.sum().clamp_min(1)


class MxD(Trainable, layers_mxd.MxD):
    """A Mixture of Decoders layer, to be trained. Arguments as in modeling/layers_mxd.py."""


_CLASSES: dict[str, type[Trainable]] = {"mxd": MxD}


def trainable_class(kind: str) -> type[Trainable]:
    """Return the class of a kind's layers as they are trained."""
    if kind not in _CLASSES:
        shipped = layers_mxd.LAYERS[kind]
        _CLASSES[kind] = type(f"Trainable{shipped.__name__}", (Trainable, shipped), {"__doc__": shipped.__doc__})
    return _CLASSES[kind]


def new_layer(spec: LayerSpec, init: str = "paper") -> Trainable:
    """Return a layer to be trained, its parameters drawn from torch's generator. init: "paper" or "tokens", see Trainable."""
    return trainable_class(spec.kind)(**{key: value for key, value in spec.entry().items() if key != "kind"}, init=init)


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

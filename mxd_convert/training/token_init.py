"""How layers start on the text: each expert as one of its tokens.

Expert n of a start is a sampled token: its gate looks along that token's input, from the mean of all, and its row is that token's output
beyond the mean of all. A layer then begins as a regression on the nearest of its tokens, all of them in use, in place of one whose
experts must first be found by a random gate. No two experts look the same way: frequent tokens would take most of a layer, in the first
MLP of a model whose attention and MLPs are parallel with gates that are equal to the bit, since its input is the token's alone.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mxd_convert.data.blocks import block_order
from mxd_convert.layers import Trainable
from mxd_convert.training.stream import FORWARD_TOKENS, Activations

# of a gate's direction; nn.Linear draws 0.58. At twice that more experts stay alive on a wide model, but on both all learn slower
GATE_NORM = 0.8
ALIKE = 0.9  # cosine of two inputs, from the mean, of which one becomes no expert
MOST_TOKENS = 8  # an expert, that are looked at: some layers never see as many ways as they have experts
AT_ONCE = 64  # of them: one like another of these that was passed over is passed over too
LEFT = 8  # of so many tokens one is for the fit of the experts' scale


@torch.no_grad()
def init_from_tokens(layers: Mapping[int, Trainable], activations: Activations) -> None:
    """Starts the layers whose gates are trained on the first blocks of the training text.

    Where its tokens are too few or too much alike for all experts, the others keep a random gate and a row of zeros. What a layer gets
    hangs on the seed, the text and the layer alone.
    """
    source = activations.source
    starts = {index: _Start(layer) for index, layer in layers.items() if layer.n_experts and layer.gate.weight.requires_grad}
    if not starts:
        return
    rows = block_order(len(source.blocks), 0, len(source.blocks), source.seed)
    random = np.random.default_rng([source.seed, 2])
    other: dict[int, tuple[Tensor, Tensor]] = {}
    # the same however many processes there are and whatever a step takes: what becomes an expert hangs on it
    at_once = max(1, FORWARD_TOKENS // source.blocks.context)
    for begin in range(0, len(rows), at_once):
        # a layer that is done before others is as it would be alone
        going = {index: start for index, start in starts.items() if not start.done}
        if not going:
            break
        batch = activations.read(rows[begin : begin + at_once], going)
        counted = batch.counted_B.nonzero().squeeze(1)
        order = counted[torch.from_numpy(random.permutation(len(counted))).to(counted.device)]
        left, taken = order[: len(order) // LEFT], order[len(order) // LEFT :]
        for index, start in going.items():
            x_BI, y_BO = batch.activations[index]
            start.take(x_BI[taken].float(), y_BO[taken].float())
            if index not in other or len(left) >= len(other[index][0]):  # the last of a short text is too few for a fit
                other[index] = x_BI[left].float(), y_BO[left].float()
    for index, start in starts.items():
        start.finish(*other[index])


class _Start:
    """Of one layer. Tokens go straight into the rows of gate and experts, so that nothing of their size is held besides."""

    def __init__(self, layer: Trainable) -> None:
        self.layer = layer
        self.taken = self.seen = 0
        self.input_sum_I = torch.zeros_like(layer.gate.weight[0], dtype=torch.float64)
        self.output_sum_O = torch.zeros_like(layer.output_bias, dtype=torch.float64)
        self.centre_I = torch.zeros_like(layer.gate.weight[0])  # the mean of the first tokens

    @property
    def done(self) -> bool:
        return self.taken == self.layer.n_experts or self.seen >= MOST_TOKENS * self.layer.n_experts

    def take(self, x_BI: Tensor, y_BO: Tensor) -> None:
        if not self.seen and len(x_BI):
            self.centre_I = x_BI.mean(0)
        self.seen += len(x_BI)
        self.input_sum_I += x_BI.double().sum(0)
        self.output_sum_O += y_BO.double().sum(0)
        for x, y in zip((x_BI - self.centre_I).split(AT_ONCE), y_BO.split(AT_ONCE), strict=True):
            if self.taken == self.layer.n_experts:
                break
            new = ~_alike(x, x).tril(-1).any(1) & ~_alike(x, self.layer.gate.weight[: self.taken]).any(1)
            chosen = new.nonzero().squeeze(1)[: self.layer.n_experts - self.taken]
            rows = slice(self.taken, self.taken + len(chosen))
            self.layer.gate.weight[rows] = x[chosen]
            self.layer.experts[rows] = y[chosen]
            self.taken += len(chosen)

    def finish(self, x_BI: Tensor, y_BO: Tensor) -> None:
        """x, y: of tokens that did not become experts, on which the experts' common scale is fitted."""
        layer, rows = self.layer, slice(0, self.taken)
        if not self.taken:
            return
        mean_I, mean_O = ((total / self.seen).float() for total in (self.input_sum_I, self.output_sum_O))
        weight_NI, experts_NO = layer.gate.weight[rows], layer.experts[rows]
        weight_NI -= mean_I - self.centre_I
        weight_NI *= GATE_NORM / torch.linalg.vector_norm(weight_NI, dim=-1, keepdim=True).clamp_min(1e-8)
        layer.gate.bias[rows] = -(weight_NI @ mean_I)
        experts_NO -= mean_O
        layer.output_bias.copy_(mean_O)
        gain_BO = layer.gain_of(layer.encode(x_BI)).double()
        if len(x_BI):  # of a text of a few tokens none is left
            scale = (gain_BO * (y_BO - mean_O)).sum() / gain_BO.square().sum().clamp_min(1e-30)
            experts_NO *= scale.clamp_min(0).float()


def _alike(x_BI: Tensor, others_NI: Tensor) -> Tensor:
    """Which of the others look the same way, (B, N), for inputs from their mean. What is at the mean looks no way."""
    return x_BI @ others_NI.T > ALIKE * x_BI.norm(dim=-1, keepdim=True) * others_NI.norm(dim=-1)

"""How layers start on the text: each expert as one of its tokens.

Expert n of a start is a sampled token: its gate looks along that token's input, from the mean of all, and its row is that token's output
beyond the mean of all. A layer then begins as a regression on the nearest of N tokens, with every expert in use, in place of one whose
experts must first be found by a random gate.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mxd_convert.data import block_order
from mxd_convert.layers import Trainable
from mxd_convert.training.activations import FORWARD_TOKENS, Activations

# of a gate's direction; nn.Linear draws 0.58. At twice that more experts stay alive on a wide model, but on both all learn slower
GATE_NORM = 0.8


@torch.no_grad()
def start_on_text(layers: Mapping[int, Trainable], activations: Activations) -> None:
    """Starts the layers whose gates are trained on the first blocks of the training text; half of their tokens become experts.

    Where the text has fewer tokens than there are experts, the others keep a random gate and a row of zeros. What a layer gets hangs
    on the seed, the text and the layer alone.
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
        batch = activations.read(rows[begin : begin + at_once])
        counted = batch.counted_B.nonzero().squeeze(1)
        order = counted[torch.from_numpy(random.permutation(len(counted))).to(counted.device)]
        taken, left = order[: (len(order) + 1) // 2], order[(len(order) + 1) // 2 :]
        for index, start in starts.items():
            if start.full:  # a layer of fewer experts than others: it is done, as it would be alone
                continue
            x_BI, y_BO = batch.activations[index]
            start.take(x_BI[taken].float(), y_BO[taken].float())
            other[index] = x_BI[left].float(), y_BO[left].float()
        if all(start.full for start in starts.values()):
            break
    for index, start in starts.items():
        start.finish(*other[index])


class _Start:
    """Of one layer. Tokens go straight into the rows of gate and experts, so that nothing of their size is held besides."""

    def __init__(self, layer: Trainable) -> None:
        self.layer = layer
        self.taken = self.seen = 0
        self.input_sum_I = torch.zeros_like(layer.gate.weight[0], dtype=torch.float64)
        self.output_sum_O = torch.zeros_like(layer.output_bias, dtype=torch.float64)

    @property
    def full(self) -> bool:
        return self.taken == self.layer.n_experts

    def take(self, x_BI: Tensor, y_BO: Tensor) -> None:
        self.seen += len(x_BI)
        self.input_sum_I += x_BI.double().sum(0)
        self.output_sum_O += y_BO.double().sum(0)
        count = min(len(x_BI), self.layer.n_experts - self.taken)
        rows = slice(self.taken, self.taken + count)
        self.layer.gate.weight[rows] = x_BI[:count]
        self.layer.experts[rows] = y_BO[:count]
        self.taken += count

    def finish(self, x_BI: Tensor, y_BO: Tensor) -> None:
        """x, y: of tokens that did not become experts, on which the experts' common scale is fitted."""
        layer, rows = self.layer, slice(0, self.taken)
        if not self.taken:
            return
        mean_I, mean_O = ((total / self.seen).float() for total in (self.input_sum_I, self.output_sum_O))
        weight_NI, experts_NO = layer.gate.weight[rows], layer.experts[rows]
        weight_NI -= mean_I
        weight_NI *= GATE_NORM / torch.linalg.vector_norm(weight_NI, dim=-1, keepdim=True).clamp_min(1e-8)
        layer.gate.bias[rows] = -(weight_NI @ mean_I)
        experts_NO -= mean_O
        layer.output_bias.copy_(mean_O)
        gain_BO = layer.gain_of(layer.encode(x_BI)).double()
        scale = (gain_BO * (y_BO - mean_O)).sum() / gain_BO.square().sum().clamp_min(1e-30)
        experts_NO *= scale.clamp_min(0).float()

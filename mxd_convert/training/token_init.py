"""Initialisation from training tokens: the skip path is fitted by least squares, and each expert is initialised from one token.

The expert's gate weight is the token's input minus the mean input, scaled to a fixed norm. Its row is the token's output minus the
mean output, or what the skip path leaves of it. The layer then begins as a regression on its nearest tokens with all experts in use,
whereas a random gate must first find its experts. A shared expert begins at a multiple of the output's standard deviation, which the
output bias takes back: with u = 1 it adds nothing, but the hidden units learn from the first step.

Near-duplicate tokens are skipped: frequent tokens would take most of a layer. Where attention and MLPs are parallel, the input of the
first MLP depends on the token alone, so repeated tokens would give gates that are equal bit for bit.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mxd_convert.data.blocks import block_order
from mxd_convert.layers import Trainable
from mxd_convert.layers.linear_fit import LinearFit
from mxd_convert.training.stream import FORWARD_TOKENS, Activations

# of an expert's gate weight; nn.Linear's default has 0.58. At twice the norm more experts of a wide model stay alive, but wide
# and narrow models learn more slowly
GATE_NORM = 0.8
DUPLICATE_COSINE = 0.9  # cosine of two inputs minus the mean; above it they are near-duplicates
MAX_TOKENS_PER_EXPERT = 8  # per expert, that are read: some layers never see as many distinct inputs as they have experts
# tokens per comparison; a near-duplicate of any earlier one in it is skipped, even if that one was skipped itself
CHUNK_TOKENS = 64
MIN_TOKENS_PER_INPUT = 16  # per input dimension, that are read for the fit of the skip path
# of the shared expert's row, in standard deviations of what the skip path leaves of the output. Smaller constants give larger
# product shares, but the output then grows with the product of two large numbers at some tokens, and training becomes unstable
SHARED_DEVIATIONS = 2.0
CHUNK_ROWS = 4096  # experts whose rows are corrected at a time
FIT_EVERY = 8  # one in this many tokens is kept for the fit of the experts' scale


@torch.no_grad()
def init_from_tokens(layers: Mapping[int, Trainable], activations: Activations) -> None:
    """Initialise all layers with a trained gate or a skip path from the first blocks of the training text.

    If the tokens are too few or too similar for all experts, the remaining ones keep a random gate and a row of zeros. The result
    depends only on the seed, the text and the layer.
    """
    source = activations.source
    starts = {index: _TokenInit(layer) for index, layer in layers.items() if _learns_gate(layer) or layer.skip is not None}
    if not starts:
        return
    rows = block_order(len(source.blocks), 0, len(source.blocks), source.seed)
    random = np.random.default_rng([source.seed, 2])
    fit_tokens: dict[int, tuple[Tensor, Tensor]] = {}
    # must not depend on the number of processes or the batch size: it determines which tokens become experts
    at_once = max(1, FORWARD_TOKENS // source.blocks.context)
    for begin in range(0, len(rows), at_once):
        # a layer reads no further than it would alone
        unfinished = {index: start for index, start in starts.items() if not start.done}
        if not unfinished:
            break
        batch = activations.read(rows[begin : begin + at_once], unfinished)
        counted = batch.counted_B.nonzero().squeeze(1)
        order = counted[torch.from_numpy(random.permutation(len(counted))).to(counted.device)]
        kept, taken = order[: len(order) // FIT_EVERY], order[len(order) // FIT_EVERY :]
        for index, start in unfinished.items():
            x_BI, y_BO = batch.activations[index]
            start.take(x_BI[taken].float(), y_BO[taken].float())
            if index not in fit_tokens or len(kept) >= len(fit_tokens[index][0]):  # the last read of a short text is too small
                fit_tokens[index] = x_BI[kept].float(), y_BO[kept].float()
    for index, start in starts.items():
        start.finish(*fit_tokens[index])


def _learns_gate(layer: Trainable) -> bool:
    return bool(layer.n_experts and layer.gate.weight.requires_grad)


class _TokenInit:
    """The initialisation of one layer. Tokens are written directly into gate and experts, without another copy of that size."""

    def __init__(self, layer: Trainable) -> None:
        self.layer = layer
        self.wanted = layer.n_experts if _learns_gate(layer) else 0  # experts to initialise
        self.taken = self.seen = 0
        self.centre_I = torch.zeros(layer.d_in, device=layer.output_bias.device)  # mean of the first read
        self.input_sum_I = torch.zeros_like(self.centre_I, dtype=torch.float64)
        self.output_sum_O = torch.zeros_like(layer.output_bias, dtype=torch.float64)
        self.fit = None if layer.skip is None else LinearFit(layer.d_in, layer.d_out, layer.output_bias.device)

    @property
    def done(self) -> bool:
        """Return whether all experts are initialised or the limit of tokens is reached, and the skip path can be fitted."""
        if self.fit is not None and self.seen < MIN_TOKENS_PER_INPUT * self.layer.d_in:
            return False
        return self.taken == self.wanted or self.seen >= MAX_TOKENS_PER_EXPERT * self.wanted

    def take(self, x_BI: Tensor, y_BO: Tensor) -> None:
        """Initialise further experts from these tokens, skipping near-duplicates."""
        if not self.seen and len(x_BI):
            self.centre_I = x_BI.mean(0)
        self.seen += len(x_BI)
        self.input_sum_I += x_BI.double().sum(0)
        self.output_sum_O += y_BO.double().sum(0)
        if self.fit is not None:
            self.fit.add(x_BI, y_BO)
        for x, y in zip((x_BI - self.centre_I).split(CHUNK_TOKENS), y_BO.split(CHUNK_TOKENS), strict=True):
            if self.taken == self.wanted:
                break
            new = ~_near_duplicates(x, x).tril(-1).any(1) & ~_near_duplicates(x, self.layer.gate.weight[: self.taken]).any(1)
            chosen = new.nonzero().squeeze(1)[: self.wanted - self.taken]
            rows = slice(self.taken, self.taken + len(chosen))
            self.layer.gate.weight[rows] = x[chosen]
            self.layer.experts[rows] = y[chosen]
            self.taken += len(chosen)

    def finish(self, x_BI: Tensor, y_BO: Tensor) -> None:
        """Fit the skip path, then finish the experts. x, y: tokens that were kept to fit the experts' scale."""
        if not self.seen:
            return
        layer = self.layer
        mean_I, mean_O = ((total / self.seen).float() for total in (self.input_sum_I, self.output_sum_O))
        layer.output_bias.copy_(mean_O)
        if self.fit is not None and layer.skip is not None:
            skip_OI, bias_O = self.fit.solve()
            layer.skip.weight.copy_(skip_OI)
            layer.output_bias.copy_(bias_O)
        if self.taken:
            self._finish_experts(mean_I, mean_O, x_BI, y_BO)

    def _finish_experts(self, mean_I: Tensor, mean_O: Tensor, x_BI: Tensor, y_BO: Tensor) -> None:
        """Subtract means and skip path, set the gate's norms, fit the scale of the experts, and set the shared expert."""
        layer, rows = self.layer, slice(0, self.taken)
        weight_NI, experts_NO = layer.gate.weight[rows], layer.experts[rows]
        weight_NI -= mean_I - self.centre_I
        experts_NO -= mean_O
        if layer.skip is not None:
            for first in range(0, self.taken, CHUNK_ROWS):
                chunk = slice(first, first + CHUNK_ROWS)
                experts_NO[chunk] -= layer.skip(weight_NI[chunk])
        weight_NI *= GATE_NORM / torch.linalg.vector_norm(weight_NI, dim=-1, keepdim=True).clamp_min(1e-8)
        layer.gate.bias[rows] = -(weight_NI @ mean_I)
        if not len(x_BI):  # a very short text leaves none
            return
        gain_BO = layer.gain_of(layer.encode(x_BI)).double()
        left_BO = (y_BO - layer.output_bias).double()
        if (dense_BO := layer.dense_path(x_BI)) is not None:
            left_BO -= dense_BO
        scale = (gain_BO * left_BO).sum() / gain_BO.square().sum().clamp_min(1e-30)
        experts_NO *= scale.clamp_min(0).float()
        if layer.shared_expert is not None and len(x_BI) > 1:
            layer.shared_expert.copy_(SHARED_DEVIATIONS * left_BO.std(0))
            layer.output_bias.sub_(layer.shared_expert)  # u = 1


def _near_duplicates(x_BI: Tensor, others_NI: Tensor) -> Tensor:
    """Return which pairs of inputs (minus the mean) are near-duplicates, (B, N) bool. An input at the mean is like no other."""
    return x_BI @ others_NI.T > DUPLICATE_COSINE * x_BI.norm(dim=-1, keepdim=True) * others_NI.norm(dim=-1)

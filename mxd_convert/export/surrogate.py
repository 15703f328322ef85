"""Surrogates: layers as static transcoders, `y = W_dec^T a + b (+ W_skip x)`.

A surrogate has the layer's gate and one fixed row per expert, `c_n * E[u | n active]`. An MxD's output is
`sum_n a_n (c_n * u)`, where u depends on the input; the fixed row uses the mean of u over the tokens where the expert is
active. A transcoder has u = 1, so its surrogate is exact. What a shared expert adds at every token is replaced by its best linear fit,
which the skip path and the output bias take up; without a skip path, by its mean.
P: pairs of an expert and a token on which it is active.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mxd_convert.layers.linear_fit import LinearFit
from mxd_convert.modeling.layers_mxd import Coefficients, FactoredLayer, SkipTranscoder, Transcoder


class ConditionalMeans:
    """Streaming mean of u over the tokens where each expert is active, unweighted, with sums (N, O) in float64.

    Also the linear fit of what a shared expert adds.
    """

    def __init__(self, layer: FactoredLayer) -> None:
        self.layer = layer
        device = layer.output_bias.device
        self.sums_NO = torch.zeros(layer.n_experts, layer.d_out, dtype=torch.float64, device=device)
        self.counts_N = torch.zeros(layer.n_experts, dtype=torch.int64, device=device)
        self.all_O = torch.zeros(layer.d_out, dtype=torch.float64, device=device)
        self.tokens = 0
        self.fit = None if layer.shared_expert is None else LinearFit(layer.d_in, layer.d_out, device)

    @torch.no_grad()
    def add(self, x_BI: Tensor) -> None:
        """Add tokens. x_BI: the layer's inputs."""
        layer = self.layer
        linear_BO = layer.linear(x_BI)
        if self.fit is not None:
            self.fit.add(x_BI.float(), (layer.shared_expert * linear_BO).float())
        self.tokens += len(linear_BO)
        self.all_O += linear_BO.sum(0, dtype=torch.float64)
        tokens_P, experts_P = active_pairs(self.layer.encode(x_BI))
        if len(experts_P) == 0:
            return
        order_P = experts_P.argsort(stable=True)
        experts_U, counts_U = experts_P[order_P].unique_consecutive(return_counts=True)
        # one bag per expert: much faster than adding pairs one by one, without a (P, O) tensor
        sums_UO = F.embedding_bag(tokens_P[order_P], linear_BO, counts_U.cumsum(0) - counts_U, mode="sum")
        self.sums_NO.index_add_(0, experts_U, sums_UO.double())
        self.counts_N[experts_U] += counts_U

    @property
    def never(self) -> int:
        """Number of experts that were never active."""
        return int((self.counts_N == 0).sum())

    def dense(self) -> tuple[Tensor, Tensor] | None:
        """Return weight and bias of the linear fit of what a shared expert adds; None without one."""
        if self.fit is None:
            return None
        if self.layer.skip is None:
            return torch.zeros_like(self.fit.yx_OI), (self.fit.y_O / max(1, self.fit.tokens)).float()
        return self.fit.solve()

    @torch.no_grad()
    def decoder(self) -> Tensor:
        """Return `c_n * E[u | n active]`, (N, O), in the experts' dtype.

        Experts that were never active use the mean of u over all tokens. Call it once, at the end: it reuses the sums.
        """
        rows_NO = self.sums_NO.div_(self.counts_N.clamp_min(1).unsqueeze(-1))
        rows_NO[self.counts_N == 0] = self.all_O / max(self.tokens, 1)
        return rows_NO.mul_(self.layer.experts).to(self.layer.experts.dtype)


def active_pairs(coefficients: Coefficients) -> tuple[Tensor, Tensor]:
    """Return (tokens, experts), (P) each, of all active pairs. coefficients: as `encode` returns them for (B, I)."""
    if isinstance(coefficients, Tensor):
        tokens_P, experts_P = (coefficients > 0).nonzero(as_tuple=True)
        return tokens_P, experts_P
    values_BK, indices_BK = coefficients
    active_BK = values_BK > 0
    return active_BK.nonzero(as_tuple=True)[0], indices_BK[active_BK]


def is_exact(layer: FactoredLayer) -> bool:
    """Return whether the layer is a static transcoder, so that its surrogate is exact."""
    return not layer.is_product


def surrogate_of(layer: FactoredLayer, decoder_NO: Tensor, dense: tuple[Tensor, Tensor] | None = None) -> Transcoder:
    """Return a transcoder with the layer's gate, output bias and skip path, and these rows. It shares the layer's tensors.

    dense: weight (O, I) and bias (O) of a linear map that skip path and output bias take up; without a skip path, the bias alone.
    """
    surrogate = empty_surrogate(layer)
    tensors = {name: tensor for name, tensor in layer.state_dict().items() if name in surrogate.state_dict()}
    for name, added in zip(("skip.weight", "output_bias"), dense or (), strict=False):
        if name in tensors:
            tensors[name] = tensors[name] + added.to(tensors[name].dtype)
    surrogate.load_state_dict({**tensors, "experts": decoder_NO}, assign=True)
    return surrogate.eval().requires_grad_(False)


def empty_surrogate(layer: FactoredLayer) -> Transcoder:
    """Return a transcoder of the layer's shape on the meta device."""
    with torch.device("meta"):
        kind = Transcoder if layer.skip is None else SkipTranscoder
        return kind(layer.d_in, layer.d_out, layer.n_experts, layer.k, layer.sparsity)

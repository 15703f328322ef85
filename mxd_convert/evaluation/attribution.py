"""The shares of single experts in a layer's output.

Expert n adds `a_n (c_n * u)` to the product y. The covariance of that contribution with y, summed over outputs, is the expert's
share of y's variance; the shares of all experts sum to 1. Shape suffixes: B tokens, K active experts, N experts, O output width.
"""

import torch
from torch import Tensor

from mxd_convert.modeling.layers_mxd import Coefficients

CARRIED = (0.5, 0.9)  # shares of the variance
_ELEMENTS = 2**22  # of gathered rows at a time


class Attribution:
    """The experts' shares of the variance of y, streamed over tokens, and the effective number of experts per token."""

    def __init__(self, n_experts: int, device: torch.device) -> None:
        self.shares_N = torch.zeros(n_experts, dtype=torch.float64, device=device)
        self.effective = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, coefficients: Coefficients, experts_NO: Tensor, linear_BO: Tensor, centred_BO: Tensor) -> None:
        """Add a batch of tokens.

        Args:
            coefficients: of the layer.
            experts_NO: C.
            linear_BO: u.
            centred_BO: y minus about its mean, the same vector in every batch.
        """
        weights_BO, squares_BO = (linear_BO * centred_BO).to(experts_NO.dtype), linear_BO.square().to(experts_NO.dtype)
        if isinstance(coefficients, Tensor):
            covered_BN = coefficients * (weights_BO @ experts_NO.T)
            self.shares_N += covered_BN.sum(0, dtype=torch.float64)
            self._count(coefficients.square() * (squares_BO @ experts_NO.square().T))
            return
        values_BK, indices_BK = coefficients
        rows = max(1, _ELEMENTS // max(1, values_BK.shape[1] * experts_NO.shape[1]))
        for piece in torch.arange(len(values_BK), device=values_BK.device).split(rows):
            rows_PKO = experts_NO[indices_BK[piece]]
            covered_PK = values_BK[piece] * torch.einsum("pko,po->pk", rows_PKO, weights_BO[piece])
            self.shares_N.index_add_(0, indices_BK[piece].flatten(), covered_PK.flatten().double())
            self._count(values_BK[piece].square() * torch.einsum("pko,po->pk", rows_PKO.square(), squares_BO[piece]))

    def _count(self, squares_BK: Tensor) -> None:
        """Add the effective number of each token: (sum e)^2 / sum e^2 over the squared norms e of its contributions."""
        squares_BK = squares_BK.double()
        total_B = squares_BK.sum(-1)
        active_B = total_B > 0
        share_BK = squares_BK[active_B] / total_B[active_B].unsqueeze(-1)
        self.effective += (1 / share_BK.square().sum(-1)).sum()
        self.tokens += active_B.sum()

    def report(self) -> dict[str, float | int | None]:
        """Return the smallest numbers of experts that carry the CARRIED shares, and the effective number per token."""
        names = [f"experts_{round(100 * share)}" for share in CARRIED]
        total = self.shares_N.sum()
        found: dict[str, float | int | None] = {"effective_experts": None, **dict.fromkeys(names)}
        if self.tokens and self.effective.isfinite():
            found["effective_experts"] = (self.effective / self.tokens).item()
        if total.isfinite() and total > 0:
            carried_N = self.shares_N.sort(descending=True).values.cumsum(0) / total
            for name, share in zip(names, CARRIED, strict=True):
                found[name] = int((carried_N < share).sum()) + 1
        return found

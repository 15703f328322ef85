"""The shares of single experts in a layer's output.

Expert n adds `a_n (c_n * u)` to the product y. The covariance of that contribution with y, summed over outputs, is the expert's
share of y's variance. The shares of all experts sum to 1; a shared expert has no share.
Shape suffixes: B tokens, K active experts, N experts, O output width.
"""

import torch
from torch import Tensor

from mxd_convert.modeling.layers_mxd import Coefficients

CARRIED = (0.5, 0.9)  # shares of the variance
_ELEMENTS = 2**22  # of gathered rows at a time


class Attribution:
    """The experts' shares of the variance of y, streamed over tokens, and the effective number of experts per token.

    The mean of y is known at the end only. Sums are therefore about a fixed centre, and `report` moves them to the mean.
    """

    def __init__(self, n_experts: int, width: int, device: torch.device) -> None:
        self.products_N = torch.zeros(n_experts, dtype=torch.float64, device=device)  # of contributions and y minus the centre
        self.linear_NO = torch.zeros(n_experts, width, device=device)  # sums of a_n u
        self.effective = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, coefficients: Coefficients, experts_NO: Tensor, linear_BO: Tensor, centred_BO: Tensor) -> None:
        """Add a batch of tokens.

        Args:
            coefficients: of the layer, with its steering.
            experts_NO: C.
            linear_BO: u.
            centred_BO: y minus a vector, the same in every batch.
        """
        dtype = experts_NO.dtype
        linear_BO, weights_BO = linear_BO.to(dtype), (linear_BO * centred_BO).to(dtype)
        squares_BO = linear_BO.square()
        if isinstance(coefficients, Tensor):
            self.products_N += (coefficients * (weights_BO @ experts_NO.T)).sum(0, dtype=torch.float64)
            self.linear_NO += coefficients.T @ linear_BO
            self._count(coefficients.square() * (squares_BO @ experts_NO.square().T))
            return
        values_BK, indices_BK = coefficients
        rows = max(1, _ELEMENTS // max(1, values_BK.shape[1] * experts_NO.shape[1]))
        for piece in torch.arange(len(values_BK), device=values_BK.device).split(rows):
            values_PK, experts_P = values_BK[piece], indices_BK[piece].flatten()
            rows_PKO = experts_NO[indices_BK[piece]]
            product_PK = values_PK * torch.einsum("pko,po->pk", rows_PKO, weights_BO[piece])
            self.products_N.index_add_(0, experts_P, product_PK.flatten().double())
            scaled_PKO = values_PK.unsqueeze(-1) * linear_BO[piece].unsqueeze(1)
            self.linear_NO.index_add_(0, experts_P, scaled_PKO.flatten(0, 1).to(self.linear_NO.dtype))
            self._count(values_PK.square() * torch.einsum("pko,po->pk", rows_PKO.square(), squares_BO[piece]))

    def _count(self, squares_BK: Tensor) -> None:
        """Add the effective number of each token: (sum e)^2 / sum e^2 over the squared norms e of its contributions."""
        squares_BK = squares_BK.double()
        total_B = squares_BK.sum(-1)
        active_B = total_B > 0
        share_BK = squares_BK[active_B] / total_B[active_B].unsqueeze(-1)
        self.effective += (1 / share_BK.square().sum(-1)).sum()
        self.tokens += active_B.sum()

    def shares(self, experts_NO: Tensor, moved_O: Tensor) -> Tensor:
        """Return each expert's share of y's variance, (N). moved_O: the mean of y minus the centre."""
        covariance_N = self.products_N - (experts_NO * self.linear_NO) @ moved_O.to(experts_NO.dtype)
        return covariance_N / covariance_N.sum()

    def report(self, experts_NO: Tensor, moved_O: Tensor) -> dict[str, float | int | None]:
        """Return the smallest numbers of experts that carry the CARRIED shares, and the effective number per token."""
        names = [f"experts_{round(100 * share)}" for share in CARRIED]
        found: dict[str, float | int | None] = {"effective_experts": None, **dict.fromkeys(names)}
        if self.tokens and self.effective.isfinite():
            found["effective_experts"] = (self.effective / self.tokens).item()
        shares_N = self.shares(experts_NO, moved_O)
        if len(shares_N) and shares_N.isfinite().all():
            carried_N = shares_N.sort(descending=True).values.cumsum(0)
            for name, share in zip(names, CARRIED, strict=True):
                found[name] = int((carried_N < share).sum()) + 1
        return found

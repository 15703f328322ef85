"""`LinearFit`: a least-squares fit of outputs to inputs, streamed over tokens. Shape suffixes: B tokens, I input and O output width."""

import torch
from torch import Tensor

RIDGE = 1e-3  # of the inputs' mean variance, added to each variance


class LinearFit:
    """The fit `y = W x + b`, with a slight ridge penalty on W. Sums are float64, the products of a batch float32."""

    def __init__(self, d_in: int, d_out: int, device: torch.device) -> None:
        self.tokens = 0
        self.shift_I = torch.zeros(d_in, device=device)  # mean input of the first batch
        self.x_I = torch.zeros(d_in, dtype=torch.float64, device=device)
        self.y_O = torch.zeros(d_out, dtype=torch.float64, device=device)
        self.xx_II = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        self.yx_OI = torch.zeros(d_out, d_in, dtype=torch.float64, device=device)

    def add(self, x_BI: Tensor, y_BO: Tensor) -> None:
        """Add a batch of tokens, float32."""
        if not len(x_BI):
            return
        if not self.tokens:
            self.shift_I = x_BI.mean(0)
        x_BI = x_BI - self.shift_I
        self.tokens += len(x_BI)
        self.x_I += x_BI.sum(0, dtype=torch.float64)
        self.y_O += y_BO.sum(0, dtype=torch.float64)
        self.xx_II += x_BI.T @ x_BI
        self.yx_OI += y_BO.T @ x_BI

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return W, (O, I), and b, (O), in float32. With fewer than two tokens per input dimension, W is 0 and b the mean output."""
        tokens = max(1, self.tokens)
        x_I, y_O = self.x_I / tokens, self.y_O / tokens
        if self.tokens < 2 * len(x_I):  # W would fit noise
            return torch.zeros_like(self.yx_OI, dtype=torch.float32), y_O.float()
        covariance_II = self.xx_II / tokens - torch.outer(x_I, x_I)
        covariance_II.diagonal().add_(RIDGE * covariance_II.diagonal().mean().clamp_min(1e-30))
        weight_OI = torch.linalg.solve(covariance_II, (self.yx_OI / tokens - torch.outer(y_O, x_I)).T).T
        return weight_OI.float(), (y_O - weight_OI @ (x_I + self.shift_I)).float()

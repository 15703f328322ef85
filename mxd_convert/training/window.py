"""Training figures for the log: summed over the steps since the last log line."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mxd_convert.layers import Trainable
from mxd_convert.layers.losses import fraction_of_variance_unexplained

FLOAT32_TOKENS = 256  # tokens summed in float32 before they are added in float64


@dataclass
class Window:
    """Sums for one layer over the counted tokens since the last log line. Float64, so that the order of tokens hardly matters."""

    tokens: Tensor
    loss: Tensor  # sum over steps of loss x tokens
    squared_error: Tensor
    output_sum: Tensor  # (O)
    output_squares: Tensor
    active: Tensor  # pairs of token and active expert
    alive: Tensor  # (N) bool: experts active on any token

    @classmethod
    def empty(cls, layer: Trainable, device: torch.device) -> "Window":
        """Return a window with all sums at zero."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        alive = torch.zeros(layer.n_experts, dtype=torch.bool, device=device)
        return cls(zeros(), zeros(), zeros(), zeros(layer.d_out), zeros(), zeros(), alive)

    @torch.no_grad()
    def add(
        self, loss: Tensor, output_BO: Tensor, target_BO: Tensor, coefficients: tuple[Tensor, Tensor] | Tensor, counted_B: Tensor
    ) -> None:
        """Add one step.

        Args:
            loss: mean over the counted tokens, a scalar.
            output_BO: outputs of the layer.
            target_BO: outputs of the MLP.
            coefficients: coefficients (B, N), or values and expert indices (B, K) after top-k.
            counted_B: which tokens count, bool.
        """
        weight_B = counted_B.double()
        tokens = weight_B.sum()
        target_BO = target_BO.float()
        self.tokens += tokens
        self.loss += loss.double() * tokens
        self.squared_error += _squares(output_BO.float() - target_BO) @ weight_B
        for rows_BO, weights_B in zip(
            target_BO.split(FLOAT32_TOKENS), counted_B.to(target_BO.dtype).split(FLOAT32_TOKENS), strict=True
        ):
            self.output_sum += weights_B @ rows_BO
        self.output_squares += _squares(target_BO) @ weight_B
        if isinstance(coefficients, Tensor):
            firing_BN = (coefficients > 0) & counted_B.unsqueeze(-1)
            self.active += firing_BN.sum()
            self.alive |= firing_BN.any(0)
        else:
            firing_BK = (coefficients[0] > 0) & counted_B.unsqueeze(-1)
            self.active += firing_BK.sum()
            self.alive[coefficients[1][firing_BK]] = True

    def figures(self) -> dict[str, float]:
        """Return loss, fvu (fraction of variance unexplained), l0 (active experts per token) and dead_fraction (of experts)."""
        tokens = self.tokens.clamp_min(1)
        return {
            "loss": (self.loss / tokens).item(),
            "fvu": fraction_of_variance_unexplained(self.squared_error, self.output_squares, self.output_sum, tokens),
            "l0": (self.active / tokens).item(),
            "dead_fraction": 1.0 - self.alive.double().mean().item() if len(self.alive) else 0.0,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def clear(self) -> None:
        """Set all sums to zero, in place."""
        for tensor in self.tensors().values():
            tensor.zero_()


def _squares(rows_BO: Tensor) -> Tensor:
    """Return the sum of squares of each row, in float64, from one pass in float32."""
    return torch.linalg.vector_norm(rows_BO, dim=-1).double().square()

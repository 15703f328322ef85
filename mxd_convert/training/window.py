"""Figures of a stretch of training, for the log: summed as the steps go by, written out and cleared at a log step."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mxd_convert.layers import MxD


@dataclass
class Window:
    """Sums over the tokens that counted since the last log line, for one layer. Float64, so that their order hardly matters."""

    tokens: Tensor
    loss: Tensor  # sum over steps of the step's loss x its tokens
    squared_error: Tensor
    output_sum: Tensor  # (O)
    output_squares: Tensor
    active: Tensor  # pairs of token and active expert
    alive: Tensor  # (N) bool: experts active on any token

    @classmethod
    def empty(cls, layer: MxD, device: torch.device) -> "Window":
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        alive = torch.zeros(layer.n_experts, dtype=torch.bool, device=device)
        return cls(zeros(), zeros(), zeros(), zeros(layer.d_out), zeros(), zeros(), alive)

    @torch.no_grad()
    def add(
        self, loss: Tensor, output_BO: Tensor, target_BO: Tensor, codes: tuple[Tensor, Tensor] | Tensor, counted_B: Tensor
    ) -> None:
        weight_B1 = counted_B.to(torch.float32).unsqueeze(-1)
        tokens = weight_B1.sum(dtype=torch.float64)
        target_BO = target_BO.float()
        self.tokens += tokens
        self.loss += loss.double() * tokens
        self.squared_error += ((output_BO.float() - target_BO).square() * weight_B1).sum(dtype=torch.float64)
        self.output_sum += (target_BO * weight_B1).sum(0, dtype=torch.float64)
        self.output_squares += (target_BO.square() * weight_B1).sum(dtype=torch.float64)
        if isinstance(codes, Tensor):
            firing_BN = (codes > 0) & counted_B.unsqueeze(-1)
            self.active += firing_BN.sum()
            self.alive |= firing_BN.any(0)
        else:
            firing_BK = (codes[0] > 0) & counted_B.unsqueeze(-1)
            self.active += firing_BK.sum()
            self.alive[codes[1][firing_BK]] = True

    def figures(self) -> dict[str, float]:
        """loss, fvu (fraction of variance unexplained), l0 (active experts a token), dead_fraction (of the experts, on these tokens)."""
        tokens = self.tokens.clamp_min(1)
        variance = self.output_squares - self.output_sum.square().sum() / tokens
        return {
            "loss": (self.loss / tokens).item(),
            "fvu": (self.squared_error / variance.clamp_min(1e-30)).item(),
            "l0": (self.active / tokens).item(),
            "dead_fraction": 1.0 - self.alive.double().mean().item(),
        }

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def clear(self) -> None:
        for tensor in self.tensors().values():
            tensor.zero_()

"""The training losses. B tokens, O output width."""

import torch
from torch import Tensor


def normalised_mse(output_BO: Tensor, target_BO: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """The paper's loss, `mean((y_hat - y)^2 / ||y||_2)` (the norm, not its square), a scalar.

    weight_B: 1 for tokens that count, 0 for those that don't; the mean is over those that count. Computed in at least float32.
    """
    dtype = torch.promote_types(output_BO.dtype, torch.float32)
    output_BO, target_BO = output_BO.to(dtype), target_BO.to(dtype)
    norm_B = target_BO.norm(dim=-1).clamp_min(1e-8)  # an MLP may return exactly nothing for a token
    loss_B = (output_BO - target_BO).square().mean(-1) / norm_B
    if weight_B is None:
        return loss_B.mean()
    return (loss_B * weight_B).sum() / weight_B.sum().clamp_min(1)

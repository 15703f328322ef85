"""The training losses. B tokens, O output width."""

import torch
from torch import Tensor

NORM_FLOOR = 1e-3  # of the mean norm


def normalised_mse(output_BO: Tensor, target_BO: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """The paper's loss, `mean((y_hat - y)^2 / ||y||_2)` (the norm, not its square), a scalar.

    The norm is taken as at least a thousandth of the batch's mean norm. weight_B: 1 for tokens that count, 0 for those that
    don't; the mean is over those that count. Computed in at least float32.
    """
    dtype = torch.promote_types(output_BO.dtype, torch.float32)
    output_BO, target_BO = output_BO.to(dtype), target_BO.to(dtype)
    norm_B = target_BO.norm(dim=-1)
    # an MLP may return all but nothing for a token, whose error would then outweigh all others'
    norm_B = norm_B.maximum(NORM_FLOOR * norm_B.mean().clamp_min(1e-8)) if len(norm_B) else norm_B
    loss_B = (output_BO - target_BO).square().mean(-1) / norm_B
    if weight_B is None:
        return loss_B.mean()
    return (loss_B * weight_B).sum() / weight_B.sum().clamp_min(1)

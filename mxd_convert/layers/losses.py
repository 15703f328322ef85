"""The training losses. B tokens, O output width."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NORM_FLOOR = 1e-3  # of the mean norm


def normalised_mse(output_BO: Tensor, target_BO: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """The paper's loss, `mean((y_hat - y)^2 / ||y||_2)` (the norm, not its square), a scalar.

    The norm is taken as at least a thousandth of the batch's mean norm. weight_B: 1 for tokens that count, 0 for those that
    don't; both means are over those that count. Computed in at least float32.
    """
    dtype = torch.promote_types(output_BO.dtype, torch.float32)
    output_BO, target_BO = output_BO.to(dtype), target_BO.to(dtype)
    norm_B = target_BO.norm(dim=-1)
    weight_B = torch.ones_like(norm_B) if weight_B is None else weight_B.to(dtype)
    tokens = weight_B.sum().clamp_min(1)
    # an MLP may return all but nothing for a token, whose error would then outweigh all others'
    norm_B = norm_B.maximum(NORM_FLOOR * (norm_B @ weight_B / tokens).clamp_min(1e-8))
    share_B = weight_B / (norm_B * tokens * max(output_BO.shape[-1], 1))
    return _SquaredError.apply(output_BO, target_BO, share_B)  # type: ignore[no-untyped-call]


class _SquaredError(torch.autograd.Function):
    """`sum((output - target)^2 * weight)`; backward is one pass over memory where autograd would make four."""

    @staticmethod
    def forward(ctx: Any, output_BO: Tensor, target_BO: Tensor, weight_B: Tensor) -> Tensor:
        error_BO = output_BO - target_BO
        ctx.save_for_backward(error_BO, weight_B)
        return torch.linalg.vector_norm(error_BO, dim=-1).square() @ weight_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        error_BO, weight_B = ctx.saved_tensors
        return error_BO * (2 * grad * weight_B).unsqueeze(-1), None, None

"""The training loss. Shape suffixes: B tokens, O output width."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NORM_FLOOR = 1e-3  # lower limit of a target's norm, relative to the batch mean


def normalised_mse(output_BO: Tensor, target_BO: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """Return the paper's loss, `mean((y_hat - y)^2 / ||y||_2)`, a scalar. The divisor is the norm, not its square.

    Computed in float32 or higher precision. Each norm is clamped to at least `NORM_FLOOR` times the batch's mean norm.

    Args:
        output_BO: layer output.
        target_BO: output of the original MLP.
        weight_B: 1 for tokens that count, 0 for masked tokens. Both means are over tokens that count. None counts all tokens.
    """
    dtype = torch.promote_types(output_BO.dtype, torch.float32)
    output_BO, target_BO = output_BO.to(dtype), target_BO.to(dtype)
    norm_B = target_BO.norm(dim=-1)
    weight_B = torch.ones_like(norm_B) if weight_B is None else weight_B.to(dtype)
    tokens = weight_B.sum().clamp_min(1)
    # an MLP may return almost zero for a token, whose error would then dominate the loss
    norm_B = norm_B.maximum(NORM_FLOOR * (norm_B @ weight_B / tokens).clamp_min(1e-8))
    share_B = weight_B / (norm_B * tokens * max(output_BO.shape[-1], 1))
    return _SquaredError.apply(output_BO, target_BO, share_B)  # type: ignore[no-untyped-call]


class _SquaredError(torch.autograd.Function):
    """`sum((output - target)^2 * weight)`. Its backward takes one pass over memory; autograd would take four."""

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


def kl_terms(base_log_probs: Tensor, log_probs: Tensor) -> Tensor:
    """Return the terms of KL(base || other), in nats; their sum over the last dimension, the vocabulary, is the divergence."""
    return base_log_probs.exp() * (base_log_probs - log_probs)


def fraction_of_variance_unexplained(squared_error: Tensor, squares: Tensor, sums_O: Tensor, tokens: Tensor | int) -> float:
    """Return FVU: squared error divided by the variance of the targets, both summed over outputs.

    squares: the sum of the squared targets. sums_O: the sum of the targets.
    """
    variance = squares - sums_O.square().sum() / tokens
    return (squared_error / variance.clamp_min(1e-30)).item()

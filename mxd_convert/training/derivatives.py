"""Matching of derivatives: the change of a layer's output along a small step of its input, against the MLP's own change.

A layer may have the MLP's outputs and still compute them in another way (evaluation/jacobian.py measures it). The loss term sees one
token in `EVERY`, and a step towards the input of another token of its block. Which tokens and which partners these are doesn't depend
on the number of processes. Shape suffixes: B tokens of a batch, S tokens that take a step, I input width, O output width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mxd_convert.layers import normalised_mse

STEP = 0.1  # of the input's norm
EVERY = 4  # one in this many tokens takes a step


@dataclass(frozen=True)
class Moved:
    """Inputs after a step, (S, I), the MLP's change along it, (S, O), and the tokens' rows in the batch, (S). Float32."""

    rows_S: Tensor
    inputs_SI: Tensor
    change_SO: Tensor


@torch.no_grad()
def move(x_SI: Tensor, other_SI: Tensor, y_SO: Tensor, rows_S: Tensor, mlp: Callable[[Tensor], Tensor]) -> Moved:
    """Move inputs a step towards others.

    Args:
        x_SI: inputs, in the base's dtype.
        other_SI: inputs of other tokens.
        y_SO: the MLP's outputs for `x_SI`.
        rows_S: the tokens' rows in the batch.
        mlp: maps inputs to the MLP's outputs.
    """
    x, direction = x_SI.float(), other_SI.float() - x_SI.float()
    length = STEP * x.norm(dim=-1, keepdim=True) / direction.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    moved_SI = (x + length * direction).to(x_SI.dtype)  # rounded before both functions see it
    return Moved(rows_S, moved_SI.float(), mlp(moved_SI).float() - y_SO.float())


def derivative_loss(output_BO: Tensor, moved_SO: Tensor, moved: Moved, y_BO: Tensor, counted_B: Tensor) -> Tensor:
    """Return the mean squared error of the derivatives along the steps, relative to the norm of the MLP's output: a scalar.

    The steps have the length of the input times `STEP`, so that for an MLP which scales with its input the derivative along the input
    itself is the output. The term is then of the size of the layer's own loss. The sum over tokens is divided by the batch's counted
    tokens over `EVERY`, not by the number of steps, so that the losses of several processes add up.

    Args:
        output_BO: outputs of the layer for the batch.
        moved_SO: its outputs for the moved inputs.
        moved: the steps.
        y_BO: outputs of the MLP for the batch.
        counted_B: which tokens count, bool.
    """
    y_SO = y_BO[moved.rows_S]
    error_SO = (moved_SO - output_BO[moved.rows_S] - moved.change_SO) / STEP
    return normalised_mse(y_SO + error_SO, y_SO) * (EVERY * len(y_SO) / counted_B.sum().clamp_min(1))

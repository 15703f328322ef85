"""Forward and backward of one layer on one batch of activations. Shape suffixes: B tokens, I input width, O output width."""

import torch
from torch import Tensor

from mxd_convert.layers import Trainable, normalised_mse
from mxd_convert.training.balance import Balance
from mxd_convert.training.derivatives import Moved, derivative_loss
from mxd_convert.training.window import Window


def forward_backward(
    layer: Trainable,
    x_BI: Tensor,
    y_BO: Tensor,
    counted_B: Tensor,
    precision: str,
    l1: float,
    share: Tensor | None,
    window: Window,
    jacobian: float = 0.0,
    moved: Moved | None = None,
    balance: tuple[Balance, Tensor] | None = None,
) -> Tensor:
    """Run forward and backward of one layer on one batch, and add the step to its window.

    Args:
        layer: whose gradients are accumulated.
        x_BI: inputs of the MLP, float32.
        y_BO: outputs of the MLP, float32.
        counted_B: which tokens count, bool.
        precision: "bf16" for autocast.
        l1: weight of the L1 penalty, for layers without top-k.
        share: this process's share of the counted tokens, which weights the gradients; None for 1.
        window: receives the figures for the log.
        jacobian: weight of the matching of derivatives.
        moved: the steps along which derivatives are matched; None for no matching.
        balance: the balance term, and the tokens that it is about, (B) bool; None for none.

    Returns:
        The loss without further terms, a scalar.
    """
    tokens = len(x_BI)
    inputs = x_BI if moved is None else torch.cat([x_BI, moved.inputs_SI])  # one call for both, so that rows get one gradient
    with torch.autocast(x_BI.device.type, torch.bfloat16, enabled=precision == "bf16"):
        coefficients = layer.encode(inputs)
        gain, linear = layer.factors(inputs, coefficients)
        outputs = layer.join(inputs, gain, linear)
    output_BO = outputs if moved is None else outputs[:tokens]
    loss = objective = normalised_mse(output_BO, y_BO, counted_B)
    if isinstance(coefficients, Tensor):
        coefficients = coefficients[:tokens]
        objective = objective + l1 * layer.penalty(coefficients, counted_B)
    else:
        coefficients = coefficients[0][:tokens], coefficients[1][:tokens]
    if moved is not None:
        objective = objective + jacobian * derivative_loss(output_BO, outputs[tokens:], moved, y_BO, counted_B)
    objective = objective if share is None else objective * share
    if balance is not None and gain is not None and linear is not None:
        term, figures_B = balance
        measured = term.measure((gain[:tokens], linear[:tokens]), coefficients, output_BO, y_BO, loss, figures_B)
        term.add(measured)
        term.settle()
        objective = objective + term.of(measured)
    objective.backward()
    window.add(loss.detach(), output_BO.detach(), y_BO, coefficients, counted_B)
    return loss.detach()

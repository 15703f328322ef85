"""The balance term: it keeps both factors of a product at work while a layer is trained.

Let y = g * u be the product of gain and linear factor, and v = s u with s = sum_n a_n. The loss alone is as low, or lower, if g or u is
nearly constant. The balance term is the shortfall of gate, hidden, product and identity share (evaluation/moments.py) below `FLOORS`,
times the layer's loss.

Shares alone can be met by a gain that scales the whole output, by one number per token, if u takes the scale back. So the gain's
directions have a floor too: the participation ratio of its covariance, relative to that of the product (evaluation/layer_figures.py).

The term that is differentiated is linear in the moments of the tokens: its coefficients are the slopes of the shortfall at the moments
of the whole step. Its gradients therefore add up over processes and over the pieces of a step.
Shape suffixes: B tokens, O output width, M moments.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mxd_convert.layers import Trainable

# Above what a genuine Mixture of Decoders should have on held-out text: .5, .3, .1 and .5, and a quarter of the directions. The term
# competes with the loss, so figures may stay below their floors. Routing necessity follows gate and identity share.
FLOORS = {"gate": 0.75, "hidden": 0.35, "product": 0.13, "identity": 0.7, "directions": 0.4}
# A factor whose variance is below this share of its mean square counts as constant. The slopes would be too steep at the first steps,
# in which the linear factor has hardly begun to vary.
CONSTANT = 1e-3
# Over this distance below its floor, a figure's slope grows from 0 to 1. With a kink at the floor, where figures settle, the term is
# switched on and off from step to step, and rounding decides when.
RAMP = 0.05
MOMENTS = 13  # means of g, u, y, v, gg, uu, yy, vv, gu, gy, uy, uv, vy, with each feature minus its shift


@dataclass(frozen=True)
class Measured:
    """The moments of some tokens of a step, their gains minus the shift, and their weights in a mean over these tokens."""

    moments_MO: Tensor
    gain_BO: Tensor
    weight_B1: Tensor


class Balance:
    """The balance term of one layer in one stage.

    Args:
        d_out: output width of the layer.
        weight: weight of the term.
        total: sums a tensor over the processes that share a batch.
        device: device of the layer.
    """

    def __init__(self, d_out: int, weight: float, total: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self.weight, self.total = weight, total
        self.shift_4O = torch.zeros(4, d_out, device=device)  # means of g, u, y and v in the first step: moments are about them
        # slopes of the shortfall, by the moments and by the means of g_o g_p
        self.slopes_MO, self.slopes_OO = torch.zeros(MOMENTS, d_out, device=device), torch.zeros(d_out, d_out, device=device)
        self.loss = torch.zeros((), device=device)  # of the layer in the step of the slopes
        self._is_first = True
        self._sums_MO, self._pairs_2OO = torch.zeros_like(self.slopes_MO), torch.zeros(2, d_out, d_out, device=device)
        self._loss, self._counted = torch.zeros_like(self.loss), torch.zeros_like(self.loss)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a saved state has to contain."""
        return {"shift": self.shift_4O, "slopes": self.slopes_MO, "pair_slopes": self.slopes_OO, "loss": self.loss}

    def measure(self, gain_BO: Tensor, linear_BO: Tensor, strength_B: Tensor, loss: Tensor, counted_B: Tensor) -> Measured:
        """Return the moments of some tokens of a step, and add these tokens to the step.

        strength: the sum of the coefficients. loss: of the layer on these tokens.
        """
        gain_BO, linear_BO = gain_BO.float(), linear_BO.float()
        features = gain_BO, linear_BO, gain_BO * linear_BO, strength_B.float().unsqueeze(-1) * linear_BO
        g, u, y, v = (feature - mean for feature, mean in zip(features, self.shift_4O, strict=True))
        counted = counted_B.sum()
        share_B1 = (counted_B / counted.clamp_min(1)).unsqueeze(-1)
        wg, wu, wy, wv = (feature * share_B1 for feature in (g, u, y, v))
        squares = wg * g, wu * u, wy * y, wv * v
        moments_MO = torch.stack([term.sum(0) for term in (wg, wu, wy, wv, *squares, wg * u, wg * y, wu * y, wu * v, wv * y)])
        self._sums_MO += moments_MO.detach() * counted
        with torch.no_grad():
            self._pairs_2OO += torch.stack([wg.T @ g, wy.T @ y]) * counted
        self._loss += loss.detach() * counted
        self._counted += counted
        return Measured(moments_MO, g, share_B1)

    def settle(self) -> None:
        """Compute the slopes at the moments of the step, and begin the next step."""
        counted = self.total(self._counted).clamp_min(1)
        moments_MO, pairs_2OO = self.total(self._sums_MO) / counted, self.total(self._pairs_2OO) / counted
        self.loss = self.total(self._loss) / counted
        if self._is_first and not self.shift_4O.any():
            # moments about zero: float32 is too coarse for the variance of a large mean
            self.shift_4O = moments_MO[:4].clone()
        else:
            self.slopes_MO, self.slopes_OO = _slopes(moments_MO, pairs_2OO, self.shift_4O)
            self._is_first = False
        for sums in (self._sums_MO, self._pairs_2OO, self._loss, self._counted):
            sums.zero_()

    def term(self, of: Measured) -> Tensor:
        """Return the balance term for tokens from `measure`, with the slopes of the last `settle`: a scalar."""
        pairs = (of.gain_BO @ self.slopes_OO * (of.gain_BO * of.weight_B1)).sum()
        return self.weight * self.loss * ((self.slopes_MO * of.moments_MO).sum() + pairs)


def balances_of(
    layers: Mapping[int, Trainable], weight: float, total: Callable[[Tensor], Tensor], device: torch.device
) -> dict[int, Balance]:
    """Return the balance terms of the layers with a product, by index; none for a weight of 0. The arguments are those of Balance."""
    return {index: Balance(layer.d_out, weight, total, device) for index, layer in layers.items() if layer.is_product and weight}


def tensors_of(balances: Mapping[int, Balance]) -> dict[str, Tensor]:
    """Return what a saved state has to contain of these balance terms, by name."""
    return {
        f"{index}/balance/{name}": tensor for index, balance in balances.items() for name, tensor in balance.tensors().items()
    }


def shortfall(moments_MO: Tensor, pairs_2OO: Tensor, shift_4O: Tensor) -> Tensor:
    """Return by how much the shares and the gain's directions are below `FLOORS`, summed: a scalar. Small distances count less.

    moments: see `MOMENTS`. pairs: the means of g_o g_p and of y_o y_p, with each feature minus its shift.
    """
    g, u, y, v = moments_MO[:4]
    products = torch.stack([g * g, u * u, y * y, v * v, g * u, g * y, u * y, u * v, v * y])
    gg, uu, yy, vv, gu, gy, uy, uv, vy = moments_MO[4:] - products
    whole = yy.sum().clamp_min(1e-30)
    of_u = (uu + (u + shift_4O[1]).square()).detach()  # the mean square of u weighs the gain of each output
    gg, uu, vv = (
        variance + CONSTANT * (variance + (mean + shift).square()) + 1e-30
        for variance, mean, shift in ((gg, g, shift_4O[0]), (uu, u, shift_4O[1]), (vv, v, shift_4O[3]))
    )
    explained = {
        "gate": uy.square() / uu,
        "hidden": gy.square() / gg,
        "product": _by_both(gg, uu, gu, gy, uy),
        "identity": _by_both(vv, uu, uv, vy, uy),
    }
    short = [FLOORS[name] - 1 + part_O.sum() / whole for name, part_O in explained.items()]
    weight_O = of_u.sqrt()
    directions = _directions((pairs_2OO[0] - torch.outer(g, g)) * torch.outer(weight_O, weight_O))
    short.append(FLOORS["directions"] - directions / _directions((pairs_2OO[1] - torch.outer(y, y)).detach()))
    below = F.relu(torch.stack(short))
    return torch.where(below < RAMP, below.square() / (2 * RAMP), below - RAMP / 2).sum()


def _directions(covariance_OO: Tensor) -> Tensor:
    """Return the participation ratio tr(S)^2 / tr(S^2) of a covariance: the number of directions in which it varies."""
    scaled = covariance_OO / covariance_OO.diagonal().sum().clamp_min(1e-30)
    return 1 / scaled.square().sum().clamp_min(1e-30)


def _by_both(aa: Tensor, bb: Tensor, ab: Tensor, ay: Tensor, by: Tensor) -> Tensor:
    """Return the variance of y that a regression on a and b explains, (O), from their covariances."""
    return (ay.square() * bb - 2 * ay * by * ab + by.square() * aa) / (aa * bb - ab.square()).clamp_min(CONSTANT * aa * bb)


def _slopes(moments_MO: Tensor, pairs_2OO: Tensor, shift_4O: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slopes of the shortfall by the moments, and by the means of g_o g_p."""
    with torch.enable_grad():
        moments_MO, gain_OO = moments_MO.detach().requires_grad_(), pairs_2OO[0].detach().requires_grad_()
        pairs_2OO = torch.stack([gain_OO, pairs_2OO[1].detach()])
        slopes_MO, slopes_OO = torch.autograd.grad(shortfall(moments_MO, pairs_2OO, shift_4O), (moments_MO, gain_OO))
    return slopes_MO, slopes_OO

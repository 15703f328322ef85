"""The balance term: it keeps both factors of a product at work while a layer is trained.

Let y = g * u be the product of gain and linear factor, and v = s u with s = sum_n a_n. The loss alone is as low, or lower, if g or u is
nearly constant. The balance term is the shortfall of gate, hidden, product and identity share (evaluation/moments.py) below `FLOORS`,
times the layer's loss.

Shares alone can be met by a gain that scales the whole output, by one number per token, if u takes the scale back. So the gain's
directions have a floor too: the participation ratio of its covariance, relative to that of the product (evaluation/layer_figures.py).

The term that is differentiated is linear in the moments of the tokens: its coefficients are the slopes of the shortfall at the moments
of the whole step. Its gradients therefore add up over processes and over the pieces of a step. Slopes at another step's moments would
not do: the term would then gain without limit from a token with a huge product, which in its own step's variance counts against it.
Shape suffixes: B tokens, O output width, M moments.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mxd_convert.layers import Trainable
from mxd_convert.modeling.layers_mxd import Coefficients

# Above what a genuine Mixture of Decoders should have on held-out text: .5, .3, .1 and .5, and a quarter of the directions. The term
# competes with the loss, so figures may stay below their floors.
FLOORS = {"gate": 0.55, "hidden": 0.35, "product": 0.18, "identity": 0.5, "directions": 0.4}
# Floors of gate and identity share where the layer's FVU is 0. They fall by as much as FVU rises, down to `FLOORS`. The MLP of a layer
# with a low FVU is nearly linear, or a few large directions: its dense parts would do, and which experts fire would matter little.
EASY = {"gate": 0.9, "identity": 0.85}
# A factor whose variance is below this share of its mean square counts as constant. The slopes would be too steep at the first steps,
# in which the linear factor has hardly begun to vary.
CONSTANT = 1e-3
# Over this distance below its floor, a figure's slope grows from 0 to 1. With a kink at the floor, where figures settle, the term is
# switched on and off from step to step, and rounding decides when.
RAMP = 0.05
MOMENTS = 13  # means of g, u, y, v, gg, uu, yy, vv, gu, gy, uy, uv, vy, with each feature minus its shift


@dataclass(frozen=True)
class Measured:
    """Some tokens of a step.

    moments: see `MOMENTS`. gain: their gains minus the shift, 0 for tokens that don't count. pairs: the means of g_o g_p and of y_o y_p.
    fit: the mean target minus its shift, then the mean squared norm of such targets, and the mean squared error. loss: the layer's loss
    on them. counted: the number of those that count. Only moments and gain have a gradient.
    """

    moments_MO: Tensor
    gain_BO: Tensor
    pairs_2OO: Tensor
    fit: Tensor
    loss: Tensor
    counted: Tensor


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
        # means of g, u, y, v and the target in the step before: moments are about them
        self.shift_5O = torch.zeros(5, d_out, device=device)
        # slopes of the shortfall, by the moments and by the means of g_o g_p
        self.slopes_MO = torch.zeros(MOMENTS, d_out, device=device, dtype=torch.float64)
        self.slopes_OO = torch.zeros(d_out, d_out, device=device)
        # of the layer in the step, and the number of the step's tokens
        self.loss, self.tokens = torch.zeros((), device=device), torch.ones((), device=device)
        # sums over the tokens of the step
        self._moments_MO, self._pairs_2OO = torch.zeros_like(self.slopes_MO), torch.zeros(2, d_out, d_out, device=device)
        self._fit = torch.zeros(d_out + 2, device=device, dtype=torch.float64)
        self._loss, self._counted = torch.zeros_like(self.loss), torch.zeros_like(self.loss)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a saved state has to contain."""
        return {"shift": self.shift_5O}

    def measure(
        self,
        factors: tuple[Tensor, Tensor],
        coefficients: Coefficients,
        output_BO: Tensor,
        target_BO: Tensor,
        loss: Tensor,
        counted_B: Tensor,
    ) -> Measured:
        """Return the moments of some tokens of a step.

        Args:
            factors: gain and linear factor.
            coefficients: of the experts.
            output_BO: the layer's output.
            target_BO: the MLP's output.
            loss: the layer's loss on these tokens.
            counted_B: which of them are in figures of layers. An attention sink is not.
        """
        gain_BO, linear_BO = factors
        strength_B = (coefficients if isinstance(coefficients, Tensor) else coefficients[0]).sum(-1)
        gain_BO, linear_BO = gain_BO.float(), linear_BO.float()
        features = gain_BO, linear_BO, gain_BO * linear_BO, strength_B.float().unsqueeze(-1) * linear_BO
        g, u, y, v = (feature - mean for feature, mean in zip(features, self.shift_5O[:4], strict=True))
        counted_B1, counted = counted_B.unsqueeze(-1), counted_B.sum()
        g, u, y, v = (feature * counted_B1 for feature in (g, u, y, v))
        some = counted.clamp_min(1)
        terms = g, u, y, v, g * g, u * u, y * y, v * v, g * u, g * y, u * y, u * v, v * y
        # in double precision, so that processes and pieces find the slopes of the whole: small differences grow in training
        moments_MO = torch.stack([term.sum(0, dtype=torch.float64) for term in terms]) / some
        with torch.no_grad():
            pairs_2OO = torch.stack([g.T @ g, y.T @ y]) / some
            error_BO = (output_BO.float() - target_BO.float()) * counted_B1
            target_BO = (target_BO.float() - self.shift_5O[4]) * counted_B1
            norms = (rows_BO.square().sum(dtype=torch.float64).view(1) for rows_BO in (target_BO, error_BO))
            fit = torch.cat([target_BO.sum(0, dtype=torch.float64), *norms]) / some
        return Measured(moments_MO, g, pairs_2OO, fit, loss.detach(), counted)

    def add(self, of: Measured) -> None:
        """Add tokens to the step."""
        self._moments_MO += of.moments_MO.detach() * of.counted
        self._pairs_2OO += of.pairs_2OO * of.counted
        self._fit += of.fit * of.counted
        self._loss += of.loss * of.counted
        self._counted += of.counted

    def settle(self) -> None:
        """Compute the slopes at the moments of the step, and begin the next step."""
        self.tokens = self.total(self._counted).clamp_min(1)
        moments_MO, pairs_2OO = self.total(self._moments_MO) / self.tokens, self.total(self._pairs_2OO) / self.tokens
        fit, self.loss = self.total(self._fit) / self.tokens, self.total(self._loss) / self.tokens
        if self.shift_5O.any():  # the first step's moments are about zero: float32 is too coarse for the variance of a large mean
            fvu = fit[-1] / (fit[-2] - fit[:-2].square().sum()).clamp_min(1e-30)
            self.slopes_MO, self.slopes_OO = _slopes(moments_MO, pairs_2OO, self.shift_5O[:4], fvu)
        self.shift_5O = self.shift_5O + torch.cat([moments_MO[:4], fit[None, :-2]]).float()
        for sums in (self._moments_MO, self._pairs_2OO, self._fit, self._loss, self._counted):
            sums.zero_()

    def of(self, some: Measured) -> Tensor:
        """Return what tokens of the step that `settle` ended contribute to the step's balance term: a scalar."""
        pairs = (some.gain_BO @ self.slopes_OO * some.gain_BO).sum() / self.tokens
        share = some.counted / self.tokens
        return self.weight * self.loss * (share * (self.slopes_MO * some.moments_MO).sum().float() + pairs)


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


def shortfall(moments_MO: Tensor, pairs_2OO: Tensor, shift_4O: Tensor, fvu: Tensor) -> Tensor:
    """Return by how much the shares and the gain's directions are below their floors, summed: a scalar. Small distances count less.

    moments: see `MOMENTS`. pairs: the means of g_o g_p and of y_o y_p, with each feature minus its shift. fvu: of the layer.
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
    floors = {name: (EASY[name] - fvu).clamp_min(floor) if name in EASY else floor for name, floor in FLOORS.items()}
    short = [floors[name] - 1 + part_O.sum() / whole for name, part_O in explained.items()]
    weight_O = of_u.sqrt()
    directions = _directions((pairs_2OO[0] - torch.outer(g, g)) * torch.outer(weight_O, weight_O))
    short.append(floors["directions"] - directions / _directions((pairs_2OO[1] - torch.outer(y, y)).detach()))
    below = F.relu(torch.stack(short))
    return torch.where(below < RAMP, below.square() / (2 * RAMP), below - RAMP / 2).sum()


def _directions(covariance_OO: Tensor) -> Tensor:
    """Return the participation ratio tr(S)^2 / tr(S^2) of a covariance: the number of directions in which it varies."""
    scaled = covariance_OO / covariance_OO.diagonal().sum().clamp_min(1e-30)
    return 1 / scaled.square().sum().clamp_min(1e-30)


def _by_both(aa: Tensor, bb: Tensor, ab: Tensor, ay: Tensor, by: Tensor) -> Tensor:
    """Return the variance of y that a regression on a and b explains, (O), from their covariances."""
    return (ay.square() * bb - 2 * ay * by * ab + by.square() * aa) / (aa * bb - ab.square()).clamp_min(CONSTANT * aa * bb)


def _slopes(moments_MO: Tensor, pairs_2OO: Tensor, shift_4O: Tensor, fvu: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slopes of the shortfall by the moments, and by the means of g_o g_p."""
    with torch.enable_grad():
        moments_MO, gain_OO = moments_MO.detach().requires_grad_(), pairs_2OO[0].detach().requires_grad_()
        pairs_2OO = torch.stack([gain_OO, pairs_2OO[1].detach()])
        slopes_MO, slopes_OO = torch.autograd.grad(shortfall(moments_MO, pairs_2OO, shift_4O, fvu), (moments_MO, gain_OO))
    return slopes_MO, slopes_OO

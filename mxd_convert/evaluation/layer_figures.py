"""Figures of one layer on the base model's activations: FVU, L0, dead experts, shares of variance, dimensions of the gain.

Let g = C^T a, u = D^T z, y = g * u and s = sum_n a_n. All sums are float64 and streamed over the evaluation's tokens.
Shape suffixes: B tokens, I input width, O output width, N experts, P pairs of tokens.
"""

from typing import Any

import torch
from torch import Tensor

from mxd_convert.layers.losses import fraction_of_variance_unexplained
from mxd_convert.modeling.layers_mxd import FactoredLayer

ALWAYS_ON = 0.5  # firing rate above which an expert is always on
MAX_PAIRS = 1024  # pairs of tokens per batch from which dimensions are estimated


class Variance:
    """The fraction of variance unexplained (FVU), streamed over batches."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = 0
        self.error = torch.zeros((), dtype=torch.float64, device=device)
        self.squares = torch.zeros((), dtype=torch.float64, device=device)
        self.sums_O = torch.zeros(width, dtype=torch.float64, device=device)

    def add(self, output_BO: Tensor, target_BO: Tensor) -> None:
        """Add a batch of outputs and their targets."""
        self.tokens += len(target_BO)
        self.error += (output_BO - target_BO).square().sum()
        self.squares += target_BO.square().sum()
        self.sums_O += target_BO.sum(0)

    def fvu(self) -> float:
        """Return the squared error divided by the variance of the targets, both summed over outputs."""
        return fraction_of_variance_unexplained(self.error, self.squares, self.sums_O, max(self.tokens, 1))

    def mean_O(self) -> Tensor:
        """Return the mean target."""
        return self.sums_O / max(self.tokens, 1)


class Dimensions:
    """The number of directions in which rows vary: the participation ratio tr(S)^2 / tr(S^2) of their covariance S, streamed.

    It is r for rows that vary equally in r directions. S, (O, O), is never formed. The difference d of two independent rows,
    divided by sqrt(2), has mean 0 and covariance S. So |d|^2 has mean tr(S), and the squared inner product of two such
    differences tr(S^2).
    """

    def __init__(self, device: torch.device) -> None:
        self.squares, self.pairs = torch.zeros((), dtype=torch.float64, device=device), 0
        self.crossed, self.crossings = torch.zeros((), dtype=torch.float64, device=device), 0

    def add(self, rows_BO: Tensor) -> None:
        """Add a batch of rows from several texts. Each pair takes one row from the first half and one from the second."""
        pairs = min(len(rows_BO) // 2, MAX_PAIRS)
        half = len(rows_BO) // 2
        difference_PO = (rows_BO[:pairs] - rows_BO[half : half + pairs]).double() / 2**0.5
        inner_PP = difference_PO @ difference_PO.T
        self.squares += inner_PP.diagonal().sum()
        self.pairs += pairs
        self.crossed += inner_PP.square().sum() - inner_PP.diagonal().square().sum()
        self.crossings += pairs * (pairs - 1)

    def value(self) -> float:
        """Return the participation ratio, or 0 if nothing varies."""
        if self.crossed <= 0:
            return 0.0
        return ((self.squares / self.pairs).square() / (self.crossed / self.crossings)).item()


class LayerFigures:
    """The figures of one layer, streamed: `add` the base's activations, then call `report` and `shares`."""

    def __init__(self, layer: FactoredLayer) -> None:
        self.layer = layer
        device = layer.output_bias.device
        self.masked, self.all = Variance(layer.d_out, device), Variance(layer.d_out, device)
        self.local, self.teacher = Variance(layer.d_out, device), Variance(layer.d_out, device)
        self.active = torch.zeros((), dtype=torch.float64, device=device)
        self.firings_N = torch.zeros(layer.n_experts, dtype=torch.int64, device=device)
        self.gain_dimensions, self.target_dimensions = Dimensions(device), Dimensions(device)
        # per output: first and second moments over tokens of u, v = s u, y, and t, the whole output with its skip path
        names = ("u", "v", "y", "uu", "uv", "vv", "uy", "vy", "yy", "t", "tt")
        self.moments = {name: torch.zeros(layer.d_out, dtype=torch.float64, device=device) for name in names}

    @torch.no_grad()
    def add(self, x_BI: Tensor, y_BO: Tensor, counted_B: Tensor) -> None:
        """Add the base's activations: the MLP's inputs and outputs, and which tokens count."""
        layer = self.layer
        coefficients = layer.encode(x_BI)
        values = coefficients if isinstance(coefficients, Tensor) else coefficients[0]
        gain_BO, linear_BO = layer.gain_of(coefficients).double(), layer.linear(x_BI).double()
        product_BO = gain_BO * linear_BO
        output_BO = product_BO + layer.output_bias.double()
        if layer.skip is not None:
            output_BO = output_BO + layer.skip(x_BI).double()
        y_BO = y_BO.double()
        self.all.add(output_BO, y_BO)
        self.masked.add(output_BO[counted_B], y_BO[counted_B])
        firing = (values > 0) & counted_B.unsqueeze(-1)
        self.active += firing.sum()
        if isinstance(coefficients, Tensor):
            self.firings_N += firing.sum(0)
        else:
            self.firings_N += torch.bincount(coefficients[1][firing], minlength=layer.n_experts)
        strength_B1 = values.double().sum(-1, keepdim=True)
        u, y = linear_BO[counted_B], product_BO[counted_B]
        v = strength_B1[counted_B] * u
        if layer.n_experts:
            # each output's gain is weighted by its effect on that output
            self.gain_dimensions.add(gain_BO[counted_B] * u.square().mean(0).sqrt())
        self.target_dimensions.add(y_BO[counted_B])
        whole = y if layer.skip is None else output_BO[counted_B]
        features = {"u": u, "v": v, "y": y, "t": whole}
        for name in self.moments:
            product = features[name[0]] * features[name[1]] if len(name) == 2 else features[name]
            self.moments[name] += product.sum(0)

    def add_in_place(self, output_BO: Tensor, local_BO: Tensor, teacher_BO: Tensor) -> None:
        """Add the layer's outputs in the converted model.

        Args:
            output_BO: the layer's outputs.
            local_BO: the original MLP's outputs on the same inputs.
            teacher_BO: the MLP's outputs in the base model.
        """
        self.local.add(output_BO.double(), local_BO.double())
        self.teacher.add(output_BO.double(), teacher_BO.double())

    def report(self) -> dict[str, float | None]:
        """Return the layer's entry of `fidelity.layers` in the report: FVUs, L0, dead share, and number of always-on experts.

        The latter three are None for a layer without experts.
        """
        experts, tokens = self.layer.n_experts > 0, max(self.masked.tokens, 1)
        return {
            "fvu": self.masked.fvu(),
            "fvu_with_bos": self.all.fvu(),
            "fvu_in_place_local": self.local.fvu(),
            "fvu_in_place_teacher": self.teacher.fvu(),
            "l0": (self.active / tokens).item() if experts else None,
            "dead_fraction": (self.firings_N == 0).double().mean().item() if experts else None,
            "always_on": int((self.firings_N > ALWAYS_ON * tokens).sum()) if experts else None,
        }

    def shares(self) -> dict[str, float | None]:
        """Return gate_share, identity_share, gain_dimensions and output_dimensions; all None for a layer without experts.

        gate_share is the variance of y that the best constant gain doesn't explain, as a share of the output's variance, skip
        path included. identity_share is the same for the best gain linear in s. Near 0, a gate share shows that the experts do
        nothing. An identity share near 0 shows that only the sum of coefficients matters, not which experts fire. A plain
        transcoder has u = 1, so its gate share is 1 by definition; its identity share can be lower.

        gain_dimensions is the number of directions in which the gain varies, each g_o weighted by the root mean square of u_o.
        output_dimensions is the same for the MLP's output, to compare with. A gain of one direction can have high shares: the
        experts may flip a sign that the linear factor flips back.
        """
        if self.layer.n_experts == 0:
            return dict.fromkeys(("gate_share", "identity_share", "gain_dimensions", "output_dimensions"))
        dimensions = {"gain_dimensions": self.gain_dimensions.value(), "output_dimensions": self.target_dimensions.value()}
        return {**shares(self.moments, self.masked.tokens), **dimensions}


def shares(moments: dict[str, Tensor], tokens: int) -> dict[str, float | None]:
    """Return gate_share and identity_share from the sums of `LayerFigures.moments`, each (O), over `tokens` tokens."""
    mean = {name: value / max(tokens, 1) for name, value in moments.items()}

    def covariance(a: str, b: str) -> Tensor:
        return mean["".join(sorted(a + b))] - mean[a] * mean[b]

    whole = covariance("t", "t").clamp_min(0).sum()
    total_O = covariance("y", "y").clamp_min(0)
    if whole <= 0:
        return {"gate_share": 0.0, "identity_share": 0.0}
    constant_O = _explained_variance([covariance("u", "u")], [covariance("u", "y")])
    features = [covariance("u", "u"), covariance("u", "v"), covariance("v", "v")]
    linear_O = _explained_variance(features, [covariance("u", "y"), covariance("v", "y")])
    # rounding can lift an explained share above 1, or put the fit with two features below that with one
    gate = ((total_O - constant_O).sum() / whole).clamp(0.0, 1.0).item()
    identity = ((total_O - linear_O).sum() / whole).clamp(0.0, gate).item()
    return {"gate_share": gate, "identity_share": identity}


def _explained_variance(features: list[Tensor], target: list[Tensor]) -> Tensor:
    """Return the variance that least squares with an intercept explains, for each output, (O).

    Args:
        features: the upper triangle of the features' covariance, row by row, each (O).
        target: the covariance of each feature with the target, each (O).
    """
    size = len(target)
    matrix: Any = torch.zeros(*target[0].shape, size, size, dtype=torch.float64, device=target[0].device)
    pairs = [(i, j) for i in range(size) for j in range(i, size)]
    for (i, j), value in zip(pairs, features, strict=True):
        matrix[..., i, j] = matrix[..., j, i] = value
    vector = torch.stack(target, -1)
    scale = matrix.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).rsqrt()
    # with a unit diagonal, the pseudo-inverse's cut-off doesn't depend on the units of u and s
    scaled = torch.linalg.pinv(scale.unsqueeze(-1) * matrix * scale.unsqueeze(-2), hermitian=True, rtol=1e-10)
    vector = vector * scale
    return (vector.unsqueeze(-2) @ scaled @ vector.unsqueeze(-1)).squeeze(-1).squeeze(-1)

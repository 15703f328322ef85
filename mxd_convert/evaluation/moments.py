"""Covariances of a layer's factors and output, streamed over tokens, and the shares of variance that follow from them.

Per output dimension, summed over dimensions: let g be the gain, C^T a and a shared expert's row, u = D^T z the linear factor,
y = g * u the product and s = sum_n a_n. The dense path is the skip path, or `D^T z` where it is added (then u = 1). Let w be its output
and t = y + w. A share is the variance that least squares with an intercept leaves:

- gate share: of y, on u. Near 0, the layer is dense, with a constant gain.
- hidden share: of y, on g. Near 0, the layer is a transcoder.
- product share: of y, on g and u. It is what only the product gives.
- identity share: of y, on u and s u. Near 0, only the sum of coefficients matters, not which experts fire.
- expert share: of t, on u and w, the dense parts.

None depends on how C and D split the scale. Shape suffixes: B tokens, O output width.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

CONSTANT = 1e-12  # share of an output's mean square; a smaller variance is rounding
FEATURES = {
    "gate_share": ("u",),
    "hidden_share": ("g",),
    "product_share": ("g", "u"),
    "identity_share": ("u", "v"),
    "expert_share": ("u", "w"),
}
_PAIRS = ("gg", "gu", "gy", "uu", "uv", "uy", "vv", "vy", "yy")
_PAIRS_WITH_DENSE = (*_PAIRS, "tt", "tu", "tw", "uw", "ww")


class Moments:
    """First and second moments of features with one value per token and output, (B, O), in float64.

    Features are named by a letter: g, u, v = s u, y, and with a dense path w and t. Each is shifted by its mean over the first
    batch, so that a mean much larger than the deviation costs no digits.
    """

    def __init__(self, dense_path: bool) -> None:
        self.tokens, self.pairs = 0, _PAIRS_WITH_DENSE if dense_path else _PAIRS
        self.shift: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._products: dict[str, Tensor] = {}

    def add(self, features: Mapping[str, Tensor]) -> None:
        """Add a batch of tokens."""
        tokens = len(next(iter(features.values())))
        if not tokens:
            return
        self.tokens += tokens
        centred: dict[str, Tensor] = {}
        for name, feature_BO in features.items():
            centred[name] = feature_BO - self.shift.setdefault(name, feature_BO.mean(0))
            self._sums[name] = self._sums.get(name, 0) + centred[name].sum(0)
        for pair in self.pairs:
            self._products[pair] = self._products.get(pair, 0) + (centred[pair[0]] * centred[pair[1]]).sum(0)

    def covariance(self, a: str, b: str) -> Tensor:
        """Return the covariance of two features for each output, (O)."""
        product = self._products["".join(sorted(a + b))]
        return product / self.tokens - self._sums[a] / self.tokens * (self._sums[b] / self.tokens)

    def mean(self, name: str) -> Tensor:
        """Return the mean of a feature for each output, (O)."""
        return self.shift[name] + self._sums[name] / self.tokens


def shares(moments: Moments) -> tuple[dict[str, float | None], str | None]:
    """Return the shares by name, and why some are None: a product or output that is constant or not finite."""
    dense_path, found = "tt" in moments.pairs, dict[str, float | None](dict.fromkeys(FEATURES))
    if not moments.tokens:
        return found, "no token counts"
    reason = None
    for name, features in FEATURES.items():
        target = "t" if name == "expert_share" and dense_path else "y"
        what = "product" if dense_path and target == "y" else "output"
        used = [feature for feature in features if dense_path or feature != "w"]
        variance_O = moments.covariance(target, target).clamp_min(0)
        total = variance_O.sum()
        if not total.isfinite():
            return dict.fromkeys(FEATURES), "the layer's output is not finite"
        if total <= CONSTANT * moments.mean(target).square().sum():
            reason = f"the layer's {what} is constant"
            continue
        explained_O = _explained_variance(
            [[moments.covariance(a, b) for b in used[i:]] for i, a in enumerate(used)],
            [moments.covariance(feature, target) for feature in used],
        )
        found[name] = ((variance_O - explained_O).sum() / total).clamp(0.0, 1.0).item()
    # rounding can put the fit with two features below that with one
    for wider, narrower in (("identity_share", ["gate_share"]), ("product_share", ["gate_share", "hidden_share"])):
        if found[wider] is not None:
            found[wider] = min(value for name in (wider, *narrower) if (value := found[name]) is not None)
    return found, reason


def _explained_variance(features: list[list[Tensor]], target: list[Tensor]) -> Tensor:
    """Return the variance that least squares with an intercept explains, for each output, (O).

    Args:
        features: the upper triangle of the features' covariance by row, each (O).
        target: the covariance of each feature with the target, each (O).
    """
    size = len(target)
    matrix: Any = torch.zeros(*target[0].shape, size, size, dtype=torch.float64, device=target[0].device)
    for i, row in enumerate(features):
        for j, value in enumerate(row, i):
            matrix[..., i, j] = matrix[..., j, i] = value
    vector = torch.stack(target, -1)
    scale = matrix.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).rsqrt()
    # with a unit diagonal, the pseudo-inverse's cut-off doesn't depend on the units of the features
    scaled = torch.linalg.pinv(scale.unsqueeze(-1) * matrix * scale.unsqueeze(-2), hermitian=True, rtol=1e-10)
    vector = vector * scale
    return (vector.unsqueeze(-2) @ scaled @ vector.unsqueeze(-1)).squeeze(-1).squeeze(-1)

"""Figures of one layer on the base model's activations, streamed over the evaluation's tokens.

Let g be the gain, u the linear factor, y = g * u and s = sum_n a_n (see moments.py). Sums are float64.
Shape suffixes: B tokens, I input width, O output width, N experts.
"""

from typing import Any

import torch
from torch import Tensor

from mxd_convert.evaluation.attribution import Attribution
from mxd_convert.evaluation.by_document import Sums
from mxd_convert.evaluation.jacobian import Jacobian
from mxd_convert.evaluation.moments import Moments, shares
from mxd_convert.evaluation.token_kinds import TokenKinds
from mxd_convert.evaluation.variance import Dimensions, Variance
from mxd_convert.modeling.layers_mxd import Coefficients, FactoredLayer

ALWAYS_ON = 0.5  # firing rate above which an expert is always on


class LayerFigures:
    """The figures of one layer: `add` the base's activations, then call `fidelity` and `reliance`.

    documents: their number. quick: whether to leave out figures in place and those of single experts.
    """

    def __init__(self, layer: FactoredLayer, documents: int, quick: bool = False) -> None:
        self.layer, self.quick = layer, quick
        device = layer.output_bias.device
        self.masked, self.all, self.local, self.teacher = (Variance(layer.d_out, device, documents) for _ in range(4))
        self.sums, self.kinds = Sums(documents, device), TokenKinds(documents, device)
        self.firings_N = torch.zeros(layer.n_experts, dtype=torch.int64, device=device)
        self.gain_dimensions, self.target_dimensions = Dimensions(device), Dimensions(device)
        self.moments = Moments(layer.has_dense_path)
        self.attribution = Attribution(layer.n_experts, layer.d_out, device)
        self.jacobian = Jacobian(documents, device)

    @torch.no_grad()
    def add(self, x_BI: Tensor, y_BO: Tensor, counted_B: Tensor, document_B: Tensor, kind_B: Tensor | None = None) -> None:
        """Add the base's activations: the MLP's inputs and outputs, which tokens count, and the document and kind of each."""
        layer = self.layer
        coefficients = layer.encode(x_BI)
        values = coefficients if isinstance(coefficients, Tensor) else coefficients[0]
        gain_BO, linear_BO = layer.gain_of(coefficients).double(), layer.linear(x_BI).double()
        product_BO = gain_BO * linear_BO
        dense_BO = layer.dense_path(x_BI)
        whole_BO = product_BO if dense_BO is None else product_BO + dense_BO.double()
        output_BO, y_BO = whole_BO + layer.output_bias.double(), y_BO.double()
        self.all.add(output_BO, y_BO, document_B)
        if kind_B is not None:
            self.kinds.add_errors(output_BO, y_BO, kind_B, document_B)
        self.masked.add(output_BO[counted_B], y_BO[counted_B], document_B[counted_B])
        if not self.quick:
            self.target_dimensions.add(y_BO[counted_B])
        firing = (values > 0) & counted_B.unsqueeze(-1)
        self.sums.add("active", firing.sum(-1)[counted_B], document_B[counted_B])
        self.sums.add("tokens", torch.ones_like(document_B[counted_B]), document_B[counted_B])
        if isinstance(coefficients, Tensor):
            self.firings_N += firing.sum(0)
        else:
            self.firings_N += torch.bincount(coefficients[1][firing], minlength=layer.n_experts)
        strength_B1 = values.double().sum(-1, keepdim=True)
        features = {"g": gain_BO, "u": linear_BO, "v": strength_B1 * linear_BO, "y": product_BO}
        if dense_BO is not None:
            features |= {"w": dense_BO.double(), "t": whole_BO}
        self.moments.add({name: feature_BO[counted_B] for name, feature_BO in features.items()})
        if layer.n_experts and counted_B.any() and not self.quick:
            u_BO = linear_BO[counted_B]
            # each output's gain is weighted by its effect on that output
            self.gain_dimensions.add(gain_BO[counted_B] * u_BO.square().mean(0).sqrt())
            centred_BO = product_BO[counted_B] - self.moments.shift["y"]
            self.attribution.add(_rows(_steered(layer, coefficients), counted_B), layer.experts, u_BO, centred_BO)

    def add_in_place(self, output_BO: Tensor, local_BO: Tensor, teacher_BO: Tensor, document_B: Tensor) -> None:
        """Add the layer's outputs in the converted model.

        Args:
            output_BO: the layer's outputs.
            local_BO: the original MLP's outputs on the same inputs.
            teacher_BO: the MLP's outputs in the base model.
            document_B: the document of each token.
        """
        self.local.add(output_BO.double(), local_BO.double(), document_B)
        self.teacher.add(output_BO.double(), teacher_BO.double(), document_B)

    def fidelity(self) -> dict[str, Any]:
        """Return the layer's entry of `fidelity.layers` in the report: FVUs and L0 with standard errors, dead share, always on.

        The latter three are None for a layer without experts.
        """
        experts = self.layer.n_experts > 0
        found: dict[str, Any] = {}
        fvus = {"fvu": self.masked, "fvu_with_bos": self.all}
        if not self.quick:
            fvus |= {"fvu_in_place_local": self.local, "fvu_in_place_teacher": self.teacher}
        for name, variance in fvus.items():
            found[name], found[f"{name}_se"] = variance.fvu()
        found["l0"], found["l0_se"] = self.sums.mean("active") if experts else (None, None)
        found["dead_fraction"] = (self.firings_N == 0).double().mean().item() if experts else None
        if found["fvu"] is None:
            what = "the output of the MLP or of the layer is constant or not finite"
            found["reason"] = what if self.masked.tokens else "no token counts"
        found["token_kinds"] = self.kinds.of_layer()
        threshold = ALWAYS_ON * max(self.masked.tokens, 1)
        found["always_on"] = int((self.firings_N > threshold).sum()) if experts else None
        return found

    def reliance(self) -> dict[str, Any]:
        """Return the layer's entry of `reliance.layers`: shares, attribution, dimensions, and the reason why shares are None.

        A layer without a linear factor has gate share 1, hidden share 0 and product share 0. A layer without experts has gate
        share 0, hidden share 1, product share 0 and expert share 0. Those are the limits of the definitions.

        gain_dimensions is the number of directions in which the gain varies, each g_o weighted by the root mean square of u_o.
        output_dimensions is the same for the MLP's output, to compare with. A gain of one direction can have high shares: the
        experts may flip a sign that the linear factor flips back.
        """
        found, reason = shares(self.moments)
        if reason is None and self.layer.n_experts == 0:
            found |= {"gate_share": 0.0, "hidden_share": 1.0, "product_share": 0.0, "expert_share": 0.0}
        elif reason is None and not self.layer.is_product:
            found |= {"gate_share": 1.0, "hidden_share": 0.0, "product_share": 0.0}
        if self.layer.n_experts == 0:
            found["identity_share"] = None
        if not self.quick:
            dimensions = {"gain_dimensions": self.gain_dimensions, "output_dimensions": self.target_dimensions}
            found |= {name: one.value() if self.layer.n_experts else None for name, one in dimensions.items()}
            found |= self._attributed()
        return found if reason is None else {**found, "reason": reason}

    def _attributed(self) -> dict[str, Any]:
        """Return the figures of single experts; None for a layer without experts or whose output is constant or not finite."""
        if self.layer.n_experts == 0 or not self.moments.tokens:
            return dict.fromkeys(("experts_50", "experts_90", "effective_experts"))
        return self.attribution.report(self.layer.experts, self.moments.mean("y") - self.moments.shift["y"])


def _steered(layer: FactoredLayer, coefficients: Coefficients) -> Coefficients:
    """Return coefficients with the layer's steering: of top-k, with a further entry per steered expert."""
    for n, change_B in layer.changes(coefficients):
        if isinstance(coefficients, Tensor):
            coefficients = coefficients.index_add(
                -1, torch.tensor([n], device=change_B.device), change_B.to(coefficients.dtype).unsqueeze(-1)
            )
        else:
            values_BK, indices_BK = coefficients
            values_BK = torch.cat([values_BK, change_B.to(values_BK.dtype).unsqueeze(-1)], -1)
            coefficients = values_BK, torch.cat([indices_BK, torch.full_like(indices_BK[..., :1], n)], -1)
    return coefficients


def _rows(coefficients: Coefficients, mask_B: Tensor) -> Coefficients:
    """Return the coefficients of some tokens."""
    return coefficients[mask_B] if isinstance(coefficients, Tensor) else (coefficients[0][mask_B], coefficients[1][mask_B])

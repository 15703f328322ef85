"""The work a conversion is: the products it really makes, by arithmetic from the shapes."""

from collections.abc import Sequence

from mxd_convert.architectures import Site
from mxd_convert.layers import mxd_forward_flops, mxd_step_flops
from mxd_convert.plan.resolve import LayerPlan, Plan


def flops_per_token(plan: Plan, groups: Sequence[Sequence[int]]) -> int:
    """Floating point operations for one token of the text, over all passes: the layers' steps, and the base's forwards.

    groups: layer indices by pass. A product with a weight counts 2 a weight; attention's scores, norms and the optimiser's pass
    are left out.
    """
    learning = sum(mxd_step_flops(*_shape(plan, layer)) for layer in plan.layers)
    return learning + sum(_forward(plan, max(group)) for group in groups)


def _forward(plan: Plan, last: int) -> int:
    """Of the base up to layer `last`; in sequential order with the converted layers below it, and besides as it is for a teacher."""
    base = 2 * sum(plan.depth_weights[: last + 1])
    if plan.recipe.train.order == "parallel":
        return base
    below = [(layer, site) for layer, site in zip(plan.layers, plan.sites, strict=True) if layer.index < last]
    converted = base + sum(mxd_forward_flops(*_shape(plan, layer)) - _of_the_mlp(site) for layer, site in below)
    return converted + (base if plan.recipe.train.target == "teacher" and below else 0)


def _of_the_mlp(site: Site) -> int:
    return 2 * site.d_in * site.d_hidden * (2 if site.glu else 1) + 2 * site.d_hidden * site.d_out


def _shape(plan: Plan, layer: LayerPlan) -> tuple[int, int, int, int, int, bool, bool, bool]:
    setting = plan.recipe.layer
    return layer.d_in, layer.d_hidden, layer.d_out, layer.experts, layer.k, layer.glu, setting.skip, setting.sparsity == "l1"

"""The work a conversion is: the products it really makes, by arithmetic from the shapes."""

from collections.abc import Sequence

from mxd_convert.base_model.families import Site
from mxd_convert.plan.resolve import Plan


def flops_per_token(plan: Plan, groups: Sequence[Sequence[int]]) -> int:
    """Floating point operations for one token of the text, over all passes: the layers' steps, and the base's forwards.

    groups: layer indices by pass. A product with a weight counts 2 a weight; attention's scores, norms and the optimiser's pass
    are left out. With a joint stage, the mean over the run's steps.
    """
    learning = sum(layer.shape.step_flops for layer in plan.layers)
    alone = learning + sum(_forward(plan, max(group)) for group in groups)
    joint = plan.joint_steps
    return (alone * (plan.steps - joint) + (learning + _through(plan)) * joint) // plan.steps


def _through(plan: Plan) -> int:
    """Beside the layers' steps, while all are trained in the model: forwards of base and converted model, and back to the lowest layer,
    whose input needs no gradient."""
    head = 2 * plan.vocabulary * plan.sites[-1].d_out
    base = _forward(plan, len(plan.depth_weights) - 1, alone=True) + head
    kept = base - sum(_of_the_mlp(site) for site in plan.sites)
    back = head + 2 * sum(plan.depth_weights[plan.layers[0].index + 1 :]) - sum(_of_the_mlp(site) for site in plan.sites[1:])
    return base + kept + back + sum(layer.shape.input_flops for layer in plan.layers[1:])


def _forward(plan: Plan, last: int, alone: bool = False) -> int:
    """Of the base up to layer `last`; in sequential order with the converted layers below it, and besides as it is for a teacher.

    alone: of the base as it is, in any order.
    """
    base = 2 * sum(plan.depth_weights[: last + 1])
    if alone or plan.recipe.train.order == "parallel":
        return base
    below = [(layer, site) for layer, site in zip(plan.layers, plan.sites, strict=True) if layer.index < last]
    converted = base + sum(layer.shape.forward_flops - _of_the_mlp(site) for layer, site in below)
    return converted + (base if plan.recipe.train.target == "teacher" and below else 0)


def _of_the_mlp(site: Site) -> int:
    return 2 * site.d_in * site.d_hidden * (2 if site.glu else 1) + 2 * site.d_hidden * site.d_out

"""Floating point operations of a conversion, computed from the shapes of the products that it performs."""

from collections.abc import Sequence

from mxd_convert.base_model.families import Site
from mxd_convert.plan.memory import device_of
from mxd_convert.plan.resolve import Plan
from mxd_convert.training.derivatives import EVERY
from mxd_convert.training.joint import piece_tokens


def flops_per_token(plan: Plan, groups: Sequence[Sequence[int]]) -> int:
    """Return the floating point operations per training token, over all passes: steps of the layers and forwards of the base.

    A product counts 2 per weight. Attention scores, norms and the optimiser are not counted. With a joint stage, the result is
    the mean over the run's steps. groups: layer indices by pass.
    """
    learning = sum(layer.shape.step_flops for layer in plan.layers)
    alone = learning + sum(_forward(plan, max(group)) for group in groups)
    if plan.recipe.train.jacobian:  # some tokens take a step, in a layer and in its MLP
        alone += (learning + sum(_of_the_mlp(site) for site in plan.sites)) // EVERY
    balance = 0
    if plan.recipe.train.balance:  # covariances of gain and product, and one forward and backward through the slopes
        balance = sum(8 * layer.shape.d_out**2 for layer in plan.layers if layer.shape.traits.is_product)
    joint = plan.joint_steps
    return balance + (alone * (plan.steps - joint) + (learning + _through(plan)) * joint) // plan.steps


def _through(plan: Plan) -> int:
    """Return the operations per token of the joint stage, without the layers' own steps.

    They are the forwards of base and converted model, and the backward down to the lowest layer, whose input needs no gradient.
    """
    head = 2 * plan.vocabulary * plan.sites[-1].d_out
    base = _whole(plan)
    kept = base - sum(_of_the_mlp(site) for site in plan.sites)
    back = head + 2 * sum(plan.depth_weights[plan.layers[0].index + 1 :]) - sum(_of_the_mlp(site) for site in plan.sites[1:])
    measured = 0
    if plan.recipe.train.balance and plan.tokens // plan.steps > piece_tokens(device_of(plan.recipe)):
        # forwards that settle the slopes of the balance terms, without the head
        measured = base + kept - 2 * head + sum(layer.shape.forward_flops for layer in plan.layers)
    return base + kept + measured + back + sum(layer.shape.input_flops for layer in plan.layers[1:])


def joint_forwards(plan: Plan) -> float:
    """Return the work of a joint step without the layers' own steps, in forwards of the base on as many tokens."""
    return _through(plan) / _whole(plan)


def _whole(plan: Plan) -> int:
    """Return the operations per token of a forward of the base, with its head."""
    return _forward(plan, len(plan.depth_weights) - 1, alone=True) + 2 * plan.vocabulary * plan.sites[-1].d_out


def _forward(plan: Plan, last: int, alone: bool = False) -> int:
    """Return the operations per token of the forwards up to layer `last`.

    In sequential order, the converted layers below `last` replace MLPs. With `train.target: teacher`, the base's own forward is
    added.
    alone: count the base's own forward only, in any order.
    """
    base = 2 * sum(plan.depth_weights[: last + 1])
    if alone or plan.recipe.train.order == "parallel":
        return base
    below = [(layer, site) for layer, site in zip(plan.layers, plan.sites, strict=True) if layer.index < last]
    converted = base + sum(layer.shape.forward_flops - _of_the_mlp(site) for layer, site in below)
    return converted + (base if plan.recipe.train.target == "teacher" and below else 0)


def _of_the_mlp(site: Site) -> int:
    """Return the operations per token of an MLP's forward."""
    return 2 * site.d_in * site.d_hidden * (2 if site.glu else 1) + 2 * site.d_hidden * site.d_out

"""Shares, attribution and Jacobian faithfulness equal what an independent calculation gives."""

import numpy as np
import pytest
import torch

from mxd_convert.evaluation.attribution import Attribution
from mxd_convert.evaluation.jacobian import DIRECTIONS, STEP, Jacobian, _directions
from mxd_convert.evaluation.layer_figures import LayerFigures
from mxd_convert.layers import LayerSpec, MxD, new_layer

TOKENS = 400


def layer_of(kind="mxd", seed=0, **settings):
    """A layer with random parameters."""
    hidden = 0 if "coder" in kind else 8
    sizes = (0, 0) if kind == "dense_twin" else (20, 3)
    settings = {"skip": kind == "skip_transcoder", **settings}
    layer = new_layer(LayerSpec(kind, 6, hidden, 5, *sizes, **settings), "paper")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def figures_of(layer, x, y=None, counted=None, documents=4):
    figures = LayerFigures(layer, documents)
    y = torch.randn(len(x), 5) if y is None else y
    counted = torch.ones(len(x), dtype=torch.bool) if counted is None else counted
    document = torch.arange(len(x)) * documents // len(x)
    for start in range(0, len(x), 37):  # streamed in uneven pieces
        piece = slice(start, start + 37)
        figures.add(x[piece], y[piece], counted[piece], document[piece])
    return figures


def left(features, target):
    """The share of a target's variance, summed over outputs, that least squares with an intercept leaves, output by output."""
    residual = total = 0.0
    for o in range(target.shape[1]):
        design = np.stack([*(feature[:, o] for feature in features), np.ones(len(target))], -1)
        solution, *_ = np.linalg.lstsq(design, target[:, o], rcond=None)
        residual += ((target[:, o] - design @ solution) ** 2).sum()
        total += ((target[:, o] - target[:, o].mean()) ** 2).sum()
    return residual / total


@pytest.mark.parametrize("settings", [{}, {"sparsity": "l1"}, {"skip": True}], ids=["topk", "l1", "skip"])
@torch.no_grad()
def test_shares_equal_least_squares(settings):
    layer, x = layer_of(**settings), torch.randn(TOKENS, 6)
    coefficients = layer.encode(x)
    s = (coefficients if settings.get("sparsity") == "l1" else coefficients[0]).sum(-1, keepdim=True).double().numpy()
    g, u = layer.gain_of(coefficients).double().numpy(), layer.linear(x).double().numpy()
    dense = [u] if layer.skip is None else [u, layer.skip(x).double().numpy()]
    whole = g * u + (0 if layer.skip is None else dense[1])
    expected = {
        "gate_share": left([u], g * u),
        "hidden_share": left([g], g * u),
        "product_share": left([g, u], g * u),
        "identity_share": left([u, s * u], g * u),
        "expert_share": left(dense, whole),
    }
    found = figures_of(layer, x).reliance()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert 0 < expected["product_share"] < min(expected["gate_share"], expected["hidden_share"]) < 1


@torch.no_grad()
def test_a_known_product_share_is_measured():
    """g and u are independent with means m and variance 1: y has the variance 1 + 2 m^2, of which 1 is the product's own."""
    x = torch.randn(200_000, 2)
    layer = MxD(2, 2, 1, 4, 4, activation="relu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.gate.weight[0, 0], layer.gate.weight[1, 0] = 1.0, -1.0  # a = relu(x), relu(-x): g = x + m
        layer.gate.bias[2] = 1.0
        layer.experts[:, 0] = torch.tensor([1.0, -1.0, 0.5, 0.0])
        layer.encoder.weight[0, 1], layer.encoder.weight[1, 1] = 1.0, -1.0  # u = x' + m
        layer.decoder.weight[0] = torch.tensor([1.0, -1.0])
    for mean in (0.5, 1.0):
        layer.experts.data[2] = mean
        layer.encoder.weight.data[:, 1] = torch.tensor([1.0, -1.0])
        layer.encoder.bias.data[:] = 0.0
        u = layer.linear(x) + 0.0
        assert u.flatten().allclose(x[:, 1], atol=1e-6)
        shifted = torch.stack([x[:, 0], x[:, 1] + mean], -1)
        found = figures_of_one(layer, shifted)
        assert found["product_share"] == pytest.approx(1 / (1 + 2 * mean**2), abs=0.01)
        assert found["gate_share"] == pytest.approx((1 + mean**2) / (1 + 2 * mean**2), abs=0.01)
        assert found["hidden_share"] == pytest.approx((1 + mean**2) / (1 + 2 * mean**2), abs=0.01)


def figures_of_one(layer, x):
    figures = LayerFigures(layer, 1)
    figures.add(x, torch.randn(len(x), 1), torch.ones(len(x), dtype=torch.bool), torch.zeros(len(x), dtype=torch.long))
    return figures.reliance()


@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        ("transcoder", {"gate_share": 1.0, "hidden_share": 0.0, "product_share": 0.0, "expert_share": 1.0}),
        ("skip_transcoder", {"gate_share": 1.0, "hidden_share": 0.0, "product_share": 0.0}),
        ("dense_twin", {"gate_share": 0.0, "hidden_share": 1.0, "product_share": 0.0, "expert_share": 0.0}),
    ],
)
@torch.no_grad()
def test_a_missing_side_has_the_limits(kind, limits):
    layer, x = layer_of(kind), torch.randn(TOKENS, 6)
    found = figures_of(layer, x).reliance()
    assert {name: found[name] for name in limits} == limits
    if kind == "skip_transcoder":
        assert 0.1 < found["expert_share"] < 0.9


@torch.no_grad()
def test_the_definitions_give_the_limits_themselves():
    """Least squares on the factors of a transcoder and a dense twin gives their limits to rounding."""
    from mxd_convert.evaluation.moments import shares

    x = torch.randn(TOKENS, 6)
    transcoder, twin = (shares(figures_of(layer_of(kind), x).moments)[0] for kind in ("transcoder", "dense_twin"))
    assert (transcoder["gate_share"], transcoder["hidden_share"], transcoder["expert_share"]) == pytest.approx(
        (1, 0, 1), abs=1e-9
    )
    assert (twin["gate_share"], twin["hidden_share"], twin["expert_share"]) == pytest.approx((0, 1, 0), abs=1e-9)
    assert transcoder["product_share"] == pytest.approx(0, abs=1e-9)
    assert twin["product_share"] == pytest.approx(0, abs=1e-9)


@torch.no_grad()
def test_shares_do_not_depend_on_how_c_and_d_split_the_scale():
    layer, x = layer_of(skip=True), torch.randn(300, 6)
    before = figures_of(layer, x).reliance()
    scale = torch.logspace(-3, 3, 5)
    layer.experts.mul_(scale)
    layer.decoder.weight.div_(scale.unsqueeze(-1))
    after = figures_of(layer, x).reliance()
    for name in ("gate_share", "hidden_share", "product_share", "identity_share", "expert_share", "effective_experts"):
        assert after[name] == pytest.approx(before[name], rel=1e-4), name


@torch.no_grad()
def test_a_constant_gain_has_no_gate_share():
    layer, x = layer_of(), torch.randn(300, 6)
    layer.gate.weight.zero_()
    layer.gate.bias.fill_(1.0)
    layer.experts[:] = layer.experts[0]
    found = figures_of(layer, x).reliance()
    assert found["gate_share"] < 1e-6
    assert found["identity_share"] < 1e-6
    assert found["hidden_share"] == pytest.approx(1, abs=1e-6)


@torch.no_grad()
def test_a_nearly_constant_linear_factor_has_a_small_hidden_share():
    """u = 1000 + small: what the default recipe trains. The shift keeps the digits that its mean would cost."""
    layer, x = layer_of(), torch.randn(2000, 6)
    u = layer.linear(x)
    layer.decoder.weight.mul_(1e-3 / u.std())
    constant = torch.zeros_like(layer.encoder.weight[:1])
    layer.encoder.weight[:1], layer.encoder.bias[:1] = constant, 10.0
    layer.decoder.weight[:, 0] = 100.0
    found = figures_of(layer, x).reliance()
    g, exact = layer.gain_of(layer.encode(x)).double().numpy(), layer.linear(x).double().numpy()
    assert found["hidden_share"] == pytest.approx(left([g], g * exact), rel=1e-3)
    assert found["hidden_share"] < 1e-3
    assert found["gate_share"] > 0.8


@torch.no_grad()
def test_experts_that_differ_in_strength_only_have_no_identity_share():
    layer, x = layer_of(), torch.randn(300, 6)
    layer.experts[:] = layer.experts[0]
    found = figures_of(layer, x).reliance()
    assert found["gate_share"] > 0.05
    assert found["identity_share"] < 1e-6


@torch.no_grad()
def test_constant_and_infinite_outputs_have_no_shares_but_a_reason():
    x = torch.randn(300, 6)
    constant, infinite = layer_of(), layer_of()
    constant.decoder.weight.zero_()
    infinite.decoder.weight[0, 0] = torch.inf
    for layer, reason in ((constant, "the layer's output is constant"), (infinite, "the layer's output is not finite")):
        found = figures_of(layer, x).reliance()
        assert found["reason"] == reason
        names = ("gate_share", "hidden_share", "product_share", "expert_share", "identity_share", "experts_50")
        assert {found[name] for name in names} == {None}
        assert all(value is None or np.isfinite(value) for value in found.values() if not isinstance(value, str))


@pytest.mark.parametrize("sparsity", ["topk", "l1"])
@torch.no_grad()
def test_attribution_equals_the_contributions_of_single_experts(sparsity):
    layer, x = layer_of(sparsity=sparsity), torch.randn(TOKENS, 6)
    coefficients, u = layer.encode(x), layer.linear(x)
    dense = coefficients if sparsity == "l1" else torch.zeros(TOKENS, 20).scatter(1, coefficients[1], coefficients[0])
    contributions = (dense.unsqueeze(-1) * layer.experts * u.unsqueeze(1)).double()  # (tokens, N, O)
    y = contributions.sum(1)
    share = (contributions * (y - y.mean(0)).unsqueeze(1)).sum((0, 2))
    share = share / share.sum()
    attribution, centre = Attribution(20, 5, torch.device("cpu")), y[:37].mean(0)
    for piece in torch.arange(TOKENS).split(37):
        some = coefficients[piece] if sparsity == "l1" else (coefficients[0][piece], coefficients[1][piece])
        attribution.add(some, layer.experts, u[piece].double(), y[piece] - centre)
    moved = y.mean(0) - centre
    assert torch.allclose(attribution.shares(layer.experts, moved), share, atol=1e-5)
    energy = contributions.square().sum(-1)
    effective = (energy.sum(-1) ** 2 / energy.square().sum(-1)).nanmean().item()
    order = share.sort(descending=True).values.cumsum(0)
    assert attribution.report(layer.experts, moved) == {
        "effective_experts": pytest.approx(effective, rel=1e-5),
        "experts_50": int((order < 0.5).sum()) + 1,
        "experts_90": int((order < 0.9).sum()) + 1,
    }


@torch.no_grad()
def test_jacobian_faithfulness_of_linear_maps_is_that_of_their_matrices():
    """For f(x) = A x and g(x) = B x, changes are A d and B d, with d known from the seed."""
    torch.manual_seed(1)
    x, document = torch.randn(50, 6), torch.arange(50) % 5
    ours, theirs = torch.randn(4, 6), torch.randn(4, 6)
    figures = Jacobian(5, torch.device("cpu"))
    figures.add(x, document, lambda x: x @ ours.T + 1, lambda x: x @ theirs.T - 2, seed=3)
    found = figures.report()
    for name, direction in zip(DIRECTIONS, _directions(x, 3), strict=True):
        step = direction / direction.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True) * STEP
        a, b = (2 * step @ matrix.T for matrix in (ours, theirs))
        assert found[name]["relative_squared_error"] == pytest.approx(
            ((a - b).square().sum() / b.square().sum()).item(), rel=1e-4
        )
        assert found[name]["cosine"] == pytest.approx(torch.cosine_similarity(a, b).mean().item(), rel=1e-4)
        assert found[name]["cosine_se"] > 0


@torch.no_grad()
def test_a_layer_that_does_not_change_has_an_error_of_one_and_no_cosine():
    x, document = torch.randn(50, 6), torch.arange(50) % 5
    figures = Jacobian(5, torch.device("cpu"))
    figures.add(x, document, lambda x: torch.zeros(len(x), 4), lambda x: x[:, :4], seed=0)
    for found in figures.report().values():
        assert found["relative_squared_error"] == 1.0
        assert found["cosine"] is None


def test_directions_lead_to_other_tokens_and_are_the_same_for_every_layer():
    x = torch.randn(20, 6)
    data, random = _directions(x, 7)
    targets = x + data
    distances = torch.cdist(targets, x)
    assert distances.min(-1).values.max() < 1e-5  # each target is a token's input
    assert (distances.argmin(-1) != torch.arange(20)).all()
    again, _ = _directions(x, 7)
    assert data.equal(again)
    assert random.shape == x.shape


@pytest.mark.parametrize("sparsity", ["topk", "l1"])
@torch.no_grad()
def test_attribution_counts_a_steered_expert(sparsity):
    """A preset that sets one expert high at every token makes it carry most of the variance."""
    layer, x = layer_of(sparsity=sparsity), torch.randn(TOKENS, 6)
    plain = figures_of(layer, x).reliance()
    layer.steering = [{"expert": 4, "set": 1000.0, "positions": "all"}]
    steered = figures_of(layer, x).reliance()
    assert plain["experts_90"] > 2
    assert steered["experts_90"] == 1
    assert steered["effective_experts"] < plain["effective_experts"]


@torch.no_grad()
def test_dead_experts_beside_a_skip_path_have_an_expert_share_of_0():
    layer, x = layer_of("skip_transcoder"), torch.randn(TOKENS, 6)
    layer.gate.weight.zero_()
    layer.gate.bias.fill_(-1.0)
    found = figures_of(layer, x).reliance()
    assert found["expert_share"] == pytest.approx(0.0, abs=1e-9)
    assert (found["gate_share"], found["reason"]) == (None, "the layer's product is constant")

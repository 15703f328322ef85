"""The layer equals the explicit sum over its experts, and has the paper's initialisation and loss."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import ACT2FN

from mxd_convert.layers import LayerSpec, MxD, new_layer, normalised_mse
from mxd_convert.layers.trainable import normalise, project
from mxd_convert.modeling import layers_mxd

I, H, O, N, K = 7, 11, 5, 13, 4


def random_layer(**settings) -> MxD:
    torch.manual_seed(0)
    layer = MxD(I, H, O, settings.pop("n_experts", N), settings.pop("k", K), **settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def explicit_sum(layer: MxD, x: torch.Tensor) -> torch.Tensor:
    """Return sum_n a_n W_n^T z + b with every W_n materialised (paper, equations 2 to 4). The shared expert has coefficient 1."""
    gate = torch.relu(x @ layer.gate.weight.T + layer.gate.bias)
    if layer.sparsity == "topk":
        kept = torch.zeros_like(gate)
        for row, values in enumerate(gate):
            for n in sorted(range(len(values)), key=lambda n: -values[n].item())[: layer.k]:
                kept[row, n] = values[n]
        gate = kept
    act = ACT2FN[layer.activation].double()
    act.load_state_dict(layer.act.state_dict())  # an activation with a learnt parameter
    hidden = x @ layer.encoder.weight.T + layer.encoder.bias
    z = act(x @ layer.encoder_gate.weight.T + layer.encoder_gate.bias) * hidden if layer.glu else act(hidden)
    y = torch.zeros(len(x), layer.d_out, dtype=x.dtype)
    for n in range(layer.n_experts):
        weight = layer.decoder.weight.T @ torch.diag(layer.experts[n])
        y = y + gate[:, n : n + 1] * (z @ weight)
    if layer.shared_expert is not None:
        y = y + z @ (layer.decoder.weight.T @ torch.diag(layer.shared_expert))
    y = y + layer.output_bias
    return y if layer.skip is None else y + x @ layer.skip.weight.T


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("sparsity", ["topk", "l1"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("shared_expert", [False, True])
@torch.no_grad()
def test_the_layer_equals_the_explicit_sum_over_experts(glu, sparsity, skip, shared_expert):
    settings = {"glu": glu, "sparsity": sparsity, "skip": skip, "shared_expert": shared_expert}
    layer, x = random_layer(**settings), torch.randn(6, I, dtype=torch.float64)
    assert (layer(x) - explicit_sum(layer, x)).abs().max() < 1e-10


@pytest.mark.parametrize("activation", sorted(set(ACT2FN.keys())))
@torch.no_grad()
def test_every_activation_of_transformers_works(activation):
    try:
        ACT2FN[activation]
    except ImportError as error:  # an activation whose own library is not installed
        pytest.skip(str(error).splitlines()[0])
    layer, x = random_layer(activation=activation), torch.randn(6, I, dtype=torch.float64)
    expected = explicit_sum(layer, x)
    assert layer(x).dtype == torch.float64
    assert (layer(x) - expected).abs().max() < 1e-10 * expected.abs().max().clamp_min(1)


@pytest.mark.parametrize(("n_experts", "k"), [(1, 1), (13, 1), (13, 13)])
@torch.no_grad()
def test_any_number_of_experts_works(n_experts, k):
    layer, x = random_layer(n_experts=n_experts, k=k), torch.randn(2, 3, I, dtype=torch.float64)
    assert (layer(x) - explicit_sum(layer, x.flatten(0, 1)).view(2, 3, O)).abs().max() < 1e-10
    assert layer(x[:0]).shape == (0, 3, O)


@torch.no_grad()
def test_expert_weight_is_the_linear_map_of_one_expert():
    layer, x = random_layer(), torch.randn(1, I, dtype=torch.float64)
    values, indices = layer.encode(x)
    z = layer.hidden(x)
    y = sum(value * (z @ layer.expert_weight(n)) for value, n in zip(values[0], indices[0].tolist(), strict=True))
    assert torch.allclose(y + layer.output_bias, layer(x), atol=1e-12)
    assert layer.expert_weight(0).shape == (H, O)
    with pytest.raises(IndexError, match="experts 0 to 12"):
        layer.expert_weight(13)


@torch.no_grad()
def test_encode_returns_zero_for_gates_that_are_not_positive():
    layer = random_layer()
    layer.gate.bias.fill_(-1e3)
    layer.gate.bias[3] = 1e3
    values, indices = layer.encode(torch.randn(2, 5, I, dtype=torch.float64))
    assert values.shape == indices.shape == (2, 5, K)
    assert ((values > 0).sum(-1) == 1).all()
    assert (indices[values > 0] == 3).all()
    assert random_layer(sparsity="l1").encode(torch.randn(2, 5, I, dtype=torch.float64)).shape == (2, 5, N)


def test_gradients_equal_those_of_the_dense_formulation():
    layer, x = random_layer(glu=True, skip=True), torch.randn(6, I, dtype=torch.float64, requires_grad=True)
    target = torch.randn(6, O, dtype=torch.float64)
    for run in (layer, lambda x: explicit_sum(layer, x)):
        inputs = [x, *layer.parameters()]
        gradients = torch.autograd.grad((run(x) - target).square().sum(), inputs)
        if run is layer:
            ours = gradients
    for mine, dense in zip(ours, gradients, strict=True):
        assert (mine - dense).abs().max() <= 1e-10 * dense.abs().max().clamp_min(1)


def test_the_initialisation_is_that_of_the_paper():
    torch.manual_seed(0)
    layer = MxD(64, 96, 48, 200, 8, glu=True, skip=True)
    assert not layer.decoder.weight.any()
    assert not layer.skip.weight.any()
    for bias in (layer.encoder.bias, layer.encoder_gate.bias, layer.gate.bias, layer.output_bias):
        assert not bias.any()
    assert torch.allclose(layer.experts.norm(dim=-1), torch.ones(200), atol=1e-6)
    assert layer.encoder.weight.abs().max() <= 64**-0.5 + 1e-6  # nn.Linear's own bound
    assert layer.encoder.weight.std() > 0.5 * 64**-0.5 / 3**0.5
    assert not layer(torch.randn(3, 64)).any()


def test_gradients_of_experts_are_projected_off_their_unit_rows():
    layer = random_layer()
    with torch.no_grad():
        normalise(layer.experts)
    rows, gradient = layer.experts.detach(), torch.randn_like(layer.experts)
    before = gradient.clone()
    project(gradient, rows)
    assert (gradient * rows).sum(-1).abs().max() < 1e-10
    assert torch.allclose(before - gradient, (before * rows).sum(-1, keepdim=True) * rows)


def test_the_loss_is_that_of_the_paper():
    y_hat, y = torch.randn(9, 5), torch.randn(9, 5)
    expected = sum(((a - b) ** 2 / b.norm()).mean() for a, b in zip(y_hat, y, strict=True)) / 9
    assert normalised_mse(y_hat, y).item() == pytest.approx(expected.item(), rel=1e-5)
    weight = torch.tensor([1.0, 0, 1, 0, 0, 0, 0, 0, 0])
    kept = normalised_mse(y_hat[[0, 2]], y[[0, 2]])
    assert normalised_mse(y_hat, y, weight).item() == pytest.approx(kept.item(), rel=1e-5)
    assert torch.isfinite(normalised_mse(y_hat, torch.zeros(9, 5)))
    sink = y.clone()
    sink[1] *= 1e6  # its weight is 0, so it does not affect the minimum norm of the others
    assert normalised_mse(torch.where(y == sink, y_hat, sink), sink, weight).item() == pytest.approx(kept.item(), rel=1e-5)


def test_the_gradient_of_the_loss_equals_autograd():
    y_hat, y = torch.randn(9, 5, dtype=torch.float64, requires_grad=True), torch.randn(9, 5, dtype=torch.float64)
    weight = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 0, 1], dtype=torch.float64)
    for kept in (None, weight):
        [ours] = torch.autograd.grad(3 * normalised_mse(y_hat, y, kept), y_hat)
        each = (y_hat - y).square().mean(-1) / y.norm(dim=-1)
        [expected] = torch.autograd.grad(3 * (each.mean() if kept is None else (each * kept).sum() / kept.sum()), y_hat)
        assert torch.allclose(ours, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("d_in", "d_hidden", "glu", "expected"),
    [(768, 3072, False, 21_504), (1024, 4096, False, 28_672), (2048, 8192, False, 57_344), (3072, 8192, True, 86_015)],
)
def test_matched_expert_counts_equal_those_of_the_paper(d_in, d_hidden, glu, expected):
    shape = LayerSpec("mxd", d_in, d_hidden, d_in, 0, 32, glu=glu).match_parameters(32)
    assert shape.n_experts == expected
    width = 32 * d_in
    room = width * (d_in + 1) + width * d_in + d_in  # a transcoder's encoder and decoder with a bias each
    assert shape.parameters <= room < replace(shape, n_experts=expected + 1).parameters


@pytest.mark.parametrize("kind", ["mxd", "random_gate", "transcoder", "skip_transcoder"])
@pytest.mark.parametrize("skip", [False, True])
def test_all_kinds_match_the_parameters_of_one_transcoder(kind, skip):
    room = LayerSpec("transcoder", 64, 0, 64, 32 * 64, 8).parameters
    shape = LayerSpec(kind, 64, 0 if "coder" in kind else 172, 64, 0, 8, skip=skip).match_parameters(32)
    assert room - (64 + 64 + 1) < shape.parameters <= room
    assert LayerSpec("dense_twin", 64, 172, 64, 0, 0).match_parameters(32).n_experts == 0


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *product(("mxd", "random_gate", "dense_twin"), ({"glu": True}, {"skip": True}, {"sparsity": "l1"}, {})),
        *product(("mxd", "random_gate"), ({"shared_expert": True},)),
    ],
)
def test_counted_parameters_equal_those_of_the_layer(kind, settings):
    shape = LayerSpec(kind, I, H, O, *((0, 0) if kind == "dense_twin" else (N, K)), **settings)
    assert shape.parameters == sum(parameter.numel() for parameter in new_layer(shape).parameters())


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder"])
def test_counted_parameters_of_transcoders_equal_their_formula(kind):
    shape = LayerSpec(kind, I, 0, O, N, K, skip=kind == "skip_transcoder")
    assert shape.parameters == sum(parameter.numel() for parameter in new_layer(shape).parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"k": 14}, "k is 14"), ({"k": 0}, "k is 0"), ({"activation": "gulu"}, "gulu"), ({"sparsity": "l0"}, "l0")],
)
def test_impossible_layers_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MxD(I, H, O, N, **{"k": K, **settings})


@torch.no_grad()
def test_half_precision_stays_close_to_float32():
    layer, x = random_layer(), torch.randn(50, I, dtype=torch.float64)
    exact = layer(x)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.3)):
        rough = layer.to(dtype)(x.to(dtype))
        assert rough.dtype == dtype
        assert ((rough.double() - exact).norm() / exact.norm()) < tolerance


def test_a_token_with_zero_output_does_not_dominate_the_loss():
    y = torch.randn(8, 5)
    y[3] = 0
    error = torch.full_like(y, 0.01)
    others = torch.arange(8) != 3
    assert normalised_mse(y + error, y) < 200 * normalised_mse((y + error)[others], y[others])


class ByExperts(TorchDispatchMode):
    """Record every operation whose result is as wide as the number of experts."""

    def __init__(self, n_experts):
        super().__init__()
        self.n_experts, self.found = n_experts, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.n_experts,) and tensor.ndim > 1:
                self.found.append(function._schema.name)
        return made


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_forward_materialises_only_the_gates_per_token_and_expert(tokens):
    """The code in a checkpoint neither scatters to all experts nor passes over them again, for any number of tokens."""
    layer = layers_mxd.MxD(12, 20, 12, 977, 5).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        with ByExperts(977) as watched:
            layer(torch.randn(1, tokens, 12))
    kinds = {name.removeprefix("aten::") for name in watched.found}
    assert kinds <= {"addmm", "view", "_unsafe_view", "linear", "t"}, watched.found
    assert sum(name in ("aten::addmm", "aten::linear") for name in watched.found) == 1

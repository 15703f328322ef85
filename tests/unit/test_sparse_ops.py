"""The sparse operations equal dense autograd in float64 in less memory; the optimiser's single pass equals its separate steps."""

import math
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mxd_convert.layers import MxD
from mxd_convert.layers.sparse_ops import RowGradient, autograd, reference, selection, sparse_gate, top_k, weighted_rows
from mxd_convert.layers.trainable import Trainable, normalise
from mxd_convert.training.optimiser import Optimiser

B, D, O, N, K = 23, 7, 5, 19, 4


def problem(tokens=B, n_experts=N, bias=0.0, seed=0):
    """Return x, gate weight, gate bias and expert rows in float64."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    x, weight, rows = random(tokens, D), random(n_experts, D), random(n_experts, O)
    return x, weight, (random(n_experts).detach() + bias).requires_grad_(), rows


def dense(x, weight, bias, rows, k):
    """Compute the same with a dense (B, N) matrix of coefficients."""
    gate = F.relu(F.linear(x, weight, bias))
    values, indices = gate.topk(k, dim=-1)
    return torch.zeros_like(gate).scatter(-1, indices, values) @ rows


def sparse(x, weight, bias, rows, k, sinks=(None, None)):
    values, indices = sparse_gate(x, weight, bias, k, sinks[0])
    return weighted_rows(values, indices, rows, sinks[1])


CASES = {
    "plain": (problem(), K),
    "k = 1": (problem(), 1),
    "k = N": (problem(), N),
    "fewer than k positive": (problem(bias=-3.0), 8),
    "none positive": (problem(bias=-100.0), K),
    "one token": (problem(tokens=1), K),
    "no tokens": (problem(tokens=0), K),
    "one expert": (problem(n_experts=1), 1),
}
twice = problem()
CASES["tokens twice"] = ((torch.cat([twice[0], twice[0]]).detach().requires_grad_(), *twice[1:]), K)
dead = problem()
with torch.no_grad():
    dead[2][::2] -= 1000
CASES["dead experts"] = (dead, K)


@pytest.fixture(params=["one chunk", "chunks of 4 tokens", "two-stage top-k"])
def path(request, monkeypatch):
    if request.param == "chunks of 4 tokens":
        monkeypatch.setattr(autograd, "MIN_ROWS", 4)
        monkeypatch.setattr(autograd, "CHUNK_BYTES", {"cpu": 0})
    if request.param == "two-stage top-k":
        monkeypatch.setattr(reference, "_group", lambda n_experts, k: 2)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_dense_autograd(case, path):
    inputs, k = CASES[case]
    expected, found = dense(*inputs, k), sparse(*inputs, k)
    assert torch.allclose(found, expected, atol=1e-12)
    weight = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).view_as(expected)
    wanted = torch.autograd.grad((expected.square() * weight).sum(), inputs)
    got = torch.autograd.grad((found.square() * weight).sum(), inputs)
    for name, mine, theirs in zip(("x", "weight", "bias", "rows"), got, wanted, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-11), name


@pytest.mark.parametrize("case", CASES)
def test_gradients_stored_by_row_are_the_same_in_any_piece(case):
    inputs, k = CASES[case]
    plain = torch.autograd.grad(sparse(*inputs, k).square().sum(), inputs[1:])
    sinks = RowGradient(), RowGradient()
    sparse(*inputs, k, sinks).square().sum().backward(inputs=inputs)
    assert inputs[1].grad is None
    assert inputs[3].grad is None
    for sink, whole in zip(sinks, (plain[0], plain[2]), strict=True):
        assert torch.equal(sink.rows(), whole)
        middle = len(whole) // 2
        assert torch.equal(torch.cat([sink.rows(0, middle), sink.rows(middle, len(whole))]), whole)
    sparse(*inputs, k, sinks).square().sum().backward(inputs=inputs)
    assert torch.allclose(sinks[1].rows(), 2 * plain[2])  # a second backward pass accumulates
    for parameter in inputs:
        parameter.grad = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_gate_values_equal_those_of_linear(tokens, dtype):
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((tokens, 48), (301, 48), (301,)))
    exact = x.double() @ weight.double().T + bias.double()
    made = reference.gate_values(x, weight, bias)
    assert (made.dtype, made.shape) == (dtype, (tokens, 301))
    assert ((made - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-4).all()


@pytest.mark.parametrize("width", [1, 31, 1780, 4096, 5000, 21_490])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 3])
def test_top_k_is_exact(width, dtype, threads, monkeypatch):
    monkeypatch.setattr(selection, "MIN_VALUES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(width)
    gate = torch.randn(9, width).to(dtype)
    gate[0] = 1.0  # all gates tie
    gate[1] = -gate[1].abs()
    gate[2, ::3] = math.inf
    gate[3, ::2] = -math.inf
    gate[4, ::5] = -0.0
    for k in {1, min(32, width), min(300, width), width if width < 5000 else 7}:
        values, indices = top_k(gate, k)
        assert torch.equal(values.sort(-1).values, gate.topk(k, dim=-1).values.sort(-1).values)
        assert torch.equal(gate.gather(1, indices), values)
        assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_top_k_works_in_a_fork_of_a_process_that_used_it(monkeypatch):
    """A child has none of the threads of its parent."""
    monkeypatch.setattr(selection, "MIN_VALUES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    gate = np.random.default_rng(0).random((8, 50), dtype=np.float32)
    expected = np.sort(selection.largest(torch.from_numpy(gate), 5).numpy())
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        same = (np.sort(selection.largest(torch.from_numpy(gate), 5).numpy()) == expected).all()
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


class Largest(TorchDispatchMode):
    """Record the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self.elements = max(self.elements, tensor.numel())
        return made


def test_no_large_intermediate_is_kept_or_created(monkeypatch):
    monkeypatch.setattr(autograd, "MIN_ROWS", 16)
    monkeypatch.setattr(autograd, "CHUNK_BYTES", {"cpu": 0})
    tokens, width, n_experts, k = 256, 48, 500, 32
    layer = MxD(width, 64, width, n_experts, k)
    x, kept = torch.randn(tokens, width), []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x).square().sum().backward()
    whole = max(parameter.numel() for parameter in layer.parameters())
    assert max(kept) <= max(whole, tokens * 64)
    assert largest.elements <= max(whole, tokens * 64)
    assert largest.elements < min(tokens * n_experts, tokens * k * width)
    dense_layer = super(Trainable, layer)  # the bound is one that the dense path breaks
    with Largest() as largest:
        dense_layer.encode(x)
    assert largest.elements >= tokens * n_experts


@pytest.mark.parametrize("defer", [True, False])
@pytest.mark.parametrize("chunk", [1, 64, 10**6])
def test_the_optimiser_equals_projection_then_adamw_then_normalisation(monkeypatch, defer, chunk):
    monkeypatch.setattr("mxd_convert.training.optimiser.CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    ours, plain = (MxD(D, 11, O, N, K, glu=True, skip=True).double() for _ in range(2))
    with torch.no_grad():
        ours.decoder.weight.normal_()
        ours.gate.bias[3] = -1000.0  # an expert that is never active
    plain.load_state_dict(ours.state_dict())
    start = ours.state_dict()["experts"].clone()
    optimiser = Optimiser({0: ours}, 3e-2, steps=6, warmup=3, schedule="linear", defer=defer)
    adam = torch.optim.AdamW(plain.parameters(), weight_decay=0.0)
    for step in range(6):
        x, y = torch.randn(17, D, dtype=torch.float64), torch.randn(17, O, dtype=torch.float64)
        for layer in (ours, plain):
            (layer(x) - y).square().mean().backward()
        optimiser.step(step)
        gradient, rows = plain.experts.grad, plain.experts.detach()
        gradient -= (gradient * rows).sum(-1, keepdim=True) * rows
        adam.param_groups[0]["lr"] = optimiser.rate(step)
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            normalise(plain.experts)
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-9), name
    assert torch.equal(ours.experts[3], start[3])  # never active: unchanged, bit for bit
    assert not torch.equal(ours.experts[2], start[2])


def test_moments_in_bfloat16_learn_nearly_as_well_in_half_the_memory():
    reached = {}
    for moments in ("fp32", "bf16"):
        torch.manual_seed(0)
        layer = MxD(D, 32, O, N, K)
        optimiser = Optimiser({0: layer}, 1e-2, steps=300, warmup=10, schedule="constant", moments=moments, seed=3)
        x = torch.randn(512, D)
        y = torch.tanh(x @ torch.randn(D, O))
        for step in range(300):
            loss = (layer(x) - y).square().mean()
            loss.backward()
            optimiser.step(step)
        reached[moments] = loss.item()
        bytes_each = {tensor.element_size() for pair in optimiser.moments.values() for tensor in pair}
        assert bytes_each == {4 if moments == "fp32" else 2}
    assert reached["bf16"] < 1.25 * reached["fp32"]


def test_the_second_moment_in_bfloat16_does_not_stall():
    """Its steps are a thousandth, a quarter of bfloat16's precision: rounding to nearest would stall it."""
    layer = MxD(D, 4, O, N, K)
    optimiser = Optimiser({0: layer}, 1e-9, steps=1, warmup=0, schedule="constant", moments="bf16")
    for step in range(3000):
        layer.output_bias.grad = torch.full((O,), 1.0)
        optimiser.step(step)
    expected = 1 - 0.999**3000
    assert optimiser.moments[layer.output_bias][1].float().mean().item() == pytest.approx(expected, rel=0.05)


def test_mixed_precision_keeps_weights_and_gradients_in_float32():
    torch.manual_seed(0)
    layer, x = MxD(32, 64, 32, 200, 8), torch.randn(64, 32)
    nn.init.normal_(layer.decoder.weight)
    exact = layer(x)
    exact.square().mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rough = layer(x)
    rough.square().mean().backward()
    assert (rough - exact).norm() / exact.norm() < 0.1  # bfloat16 ties may go to other experts
    for name, parameter in layer.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert (parameter.grad - gradients[name]).norm() / gradients[name].norm() < 0.1, name


def test_a_gradient_of_autograd_adds_to_the_one_stored_by_row():
    torch.manual_seed(0)
    layers = [MxD(D, 11, O, N, K).double() for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer, defer in zip(layers, (True, False), strict=True):
        nn.init.constant_(layer.decoder.weight, 0.3)
        optimiser = Optimiser({0: layer}, 1e-2, steps=2, warmup=1, schedule="constant", defer=defer)
        x = torch.linspace(-1, 1, 3 * D, dtype=torch.float64).view(3, D)
        (
            layer(x).square().sum() + layer.gate.weight.square().sum() + (layer.experts * layer.experts.detach().flip(0)).sum()
        ).backward()
        optimiser.step(0)
    for mine, theirs in zip(*(layer.parameters() for layer in layers), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)


@pytest.mark.parametrize("n", [1, 40, 2**16, 2**16 + 1, 300_000])
def test_the_order_of_experts_is_torchs_stable_sort(n):
    keys = torch.randint(0, n, (5000,), generator=torch.Generator().manual_seed(n))
    keys[:2] = n - 1
    assert torch.equal(reference.stable_order(keys, n), keys.argsort(stable=True))
    assert reference.stable_order(keys[:0], n).shape == (0,)

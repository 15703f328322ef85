"""Derivatives are matched along steps that depend on seed and step alone, by a loss that autograd confirms."""

import pytest
import torch
from comparisons import assert_the_same
from interruptions import interrupted_run
from small_runs import small_recipe

from mxd_convert import convert
from mxd_convert.base_model.capture import apply_mlp
from mxd_convert.layers import LayerSpec, new_layer, normalised_mse
from mxd_convert.training.derivatives import EVERY, STEP, derivative_loss, move
from mxd_convert.training.layer_step import forward_backward
from mxd_convert.training.stream import Activations
from mxd_convert.training.window import Window

CPU = torch.device("cpu")
KINDS = ("mxd", "transcoder", "skip_transcoder", "dense_twin", "random_gate")


def layer_of(kind: str, sparsity: str = "topk"):
    torch.manual_seed(3)
    hidden = 0 if "coder" in kind else 10
    gain = (0, 0) if kind == "dense_twin" else (24, 4)
    spec = LayerSpec(kind, 8, hidden, 6, *gain, "gelu", False, sparsity, skip=kind == "skip_transcoder")
    layer = new_layer(spec)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def batch():
    """Return inputs, outputs, which tokens count, and steps of a quarter of them, of an MLP with known derivatives."""
    torch.manual_seed(4)
    weight = torch.randn(6, 8)
    x_BI = torch.randn(32, 8)
    counted_B = torch.ones(32, dtype=torch.bool)
    counted_B[::5] = False
    rows_S = counted_B.nonzero().squeeze(1)[::EVERY]

    def mlp(inputs):
        return torch.tanh(inputs @ weight.T)

    moved = move(x_BI[rows_S], x_BI.flip(0)[rows_S], mlp(x_BI[rows_S]), rows_S, mlp)
    return x_BI, mlp(x_BI), counted_B, moved, mlp


def test_a_step_has_a_tenth_of_the_input_s_length_and_points_to_another_input():
    x_BI, y_BO, _, moved, mlp = batch()
    x_SI = x_BI[moved.rows_S]
    step_SI = moved.inputs_SI - x_SI
    assert torch.allclose(step_SI.norm(dim=-1), STEP * x_SI.norm(dim=-1), rtol=1e-4)
    towards_SI = x_BI.flip(0)[moved.rows_S] - x_SI
    assert torch.allclose(torch.cosine_similarity(step_SI, towards_SI), torch.ones(len(x_SI)), atol=1e-4)
    assert torch.allclose(moved.change_SO, mlp(moved.inputs_SI) - y_BO[moved.rows_S], atol=1e-6)


def test_the_loss_is_zero_where_all_changes_agree_whatever_the_outputs_are():
    _, y_BO, counted_B, moved, mlp = batch()
    output_BO = y_BO + 5.0  # off by a constant, which has no derivative
    loss = derivative_loss(output_BO, mlp(moved.inputs_SI) + 5.0, moved, y_BO, counted_B)
    assert loss < 1e-8
    assert derivative_loss(output_BO, output_BO[moved.rows_S], moved, y_BO, counted_B) > 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", ["topk", "l1"])
def test_gradients_equal_those_of_dense_autograd(kind, sparsity):
    if sparsity == "l1" and kind != "mxd":
        kind, sparsity = "mxd", "l1"
    layer = layer_of(kind, sparsity)
    x_BI, y_BO, counted_B, moved, _ = batch()
    window = Window.empty(layer, CPU)
    loss = forward_backward(layer, x_BI, y_BO, counted_B, "fp32", 0.0, None, window, 0.7, moved)
    made = {name: parameter.grad.clone() for name, parameter in layer.named_parameters() if parameter.grad is not None}
    layer.zero_grad()
    exact = layer.double()  # two separate forwards in float64
    inputs, moved_SI, y = x_BI.double(), moved.inputs_SI.double(), y_BO.double()
    output_BO = exact(inputs)
    error_SO = (exact(moved_SI) - output_BO[moved.rows_S] - moved.change_SO.double()) / STEP
    weight_S = 1 / y[moved.rows_S].norm(dim=-1)
    term = EVERY / counted_B.sum() * (error_SO.square().mean(-1) * weight_S).sum()
    own = normalised_mse(output_BO, y, counted_B)
    (own + 0.7 * term).backward()
    assert loss.item() == pytest.approx(own.item(), rel=1e-5)
    expected = {name: parameter.grad for name, parameter in exact.named_parameters() if parameter.grad is not None}
    assert made.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(made[name].double(), gradient, rtol=1e-3, atol=1e-6), name
    assert int(window.tokens) == int(counted_B.sum())  # moved inputs are not in the log


def test_partners_are_counted_tokens_of_the_same_block(source):
    made = source()
    stream = Activations(made, CPU)
    for step in range(4):
        batch, moved = stream.batch(step), stream.moved(step)[2]
        assert 0 < len(moved.rows_S) < len(batch.counted_B) / 2
        assert batch.counted_B[moved.rows_S].all()
        x_SI = batch.activations[2][0][moved.rows_S]
        assert torch.allclose((moved.inputs_SI - x_SI).norm(dim=-1), STEP * x_SI.norm(dim=-1), rtol=1e-3)
        site = made.sites[1]
        outputs = [apply_mlp(made.base, site, inputs.unsqueeze(0)).squeeze(0) for inputs in (moved.inputs_SI, x_SI)]
        assert torch.allclose(moved.change_SO, outputs[0] - outputs[1], atol=1e-5)


def rows(moved):
    joined = torch.cat([moved.inputs_SI, moved.change_SO], 1)
    return joined[joined[:, 0].argsort()]


def test_steps_depend_neither_on_the_number_of_processes_nor_on_where_a_run_resumes(source):
    whole, late = Activations(source(), CPU), Activations(source(), CPU)
    parts = [Activations(source(process=(index, 2)), CPU) for index in range(2)]
    for step in range(8):
        expected = whole.moved(step)
        together = [part.moved(step) for part in parts]
        for index in (0, 2):
            joined = torch.cat([torch.cat([one[index].inputs_SI, one[index].change_SO], 1) for one in together])
            assert torch.allclose(joined[joined[:, 0].argsort()], rows(expected[index]), atol=1e-5)
        if step >= 4:
            assert torch.equal(rows(late.moved(step)[0]), rows(expected[0]))


def jacobian_errors(report):
    return [layer["jacobian"]["data"]["relative_squared_error"] for layer in report["fidelity"]["layers"].values()]


def test_a_weight_lowers_the_error_of_the_derivatives(models, text, tmp_path):
    errors = {}
    for weight in (0.0, 1.0):
        settings = {"train": {"jacobian": weight, "init": "paper", "lr": 1e-2, "joint": 0.0}, "data": {"tokens": 32_768}}
        report = convert(small_recipe(models["llama"], text, tmp_path / f"{weight}", **settings), quiet=True).report
        errors[weight] = sum(jacobian_errors(report))
    assert errors[1.0] < 0.9 * errors[0.0]


def test_an_interrupted_run_with_matching_ends_like_one_that_was_not(models, text, tmp_path):
    settings = {"train": {"jacobian": 0.5, "checkpoint_every": 4}, "data": {"tokens": 8192}}
    whole = convert(small_recipe(models["llama"], text, tmp_path / "whole", **settings), quiet=True)
    recipe = small_recipe(models["llama"], text, tmp_path / "stopped", **settings)
    interrupted_run(recipe, 9)
    resumed = convert(recipe, quiet=True)
    assert_the_same(whole, resumed)

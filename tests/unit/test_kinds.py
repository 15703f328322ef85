"""The layers compared with an MxD: their formulas, their training in the same engine, and their reports."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from random_layers import KINDS, I, K, N, O, shape_of, small_layer
from safetensors.torch import load_file
from small_runs import small_recipe
from transformers import AutoModelForCausalLM

import mxd_convert
from mxd_convert import convert
from mxd_convert.checkpoint.read import load_checkpoint
from mxd_convert.layers import new_layer, normalised_mse
from mxd_convert.modeling import configuration_mxd, layers_mxd
from mxd_convert.modeling.layers_mxd import build_layer
from mxd_convert.recipe import kinds
from mxd_convert.training.optimiser import Optimiser
from mxd_convert.training.stage import Stage


def definition(layer, x):
    """Return the output of a kind from its formula."""
    y = torch.ones(len(x), O, dtype=x.dtype)
    if layer.kind != "dense_twin":
        a = torch.relu(x @ layer.gate.weight.T + layer.gate.bias)
        if layer.sparsity == "topk":
            a = a * (a >= a.sort(descending=True).values[:, K - 1 : K])
        y = a @ layer.experts
        if layer.shared_expert is not None:
            y = y + layer.shared_expert
    if "coder" not in layer.kind:
        z = torch.nn.functional.gelu(x @ layer.encoder.weight.T + layer.encoder.bias)
        u = z @ layer.decoder.weight.T
        y = y + u if layer.kind == "dense_assisted" else y * u
    return y + layer.output_bias + (x @ layer.skip.weight.T if layer.skip is not None else 0)


@pytest.mark.parametrize(
    ("kind", "settings"), [(kind, {}) for kind in KINDS] + [(kind, {"sparsity": "l1"}) for kind in KINDS if kind != "dense_twin"]
)
def test_every_kind_equals_its_formula_in_training_and_in_the_checkpoint(kind, settings):
    layer, x = small_layer(kind, **settings), torch.randn(6, I, dtype=torch.float64, requires_grad=True)
    assert (layer(x) - definition(layer, x)).abs().max() < 1e-10
    shipped = build_layer(layer.entry()).double()
    shipped.load_state_dict(layer.state_dict())
    assert (shipped(x) - definition(layer, x)).abs().max() < 1e-10
    assert shipped.kind == kind
    assert shipped.entry() == layer.entry()
    inputs = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    ours = torch.autograd.grad(layer(x).square().sum(), inputs)
    dense = torch.autograd.grad(definition(layer, x).square().sum(), inputs)
    for mine, expected in zip(ours, dense, strict=True):
        assert (mine - expected).abs().max() <= 1e-10 * expected.abs().max().clamp_min(1)


@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_exactly_the_trainable_tensors(kind):
    torch.manual_seed(0)
    layer = new_layer(shape_of(kind))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    optimiser = Optimiser({0: layer}, 1e-2, steps=8, warmup=1, schedule="constant")
    x, y = torch.randn(64, I), torch.randn(64, O)
    for step in range(8):
        normalised_mse(layer(x), y).backward()
        optimiser.step(step)
    changed = {name for name, tensor in layer.state_dict().items() if not tensor.equal(before[name])}
    still = {"gate.weight", "gate.bias"} if kind == "random_gate" else set()
    assert changed == set(before) - still
    if kind in ("mxd", "random_gate"):
        assert torch.allclose(layer.experts.norm(dim=-1), torch.ones(N), atol=1e-5)


@pytest.fixture(scope="module")
def finished(models, text, tmp_path_factory):
    """Convert one recipe with each kind of layer."""
    folder = tmp_path_factory.mktemp("kinds")
    made = {}
    for kind in KINDS:
        settings = {"layers": [0, 2], "layer": {"kind": kind, "k": 4, "experts": "auto", "expansion": 8}}
        made[kind] = convert(small_recipe(models["llama"], text, folder / kind, **settings), quiet=True)
    return made


SHARES = ("gate_share", "hidden_share", "product_share", "expert_share")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_passes_through_the_same_engine(finished, mxd, kind):
    """The stages are plan, training, surgery, a checkpoint that verifies with and without the package, report and card."""
    result = finished[kind]
    entry = json.loads((result.output / "config.json").read_text())["mxd"]["layers"]["2"]
    assert entry["kind"] == kind
    status, out, _ = mxd("verify", result.output)
    assert status == 0, out
    report = result.report
    layer, reliance = report["fidelity"]["layers"]["2"], report["reliance"]["layers"]["2"]
    assert layer["fvu"] < 1.5
    assert kind in (result.output / "recipe.yaml").read_text()
    if kind == "dense_twin":
        assert (layer["l0"], layer["dead_fraction"], reliance["identity_share"], reliance["routing_necessity"]) == (None,) * 4
        assert [reliance[name] for name in SHARES] == [0.0, 1.0, 0.0, 0.0]
        assert report["reliance"]["verdict"] == "not applicable"
        assert "not measured" in (result.output / "README.md").read_text()
    else:
        assert 0 < layer["l0"] <= 4
        assert reliance["routing_necessity"] is not None
    if kind == "transcoder":
        assert [reliance[name] for name in SHARES] == [1.0, 0.0, 0.0, 1.0]
    if kind in ("skip_transcoder", "dense_assisted"):
        assert [reliance[name] for name in SHARES[:3]] == [1.0, 0.0, 0.0]
        assert 0 < reliance["expert_share"] < 1
    assert all(0 <= reliance[name] <= 1 for name in SHARES)
    assert layer["jacobian"]["data"]["relative_squared_error"] > 0
    model = AutoModelForCausalLM.from_pretrained(result.output)
    assert {type(module) for module in model.mxd_layers().values()} == {layers_mxd.LAYERS[kind]}


class Sum(layers_mxd.MxD):
    """Add gain and linear factor instead of multiplying them."""

    kind = "sum"

    def combine(self, x, coefficients):
        return self.gain_of(coefficients) + self.linear(x) + self.output_bias


def test_a_new_kind_needs_a_class_a_row_and_a_config_entry(models, text, tmp_path, monkeypatch):
    monkeypatch.setitem(layers_mxd.LAYERS, "sum", Sum)
    monkeypatch.setitem(kinds.KINDS, "sum", replace(kinds.KINDS["mxd"], name="sum", title="sum of both"))
    monkeypatch.setitem(configuration_mxd.KINDS, "sum", configuration_mxd.KINDS["mxd"])
    recipe = small_recipe(models["gpt2"], text, tmp_path / "out", layers=[0], data={"tokens": 8192})
    recipe["layer"] |= {"kind": "sum", "sparsity": "topk", "experts": "auto", "expansion": 8}
    result = mxd_convert.convert(recipe, quiet=True)
    assert "with Mixture-of-Decoders layers" in (result.output / "README.md").read_text()
    layer = load_checkpoint(result.output).mxd_layers()[0]
    assert type(layer) is Sum
    x = torch.randn(3, layer.d_in)
    torch.testing.assert_close(layer(x) - layer.output_bias, layer.gain_of(layer.encode(x)) + layer.linear(x))


def test_the_three_tables_of_kinds_agree():
    assert kinds.KINDS.keys() == layers_mxd.LAYERS.keys() == configuration_mxd.KINDS.keys()
    for name, (sizes, _) in configuration_mxd.KINDS.items():
        assert kinds.KINDS[name].has_experts == ("n_experts" in sizes)
        assert kinds.KINDS[name].has_linear == ("d_hidden" in sizes)


def test_formulas_name_the_parts_of_each_kind():
    assert {name: kind.formula(shared_expert=False, skip=False) for name, kind in kinds.KINDS.items()} == {
        "mxd": "y = (C^T a) * (D^T z) + b",
        "random_gate": "y = (C^T a) * (D^T z) + b",
        "transcoder": "y = C^T a + b",
        "skip_transcoder": "y = C^T a + S x + b",
        "dense_assisted": "y = C^T a + D^T z + b",
        "dense_twin": "y = D^T z + b",
    }
    assert kinds.KINDS["mxd"].formula(shared_expert=True, skip=True) == "y = (c_0 + C^T a) * (D^T z) + S x + b"


def test_k_is_stored_once():
    layer = small_layer("mxd")
    assert (layer.k, layer.expert_acts.k) == (K, K)
    layer.k = 2
    assert layer.expert_acts.k == 2
    assert layer.encode(torch.randn(5, I, dtype=torch.float64))[0].shape == (5, 2)
    layer.expert_acts.k = 3
    assert (layer.k, layer.entry()["k"]) == (3, 3)
    with pytest.raises(ValueError, match="k is 0; expected a number from 1"):
        layer.k = 0


def test_a_changed_k_is_saved_with_the_model(converted, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(converted["gpt2"])
    for layer in model.mxd_layers().values():
        layer.k = 1
    model.save_pretrained(tmp_path)
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path), torch.arange(1, 9)[None]
    assert {layer.k for layer in again.mxd_layers().values()} == {1}
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_all_kinds_share_their_initialisation_and_their_text(finished, models, text, tmp_path):
    """A random gate is the initial gate of the MxD; the dense twin sees the same text and tokens."""
    plan = mxd_convert.make_plan(
        mxd_convert.load_recipe(
            yaml.safe_load((finished["mxd"].output / "recipe.yaml").read_text())
            | {
                "base": {"model": str(models["llama"])},
                "data": {**small_recipe(models["llama"], text, tmp_path)["data"]},
                "output": {"dir": str(tmp_path / "out")},
            }
        )
    )
    start = new_layer_at(plan, 2).gate.weight
    frozen = load_file(finished["random_gate"].output / "model.safetensors")["model.layers.2.mlp.gate.weight"]
    trained = load_file(finished["mxd"].output / "model.safetensors")["model.layers.2.mlp.gate.weight"]
    assert torch.equal(frozen, start)
    assert not torch.equal(trained, start)
    texts = {json.dumps({**result.report["data"]["train"]}) for result in finished.values()}
    assert len(texts) == 1


def new_layer_at(plan, index):
    from mxd_convert.training.stage import make_layer

    return make_layer(plan.shapes[index], plan.recipe.train.seed, index)


def test_plan_shows_the_kind(mxd, recipe):
    for kind, parts in (("transcoder", ("32 > 32", "transcoder")), ("dense_twin", ("32 > 128 > 32", "dense_twin"))):
        status, out, _ = mxd("plan", recipe(layer={"kind": kind}))
        assert status == 0
        for part in parts:
            assert part in out


def test_the_dense_twin_of_a_run_equals_one_trained_alone(finished, models, text, tmp_path, monkeypatch):
    """The run is interrupted while it trains the twin."""
    settings = {
        "layers": [0, 2],
        "layer": {"k": 4, "experts": "auto", "expansion": 8},
        "train": {"twin": True},
    }
    recipe = small_recipe(models["llama"], text, tmp_path / "out", **settings)
    step = Stage._step

    def interrupted(self, number, interrupt):
        step(self, number, interrupt)
        interrupt.requested = self.recipe.layer.kind == "dense_twin" and number == 6

    with monkeypatch.context() as patched:
        patched.setattr(Stage, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(recipe, quiet=True)
    report = convert(recipe, quiet=True).report
    alone = finished["dense_twin"].report["fidelity"]
    twin = report["reliance"]["dense_twin"]
    assert twin["ce"] == alone["ce_converted"]
    assert twin["delta_ce"] == pytest.approx(alone["delta_ce"])
    assert twin["gap"] == pytest.approx(report["fidelity"]["ce_converted"] - twin["ce"])
    assert "the dense twin (standard error" in report["reliance"]["sentence"]
    assert report["reliance"]["sentence"] in (tmp_path / "out" / "README.md").read_text()
    trained, plain = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", finished["mxd"].output))
    assert all(torch.equal(trained[name], plain[name]) for name in plain)
    assert finished["mxd"].report["reliance"]["dense_twin"] is None


def test_a_transcoder_refuses_a_dense_twin(recipe, refused):
    refused("plan", recipe(layer={"kind": "transcoder"}, train={"twin": True}), words=("train.twin", "layer.kind: mxd"))


def test_plan_includes_the_dense_twin(planned_with):
    plain, twin = planned_with({}), planned_with({"twin": True})
    assert twin["flops_per_token"] > plain["flops_per_token"]
    assert twin["disk_bytes"] > plain["disk_bytes"]
    assert twin["memory_bytes"]["evaluation"] > plain["memory_bytes"]["evaluation"]


@pytest.fixture
def planned_with(mxd, recipe):
    return lambda train: json.loads(mxd("plan", recipe(train=train), "--json")[1])

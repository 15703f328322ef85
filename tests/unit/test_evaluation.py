"""Figures equal an independent calculation, and reliance detects layers whose experts do nothing."""

import numpy as np
import pytest
import torch
from project import QUICKSTART

from mxd_convert.base_model import swap
from mxd_convert.base_model.families import find_sites
from mxd_convert.base_model.load import load_base, load_tokenizer
from mxd_convert.data.blocks import prepare
from mxd_convert.evaluation import layer_figures as layerwise
from mxd_convert.evaluation.fidelity import evaluate_models
from mxd_convert.evaluation.layer_figures import LayerFigures
from mxd_convert.evaluation.verdict import CARRY, NOT_APPLICABLE, NOT_SHOWN, sentence, verdict
from mxd_convert.layers import MxD
from mxd_convert.recipe.schema import Base, Data, EvalText, Text


def random_layer(**settings) -> MxD:
    torch.manual_seed(0)
    layer = MxD(6, 8, 5, 20, 3, **settings)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def figures_of(layer, x, y, counted=None):
    figures = LayerFigures(layer)
    counted = torch.ones(len(x), dtype=torch.bool) if counted is None else counted
    for start in range(0, len(x), 37):  # streamed in uneven pieces
        piece = slice(start, start + 37)
        figures.add(x[piece], y[piece], counted[piece])
    return figures


def least_squares_residual(features: list[np.ndarray], target: np.ndarray) -> float:
    design = np.stack([*features, np.ones_like(target)], -1)
    solution, *_ = np.linalg.lstsq(design, target, rcond=None)
    return float(((target - design @ solution) ** 2).sum())


@pytest.mark.parametrize("sparsity", ["topk", "l1"])
@torch.no_grad()
def test_shares_equal_least_squares_fits(sparsity):
    layer, x, y = random_layer(sparsity=sparsity), torch.randn(400, 6), torch.randn(400, 5)
    coefficients = layer.encode(x)
    s = (coefficients if sparsity == "l1" else coefficients[0]).sum(-1).double().numpy()
    u = layer.decoder(layer.hidden(x)).double().numpy()
    product = layer.gain_of(coefficients).double().numpy() * u
    total = ((product - product.mean(0)) ** 2).sum()
    gate = sum(least_squares_residual([u[:, o]], product[:, o]) for o in range(5)) / total
    identity = sum(least_squares_residual([u[:, o], s * u[:, o]], product[:, o]) for o in range(5)) / total
    shares = figures_of(layer, x, y).shares()
    assert shares["gate_share"] == pytest.approx(gate, rel=1e-6)
    assert shares["identity_share"] == pytest.approx(identity, rel=1e-6)
    assert 0.1 < identity < gate < 1


@torch.no_grad()
def test_shares_are_invariant_to_the_scale_of_c_and_d():
    layer, x, y = random_layer(), torch.randn(300, 6), torch.randn(300, 5)
    before = figures_of(layer, x, y).shares()
    layer.experts.mul_(1000)
    layer.decoder.weight.div_(1000)
    after = figures_of(layer, x, y).shares()
    assert after == pytest.approx(before, rel=1e-4)


@torch.no_grad()
def test_a_constant_gain_has_no_gate_share():
    layer, x, y = random_layer(), torch.randn(300, 6), torch.randn(300, 5)
    layer.gate.weight.zero_()
    layer.gate.bias.fill_(1.0)
    layer.experts[:] = layer.experts[0]
    shares = figures_of(layer, x, y).shares()
    assert shares["gate_share"] < 1e-6
    assert shares["identity_share"] < 1e-6


@torch.no_grad()
def test_experts_that_only_scale_the_output_have_no_identity_share():
    layer, x, y = random_layer(), torch.randn(300, 6), torch.randn(300, 5)
    layer.experts[:] = layer.experts[0]  # which experts fire does not matter, only how strongly
    shares = figures_of(layer, x, y).shares()
    assert shares["gate_share"] > 0.05
    assert shares["identity_share"] < 1e-6


@torch.no_grad()
def test_the_dimension_is_the_participation_ratio():
    layer, x, y = random_layer(), torch.randn(20_000, 6), torch.randn(20_000, 5) * torch.tensor([3.0, 1.0, 1.0, 0.0, 0.0]) + 7
    figures = LayerFigures(layer)
    for piece in torch.arange(20_000).split(1000):
        figures.add(x[piece], y[piece], torch.ones(len(piece), dtype=torch.bool))
    gain = (layer.gain_of(layer.encode(x)) * layer.linear(x).square().mean(0).sqrt()).double()
    for rows, value in ((gain, "gain_dimensions"), (y.double(), "output_dimensions")):
        spectrum = torch.linalg.eigvalsh(torch.cov(rows.T))
        assert figures.shares()[value] == pytest.approx((spectrum.sum() ** 2 / spectrum.square().sum()).item(), rel=0.05)
    assert figures.shares()["output_dimensions"] == pytest.approx((9 + 1 + 1) ** 2 / (81 + 1 + 1), rel=0.05)


@torch.no_grad()
def test_a_sign_cancelled_by_the_linear_factor_has_one_dimension():
    """The experts give the sign of x in a direction, and the linear factor the output times that sign: only the dimension shows it."""
    layer, x = random_layer(), torch.randn(4000, 6)
    layer.gate.weight.zero_()
    layer.gate.weight[:2, 0] = torch.tensor([1.0, -1.0])
    layer.gate.bias.fill_(-100.0)
    layer.gate.bias[:2] = 10.0  # both sides' gates are open; which one is stronger is the sign
    layer.experts[0], layer.experts[1] = 1.0, -1.0
    shares = figures_of(layer, x, torch.randn(4000, 5)).shares()
    assert shares["gate_share"] > 0.5
    assert shares["gain_dimensions"] == pytest.approx(1.0, abs=0.1)
    assert shares["output_dimensions"] > 4.5


@torch.no_grad()
def test_fvu_l0_and_dead_experts_use_counted_tokens_only(monkeypatch):
    layer, x = random_layer(), torch.randn(300, 6)
    y = layer(x) + 0.3 * torch.randn(300, 5)
    counted = torch.rand(300) < 0.7
    report = figures_of(layer, x, y, counted).report()

    def fvu(mask):
        target = y[mask].double()
        return ((layer(x[mask]).double() - target).square().sum() / (target - target.mean(0)).square().sum()).item()

    assert report["fvu"] == pytest.approx(fvu(counted), rel=1e-4)
    assert report["fvu_with_bos"] == pytest.approx(fvu(torch.ones(300, dtype=torch.bool)), rel=1e-4)
    values, indices = layer.encode(x[counted])
    assert report["l0"] == pytest.approx((values > 0).sum().item() / counted.sum().item())
    assert report["dead_fraction"] == pytest.approx(1 - len(indices[values > 0].unique()) / 20)
    rates = torch.stack([((indices == n) & (values > 0)).any(-1).double().mean() for n in range(20)])
    for threshold in (0.1, 0.3, 0.5):
        monkeypatch.setattr(layerwise, "ALWAYS_ON", threshold)
        assert figures_of(layer, x, y, counted).report()["always_on"] == int((rates > threshold).sum())
    assert 0 < int((rates > 0.1).sum()) < 20


@pytest.fixture(scope="module")
def measured(models, text, tmp_path_factory):
    """Return a Llama with a constant-gain layer 0 and a random layer 2, and its figures."""
    base = load_base(Base(model=str(models["llama"])))
    sites = find_sites(base, base.config, [0, 2])
    layers = {site.index: MxD(site.d_in, site.d_hidden, site.d_out, 12, 3, site.activation, site.glu) for site in sites}
    for layer in layers.values():
        torch.nn.init.normal_(layer.decoder.weight, std=0.5)
    converted = swap.insert_layers(base, layers)
    settings = Data(train=Text(path=str(text)), eval=EvalText(tokens=1000), context=20, tokens=1000)
    _, blocks = prepare(settings, load_tokenizer(str(QUICKSTART)), tmp_path_factory.mktemp("blocks"))
    return base, converted, sites, blocks, evaluate_models(base, converted, sites, blocks, quiet=True)


@torch.no_grad()
def test_cross_entropies_equal_the_loss_of_transformers(measured):
    base, converted, _, blocks, figures = measured
    ids = blocks.take(slice(None))
    fidelity = figures["fidelity"]
    assert fidelity["tokens"] == ids[:, 1:].numel()
    assert fidelity["ce_base"] == pytest.approx(base(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
    assert fidelity["ce_converted"] == pytest.approx(converted(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
    assert fidelity["delta_ce"] == pytest.approx(fidelity["ce_converted"] - fidelity["ce_base"], abs=1e-9)
    ours, theirs = (model(input_ids=ids).logits[:, :-1].log_softmax(-1) for model in (converted, base))
    kl = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum") / ids[:, 1:].numel()
    assert fidelity["kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert fidelity["top1_agreement"] == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(), abs=1e-6)


@torch.no_grad()
def test_ablations_and_single_layers_equal_explicit_forwards(measured):
    base, converted, sites, blocks, figures = measured
    ids = blocks.take(slice(None))
    fidelity = figures["fidelity"]

    def loss_with(modules):
        handles = [
            base.get_submodule(path).register_forward_hook(lambda m, a, o, module=module: module(a[0]))
            for path, module in modules.items()
        ]
        value = base(input_ids=ids, labels=ids).loss.item()
        for handle in handles:
            handle.remove()
        return value

    zeros = {site.path: torch.zeros_like for site in sites}
    assert fidelity["ce_zero_ablation"] == pytest.approx(loss_with(zeros), rel=1e-5)
    rises = {}
    for site in sites:
        layer = converted.mxd_layers()[site.index]
        alone, zero = loss_with({site.path: layer}), loss_with({site.path: torch.zeros_like})
        entry = fidelity["layers"][str(site.index)]
        rises[site.index] = alone - fidelity["ce_base"]
        assert entry["delta_ce"] == pytest.approx(rises[site.index], abs=1e-5)
        assert entry["recovered_zero"] == pytest.approx(1 - rises[site.index] / (zero - fidelity["ce_base"]), rel=1e-2)
    total = sum(rises.values())
    assert fidelity["compounding"] == (pytest.approx(fidelity["delta_ce"] / total, rel=1e-2) if total > 0 else None)


def test_the_report_has_the_fields_of_the_contract(measured):
    fidelity, reliance = measured[-1]["fidelity"], measured[-1]["reliance"]
    assert {
        "tokens",
        "ce_base",
        "ce_converted",
        "delta_ce",
        "ce_zero_ablation",
        "ce_mean_ablation",
        "kl",
        "top1_agreement",
        "compounding",
    } <= set(fidelity)
    for layer in fidelity["layers"].values():
        alone = {"fvu", "fvu_with_bos", "delta_ce", "recovered_zero", "recovered_mean", "l0", "dead_fraction", "always_on"}
        assert set(layer) == alone | {"fvu_in_place_local", "fvu_in_place_teacher"}
    for layer in reliance["layers"].values():
        assert set(layer) == {"gate_share", "identity_share", "gain_dimensions", "output_dimensions", "routing_necessity"}
    assert set(fidelity["layers"]) == set(reliance["layers"]) == {"0", "2"}


def test_an_evaluation_leaves_the_models_unchanged(measured):
    base, converted, sites, blocks, figures = measured
    again = evaluate_models(base, converted, sites, blocks, quiet=True)
    assert again == figures


def test_the_verdict_follows_the_figures():
    good = {"gate_share": 0.9, "identity_share": 0.8, "routing_necessity": 1.4}
    assert verdict({"0": good, "1": good}) == CARRY == "experts carry the layer"
    for name in good:
        assert verdict({"0": good, "1": {**good, name: 0.2}}) == NOT_SHOWN == "experts not shown to matter"
    assert verdict({"0": dict.fromkeys(good)}) == NOT_APPLICABLE == "not applicable"


def test_a_gain_of_few_directions_is_reported():
    good = {
        "gate_share": 0.9,
        "identity_share": 0.8,
        "routing_necessity": 1.4,
        "gain_dimensions": 25.0,
        "output_dimensions": 30.0,
    }
    assert "directions" not in sentence({"0": good}, 0.3, None)
    assert "directions" not in sentence({"0": {**good, "gain_dimensions": None, "output_dimensions": 30.0}}, 0.3, None)
    said = sentence({"0": good, "4": {**good, "gain_dimensions": 1.2}}, 0.3, None)
    assert ", but the gain of layer 4 varies in only 1.2 directions, the MLP's output in 30.0; " in said


def test_the_sentence_states_the_reasons_of_the_verdict():
    good = {"gate_share": 0.9, "identity_share": 0.8, "routing_necessity": 1.4}
    weak = {**good, "identity_share": 0.31}
    said = sentence({"0": good, "3": {**good, "gate_share": 0.7}}, 0.3, 0.5)
    assert said.startswith(
        "experts carry the layer: at least 0.70 of the output's variance is not explained by a constant gain (layer 3), 0.80 "
    )
    assert said.endswith(
        "cross-entropy rises by 0.300 nats per token, and by 0.500 in the dense twin: the experts save 0.200 nats per token over a constant gain"
    )
    said = sentence({"0": good, "3": weak}, 0.5, None)
    assert said == (
        "experts not shown to matter: only 0.31 of the output's variance depends on which experts fire (layer 3); the dense twin was not trained"
    )
    assert "the experts add 0.100 nats per token over a constant gain" in sentence({"0": good}, 0.5, 0.4)
    assert sentence({"0": good}, 0.5, 0.5001).endswith("the experts are as faithful as a constant gain")
    assert sentence({"0": dict.fromkeys(good)}, 0.5, None) == "not applicable: these layers have no experts"

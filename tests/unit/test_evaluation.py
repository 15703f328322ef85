"""Figures equal an independent calculation, and reliance detects layers whose experts do nothing."""

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
from mxd_convert.layers import MxD
from mxd_convert.recipe.schema import Base
from mxd_convert.recipe.texts import Data, EvalText, Text


def random_layer(**settings) -> MxD:
    torch.manual_seed(0)
    layer = MxD(6, 8, 5, 20, 3, **settings)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def figures_of(layer, x, y, counted=None):
    figures = LayerFigures(layer, 1)
    counted = torch.ones(len(x), dtype=torch.bool) if counted is None else counted
    for start in range(0, len(x), 37):  # streamed in uneven pieces
        piece = slice(start, start + 37)
        figures.add(x[piece], y[piece], counted[piece], torch.zeros(len(x[piece]), dtype=torch.long))
    return figures


@torch.no_grad()
def test_the_dimension_is_the_participation_ratio():
    layer, x, y = random_layer(), torch.randn(20_000, 6), torch.randn(20_000, 5) * torch.tensor([3.0, 1.0, 1.0, 0.0, 0.0]) + 7
    figures = LayerFigures(layer, 1)
    for piece in torch.arange(20_000).split(1000):
        figures.add(x[piece], y[piece], torch.ones(len(piece), dtype=torch.bool), torch.zeros_like(piece))
    gain = (layer.gain_of(layer.encode(x)) * layer.linear(x).square().mean(0).sqrt()).double()
    for rows, value in ((gain, "gain_dimensions"), (y.double(), "output_dimensions")):
        spectrum = torch.linalg.eigvalsh(torch.cov(rows.T))
        assert figures.reliance()[value] == pytest.approx((spectrum.sum() ** 2 / spectrum.square().sum()).item(), rel=0.05)
    assert figures.reliance()["output_dimensions"] == pytest.approx((9 + 1 + 1) ** 2 / (81 + 1 + 1), rel=0.05)


@torch.no_grad()
def test_a_sign_cancelled_by_the_linear_factor_has_one_dimension():
    """The experts give the sign of x in a direction, and the linear factor the output times that sign: only the dimension shows it."""
    layer, x = random_layer(), torch.randn(4000, 6)
    layer.gate.weight.zero_()
    layer.gate.weight[:2, 0] = torch.tensor([1.0, -1.0])
    layer.gate.bias.fill_(-100.0)
    layer.gate.bias[:2] = 10.0  # both sides' gates are open; which one is stronger is the sign
    layer.experts[0], layer.experts[1] = 1.0, -1.0
    shares = figures_of(layer, x, torch.randn(4000, 5)).reliance()
    assert shares["gate_share"] > 0.5
    assert shares["gain_dimensions"] == pytest.approx(1.0, abs=0.1)
    assert shares["output_dimensions"] > 4.5


@torch.no_grad()
def test_fvu_l0_and_dead_experts_use_counted_tokens_only(monkeypatch):
    layer, x = random_layer(), torch.randn(300, 6)
    y = layer(x) + 0.3 * torch.randn(300, 5)
    counted = torch.rand(300) < 0.7
    report = figures_of(layer, x, y, counted).fidelity()

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
        assert figures_of(layer, x, y, counted).fidelity()["always_on"] == int((rates > threshold).sum())
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
    return base, converted, sites, blocks, evaluate_models(base, converted, sites, blocks, quiet=True, variant_share=1.0)


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


def with_errors(names):
    return set(names) | {f"{name}_se" for name in names}


def test_the_report_has_the_fields_of_the_contract(measured):
    fidelity, reliance = measured[-1]["fidelity"], measured[-1]["reliance"]
    figures = {"ce_base", "ce_converted", "delta_ce", "ce_zero_ablation", "ce_mean_ablation", "kl", "top1_agreement"}
    figures |= {"recovered_zero", "recovered_mean", "compounding"}
    assert set(fidelity) == with_errors(figures) | {"tokens", "documents", "token_kinds", "variants", "by_document", "layers"}
    fvus = {"fvu", "fvu_with_bos", "fvu_in_place_local", "fvu_in_place_teacher"}
    for layer in fidelity["layers"].values():
        figures = fvus | {"delta_ce", "recovered_zero", "recovered_mean", "l0"}
        assert set(layer) == with_errors(figures) | {"dead_fraction", "always_on", "jacobian", "token_kinds"}
        for direction in ("data", "random"):
            assert set(layer["jacobian"][direction]) == with_errors({"cosine", "relative_squared_error"})
    shares = {"gate_share", "hidden_share", "product_share", "expert_share", "identity_share"}
    for layer in reliance["layers"].values():
        others = {"gain_dimensions", "output_dimensions", "experts_50", "experts_90", "effective_experts"}
        assert set(layer) == shares | others | with_errors({"routing_necessity"}) | {"verdict"}
    assert set(fidelity["layers"]) == set(reliance["layers"]) == {"0", "2"}


def test_an_evaluation_leaves_the_models_unchanged(measured):
    base, converted, sites, blocks, figures = measured
    again = evaluate_models(base, converted, sites, blocks, quiet=True, variant_share=1.0)
    assert {**again, "cost": None} == {**figures, "cost": None}

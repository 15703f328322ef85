"""The evaluation of a whole model: equal to whole forwards per variant, with standard errors that resampling confirms."""

import math

import numpy as np
import pytest
import torch
from project import QUICKSTART
from whole_passes import evaluate as by_whole_passes

from mxd_convert.base_model import swap
from mxd_convert.base_model.families import find_sites
from mxd_convert.base_model.load import load_base, load_tokenizer
from mxd_convert.data.blocks import prepare
from mxd_convert.evaluation import fidelity, suffix
from mxd_convert.evaluation.by_document import Sums, ratio
from mxd_convert.evaluation.fidelity import evaluate_models
from mxd_convert.evaluation.suffix import Prefix
from mxd_convert.evaluation.variance import Variance
from mxd_convert.layers import LayerSpec, new_layer
from mxd_convert.recipe.schema import Base
from mxd_convert.recipe.texts import Data, EvalText, Text

KINDS = ["mxd", "transcoder", "skip_transcoder", "dense_twin"]


@pytest.fixture(scope="module")
def evaluated(models, text, tmp_path_factory):
    """Makes a base in float64, a converted model with random layers 0 and 2, its sites, and blocks of held-out text."""
    settings = Data(train=Text(path=str(text)), eval=EvalText(tokens=1000), context=20, tokens=1000)
    _, blocks = prepare(settings, load_tokenizer(str(QUICKSTART)), tmp_path_factory.mktemp("blocks"))

    def make(family, kind="mxd", indices=(0, 2)):
        base = load_base(Base(model=str(models[family]))).double()
        sites = find_sites(base, base.config, list(indices))
        torch.manual_seed(0)
        layers = {}
        for site in sites:
            hidden = 0 if "coder" in kind else site.d_hidden
            sizes = (0, 0) if kind == "dense_twin" else (12, 3)
            spec = LayerSpec(
                kind,
                site.d_in,
                hidden,
                site.d_out,
                *sizes,
                site.activation,
                site.glu and bool(hidden),
                skip=kind == "skip_transcoder",
            )
            layers[site.index] = new_layer(spec, "paper").double()
            for parameter in layers[site.index].parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        return base, swap.insert_layers(base, layers), sites, blocks

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_figures_equal_those_of_whole_forwards(evaluated, family, kind):
    base, converted, sites, blocks = evaluated(family, kind)
    expected = by_whole_passes(base, converted, {site.index: site.path for site in sites}, blocks, rows=8)
    found = evaluate_models(base, converted, sites, blocks, mask="none", quiet=True, variant_share=1.0)["fidelity"]
    close = {"rel": 1e-6, "abs": 1e-9}
    for name, key in (
        ("base", "ce_base"),
        ("converted", "ce_converted"),
        ("zero", "ce_zero_ablation"),
        ("mean", "ce_mean_ablation"),
    ):
        assert found[key] == pytest.approx(expected[name], **close), name
    rises = 0.0
    for site in sites:
        layer, alone = found["layers"][str(site.index)], expected[f"{site.index}/alone"]
        rises += alone - expected["base"]
        assert layer["delta_ce"] == pytest.approx(alone - expected["base"], **close)
        for name in ("zero", "mean"):
            ablated = expected[f"{site.index}/{name}"]
            recovered = 1 - (alone - expected["base"]) / (ablated - expected["base"])
            assert layer[f"recovered_{name}"] == pytest.approx(recovered, rel=1e-5), name
    if found["compounding"] is not None:
        assert found["compounding"] == pytest.approx((expected["converted"] - expected["base"]) / rises, rel=1e-6)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_ablations_of_a_single_layer_equal_those_of_whole_forwards(evaluated, share):
    """If its variants run on all blocks, they have the ablations of the whole model too, which are not run again."""
    base, converted, sites, blocks = evaluated("llama", indices=(2,))
    expected = by_whole_passes(base, converted, {2: sites[0].path}, blocks, rows=8)
    found = evaluate_models(base, converted, sites, blocks, mask="none", quiet=True, variant_share=share)
    rise = expected["converted"] - expected["base"]
    for name in ("zero", "mean"):
        assert found["fidelity"][f"ce_{name}_ablation"] == pytest.approx(expected[name], rel=1e-6)
        recovered = 1 - rise / (expected[name] - expected["base"])
        assert found["fidelity"][f"recovered_{name}"] == pytest.approx(recovered, rel=1e-5)
    passes = found["cost"]["evaluation"]["full_passes"]
    assert passes == 3.0 if share == 1.0 else 4.0 < passes < 5.0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_routing_necessity_equals_that_of_whole_forwards(evaluated, family):
    base, converted, sites, blocks = evaluated(family)
    expected = by_whole_passes(base, converted, {site.index: site.path for site in sites}, blocks, rows=8)
    found = evaluate_models(base, converted, sites, blocks, mask="none", quiet=True, variant_share=1.0)["reliance"]
    for site in sites:
        alone, zero = expected[f"{site.index}/alone"], expected[f"{site.index}/zero"]
        permuted = np.mean([expected[f"{site.index}/permuted{number}"] for number in range(3)])
        layer = found["layers"][str(site.index)]
        if zero > alone:
            assert layer["routing_necessity"] == pytest.approx((permuted - alone) / (zero - alone), rel=1e-5)
            assert layer["routing_necessity_se"] > 0
        else:  # removing a layer that only harms has no benefit to lose
            assert layer["routing_necessity"] is None
    assert family != "llama" or any(layer["routing_necessity"] is not None for layer in found["layers"].values())


def test_variants_of_a_subset_are_those_of_its_blocks(evaluated):
    base, converted, sites, blocks = evaluated("llama")
    found = evaluate_models(base, converted, sites, blocks, mask="none", quiet=True, variant_share=0.3)["fidelity"]
    rows = fidelity._chosen(len(blocks), 0.3)
    assert found["variants"]["tokens"] == len(rows) * (blocks.context - 1)
    assert 0 < len(rows) < len(blocks) / 2
    whole = evaluate_models(base, converted, sites, blocks, mask="none", quiet=True, variant_share=1.0)["fidelity"]
    assert found["delta_ce"] == whole["delta_ce"]
    assert found["layers"]["0"]["fvu"] == whole["layers"]["0"]["fvu"]
    ids = blocks.take(rows)
    path = sites[0].path
    handle = base.get_submodule(path).register_forward_hook(lambda m, a, o: converted.mxd_layers()[0](a[0]))
    alone = base(input_ids=ids, labels=ids).loss.item()
    handle.remove()
    assert found["layers"]["0"]["delta_ce"] == pytest.approx(alone - base(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def test_a_quick_evaluation_has_the_same_figures_in_two_passes(evaluated):
    base, converted, sites, blocks = evaluated("llama")
    whole = evaluate_models(base, converted, sites, blocks, quiet=True)
    quick = evaluate_models(base, converted, sites, blocks, quiet=True, quick=True)
    for name in ("ce_base", "delta_ce", "delta_ce_se", "kl", "top1_agreement"):
        assert quick["fidelity"][name] == whole["fidelity"][name]
    for name in ("gate_share", "hidden_share", "product_share", "expert_share"):
        assert quick["reliance"]["layers"]["2"][name] == whole["reliance"]["layers"]["2"][name]
    assert quick["cost"]["evaluation"]["full_passes"] == 2
    assert quick["cost"]["evaluation"]["suffix_passes"] == 0
    assert "ce_zero_ablation" not in quick["fidelity"]
    assert "routing_necessity" not in quick["reliance"]["layers"]["2"]
    assert whole["cost"]["evaluation"]["full_passes"] <= 6


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
@torch.no_grad()
def test_a_suffix_gives_the_logits_of_the_whole_forward(evaluated, family):
    base, _, sites, blocks = evaluated(family)
    ids = blocks.take(slice(0, 4))
    prefix = Prefix.of(base, sites, ids)
    whole = base(input_ids=ids).logits
    assert prefix.check(sites[-1])
    for site in sites:
        assert torch.allclose(prefix.run(site, 2, None), whole.expand(2, *whole.shape), atol=1e-12)
    assert torch.equal(base(input_ids=ids).logits, whole)  # nothing is left behind


@torch.no_grad()
def test_a_model_whose_layers_pass_on_more_than_hidden_states_is_run_whole(evaluated, monkeypatch):
    """Suffixes that differ from the whole forward are noticed, and whole forwards give the same figures."""
    base, converted, sites, blocks = evaluated("llama")
    plain = evaluate_models(base, converted, sites, blocks, quiet=True)
    skipping = suffix.skipping
    monkeypatch.setattr(suffix, "skipping", lambda layers, lengths, hidden: skipping(layers, lengths, hidden + 1.0))
    whole = evaluate_models(base, converted, sites, blocks, quiet=True)
    for index in ("0", "2"):
        assert whole["fidelity"]["layers"][index]["delta_ce"] == pytest.approx(
            plain["fidelity"]["layers"][index]["delta_ce"], rel=1e-6
        )


@torch.no_grad()
def test_a_figure_that_is_not_finite_is_null_with_a_reason(evaluated):
    base, converted, sites, blocks = evaluated("llama")
    converted.mxd_layers()[2].output_bias[0] = math.nan
    found = evaluate_models(base, converted, sites, blocks, quiet=True)

    def numbers(value):
        if isinstance(value, dict):
            for one in value.values():
                yield from numbers(one)
        elif isinstance(value, list):
            for one in value:
                yield from numbers(one)
        elif isinstance(value, float):
            yield value

    assert all(math.isfinite(number) for number in numbers(found))
    assert found["fidelity"]["delta_ce"] is None
    assert found["fidelity"]["reason"] == "the converted model's cross-entropy is not finite"
    assert found["fidelity"]["layers"]["2"]["fvu"] is None


def test_a_ratio_and_its_error_are_those_of_the_formula():
    numerator, denominator = torch.tensor([3.0, 1.0, 0.0, 4.0]).double(), torch.tensor([2.0, 1.0, 0.0, 5.0]).double()
    value, error = ratio(numerator, denominator)
    assert value == 1.0
    assert error == pytest.approx(math.sqrt(3 / 2 * (1 + 0 + 1)) / 8)
    assert ratio(torch.tensor([1.0]).double(), torch.tensor([4.0]).double()) == (0.25, None)
    assert ratio(torch.zeros(2).double(), torch.zeros(2).double()) == (None, None)
    assert ratio(torch.tensor([math.nan, 1.0]).double(), torch.ones(2).double()) == (None, None)


def test_standard_errors_are_those_of_a_bootstrap_over_documents():
    """Documents of different lengths and levels: errors of the mean and of the FVU, against 2,000 resamples of documents."""
    random = np.random.default_rng(0)
    lengths = random.integers(5, 60, 200)
    document = torch.from_numpy(np.repeat(np.arange(200), lengths))
    level = torch.from_numpy(random.normal(size=200))[document]
    value = level + torch.from_numpy(random.normal(size=len(document)))
    target = torch.from_numpy(random.normal(size=(len(document), 3))) + 0.5 * level.unsqueeze(-1) + 4
    output = target + 0.4 * torch.from_numpy(random.normal(size=target.shape)) * (1 + 0.5 * level.unsqueeze(-1))
    sums, variance = Sums(200, torch.device("cpu")), Variance(3, torch.device("cpu"), 200)
    sums.add("value", value, document)
    sums.add("tokens", torch.ones_like(value), document)
    for piece in torch.arange(len(document)).split(300):
        variance.add(output[piece], target[piece], document[piece])
    rows = [torch.nonzero(document == number).squeeze(-1) for number in range(200)]
    means, fvus = [], []
    for _ in range(2000):
        picked = torch.cat([rows[number] for number in random.integers(0, 200, 200)])
        means.append(value[picked].mean().item())
        error, some = output[picked] - target[picked], target[picked]
        fvus.append((error.square().sum() / (some - some.mean(0)).square().sum()).item())
    assert sums.mean("value")[1] == pytest.approx(np.std(means), rel=0.08)
    assert variance.fvu()[0] == pytest.approx(
        ((output - target).square().sum() / (target - target.mean(0)).square().sum()).item()
    )
    assert variance.fvu()[1] == pytest.approx(np.std(fvus), rel=0.12)
    naive = value.std().item() / math.sqrt(len(value))
    assert sums.mean("value")[1] > 2 * naive  # tokens of a document are not independent


def test_documents_of_tokens_are_those_of_the_text(models, text, tmp_path):
    """Each token's document, against tokenising the documents one by one."""
    from mxd_convert.data.blocks import prepare_eval, separators
    from mxd_convert.data.documents import read_documents

    tokenizer, source = load_tokenizer(str(QUICKSTART)), EvalText(path=str(text), tokens=900)
    blocks = prepare_eval(source, 30, tokenizer, tmp_path)
    marks = separators(tokenizer)
    expected = []
    for number, document in enumerate(read_documents(source)):
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        expected += [number] * (len(marks.before) + len(ids) + len(marks.after))
    assert blocks.document_of(slice(None)).flatten().tolist() == expected[: blocks.ids.size]
    assert blocks.document_of(np.array([3, 1])).tolist() == [expected[90:120], expected[30:60]]
    assert blocks.documents == expected[blocks.ids.size - 1] + 1

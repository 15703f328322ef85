"""Surgery changes nothing else: a layer with the original weights gives the original logits."""

import json

import pytest
import torch
from conformance import constant_gain_layer
from small_runs import FAMILIES, make_model

from mxd_convert.base_model import swap
from mxd_convert.base_model.capture import harvest
from mxd_convert.base_model.families import ARCHITECTURES, architecture_of, find_sites
from mxd_convert.base_model.load import load_base, model_sha256
from mxd_convert.checkpoint.read import load_checkpoint, same_outside_layers
from mxd_convert.errors import InputError
from mxd_convert.layers import MxD
from mxd_convert.recipe.schema import Base

IDS = torch.randint(0, 2048, (3, 40), generator=torch.Generator().manual_seed(1))


def sites_of(base, indices=None):
    return find_sites(base, base.config, indices or list(range(base.config.num_hidden_layers)))


@torch.no_grad()
def test_identity_surgery_gives_the_logits_of_the_base(base, tmp_path):
    layers = {site.index: constant_gain_layer(base, site) for site in sites_of(base)}
    swap.insert_layers(base, layers).save_pretrained(tmp_path)
    converted = load_checkpoint(tmp_path)
    expected = base(input_ids=IDS).logits
    assert (converted(input_ids=IDS).logits - expected).abs().max() < 1e-5
    assert expected.std() > 0.1


@torch.no_grad()
def test_identity_surgery_preserves_the_real_models(shared):
    for name in ("stories260K", "prose-neox"):
        base = load_base(Base(model=str(shared / "models" / name)))
        ids = IDS % base.config.vocab_size
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
            base.to(dtype)
            layers = {site.index: constant_gain_layer(base, site) for site in sites_of(base)}
            expected = base(input_ids=ids).logits
            difference = swap.insert_layers(base, layers)(input_ids=ids).logits - expected
            # their logits reach 30, where float32 has steps of 2e-6, so the bound is relative to the largest
            assert difference.abs().max() / expected.abs().max().clamp_min(1) < tolerance, (name, dtype)


@pytest.mark.parametrize("indices", [[1], [0, 2], [0, 1, 2]])
def test_surgery_on_any_subset_changes_nothing_else(base, indices):
    layers = {
        site.index: MxD(site.d_in, site.d_hidden, site.d_out, 12, 3, site.activation, site.glu)
        for site in sites_of(base, indices)
    }
    converted = swap.insert_layers(base, layers)
    assert sorted(converted.mxd_layers()) == indices
    assert same_outside_layers(converted, base) is None
    names = {name for name, _ in converted.named_parameters()}
    assert sum(name.endswith("mlp.experts") for name in names) == len(indices)
    other = next(p for name, p in converted.named_parameters() if "mlp" not in name and p.ndim == 2)
    other.data = other.data + 1e-3
    assert same_outside_layers(converted, base) is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_bases_keep_their_dtype(family, tmp_path):
    folder = make_model(family, tmp_path / "base", dtype=torch.bfloat16)
    base = load_base(Base(model=str(folder)), dtype="auto")
    layers = {
        site.index: MxD(site.d_in, site.d_hidden, site.d_out, 12, 3, site.activation, site.glu) for site in sites_of(base, [1])
    }
    swap.insert_layers(base, layers).save_pretrained(tmp_path / "out")
    converted = load_checkpoint(tmp_path / "out")
    assert converted.dtype == torch.bfloat16
    assert {p.dtype for p in converted.parameters()} == {torch.bfloat16}
    assert same_outside_layers(converted, base) is None


def test_fine_tuning_keeps_the_dropout_of_the_mlp(models):
    for family, expected in (("gpt2", 0.1), ("gpt_neox", 0.0), ("llama", 0.0)):
        base = load_base(Base(model=str(models[family])))
        layers = {
            site.index: MxD(site.d_in, site.d_hidden, site.d_out, 12, 3, site.activation, site.glu)
            for site in sites_of(base, [1])
        }
        layer = swap.insert_layers(base, layers).train().mxd_layers()[1]
        assert layer.dropout.p == expected
        x = torch.randn(4, layer.d_in)
        with torch.no_grad():
            layer.output_bias.fill_(1.0)
            dropped = (layer(x) == 0).any().item() or (layer(x) == 0).any().item()
        assert dropped == (expected > 0)


@torch.no_grad()
def test_reverting_restores_the_base(base):
    layers = {site.index: MxD(site.d_in, site.d_hidden, site.d_out, 12, 3, site.activation, site.glu) for site in sites_of(base)}
    converted = swap.insert_layers(base, layers)
    partly = swap.remove_layers(converted, base, [0, 2])
    assert sorted(partly.mxd_layers()) == [1]
    whole = swap.remove_layers(partly, base, [1])
    assert type(whole) is type(base)
    assert whole.config.model_type == base.config.model_type
    assert not hasattr(whole.config, "mxd")
    assert whole(input_ids=IDS).logits.equal(base(input_ids=IDS).logits)
    assert model_sha256(whole) == model_sha256(base)
    with pytest.raises(InputError, match="layer 5 is not converted"):
        swap.remove_layers(converted, base, [5])


@torch.no_grad()
def test_harvest_records_the_inputs_and_outputs_of_the_mlp(base):
    sites = sites_of(base, [0, 2])
    seen = harvest(base, sites, IDS)
    for site in sites:
        assert base.get_submodule(site.path)(seen[site.index].inputs).equal(seen[site.index].outputs)
        assert seen[site.index].inputs.shape == (3, 40, site.d_in)


def test_harvest_stops_after_the_last_layer_needed(base):
    ran = []
    later = base.get_submodule(architecture_of(base.config).mlp.format(i=2))
    handle = later.register_forward_hook(lambda *_: ran.append(1))
    harvest(base, sites_of(base, [0, 1]), IDS)
    assert not ran
    harvest(base, sites_of(base, [2]), IDS)
    assert ran
    handle.remove()


@torch.no_grad()
def test_replaced_modules_are_restored(base):
    before = base(input_ids=IDS).logits
    site = sites_of(base, [1])[0]
    with swap.replaced(base, {site.path: swap.Constant(torch.zeros(site.d_out))}):
        assert not base(input_ids=IDS).logits.equal(before)
    assert base(input_ids=IDS).logits.equal(before)


def test_unsupported_families_are_named_with_the_supported_ones():
    config = type("Config", (), {"model_type": "mixtral"})()
    with pytest.raises(InputError) as error:
        architecture_of(config)
    for word in ("mixtral", *ARCHITECTURES, "families.py"):
        assert word in str(error.value)


def test_a_separate_head_survives_a_config_that_ties_it(tmp_path):
    """transformers keeps two different matrices untied even if the config ties them."""
    folder = make_model("llama", tmp_path / "base", tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    base = load_base(Base(model=str(folder)))
    layers = {site.index: constant_gain_layer(base, site) for site in sites_of(base)}
    swap.insert_layers(base, layers).save_pretrained(tmp_path / "out")
    converted = load_checkpoint(tmp_path / "out")
    assert same_outside_layers(converted, base) is None
    assert not converted.get_output_embeddings().weight.equal(converted.get_input_embeddings().weight)
    with torch.no_grad():
        assert (converted(input_ids=IDS).logits - base(input_ids=IDS).logits).abs().max() < 1e-5

"""Layers are initialised on tokens of the text, and more experts are active at first."""

import json

import pytest
import torch
from small_runs import small_recipe

from mxd_convert import convert
from mxd_convert.base_model.capture import harvest
from mxd_convert.base_model.families import find_sites
from mxd_convert.base_model.load import load_base
from mxd_convert.data.blocks import block_order
from mxd_convert.layers import LayerSpec
from mxd_convert.recipe.schema import Base
from mxd_convert.training import token_init as start
from mxd_convert.training.stage import active_experts, make_layer
from mxd_convert.training.stream import Activations
from mxd_convert.training.token_init import GATE_NORM, init_from_tokens

CPU = torch.device("cpu")


def tokens_of(source, index):
    """Return inputs and outputs of an MLP of the base for all counted tokens of the text."""
    blocks = source.blocks
    rows = block_order(len(blocks), 0, len(blocks), source.seed)
    ids = blocks.take(rows)
    seen = harvest(source.base, [site for site in source.sites if site.index == index], ids)[index]
    counted = blocks.counted(rows, "bos").flatten()
    return seen.inputs.flatten(0, 1)[counted], seen.outputs.flatten(0, 1)[counted]


def fresh(site, kind="mxd", experts=24, sparsity="topk"):
    hidden = 0 if "coder" in kind else 48
    skip = kind == "skip_transcoder"
    shape = LayerSpec(kind, site.d_in, hidden, site.d_out, experts, 4, "silu", bool(hidden), sparsity, skip)
    return make_layer(shape, 7, site.index, "data")


def started(source, *settings):
    layer = fresh(source.sites[0], *settings)
    init_from_tokens({source.sites[0].index: layer}, Activations(source, CPU))
    return layer


@pytest.mark.parametrize("kind", ["mxd", "transcoder", "skip_transcoder"])
def test_every_expert_is_initialised_from_a_token_of_the_text(source, kind):
    layer = started(source(), kind)
    x, y = tokens_of(source(), 0)
    if layer.skip is not None:  # the experts have what the skip path leaves
        y = y - layer.skip(x).detach()
    weight, rows = layer.gate.weight.double(), layer.experts.double()
    assert torch.allclose(weight.norm(dim=-1), torch.tensor(GATE_NORM, dtype=torch.float64), atol=1e-6)
    mean_y = layer.output_bias.double()
    scales, centres, found = [], [], set()
    for n in range(24):
        fit = (y.double() - mean_y) @ rows[n] / rows[n].square().sum()
        residual = (y.double() - mean_y - fit.unsqueeze(1) * rows[n]).norm(dim=1)
        token = int(residual.argmin())
        assert residual[token] < 1e-4 * y.norm(dim=1).mean()
        scales.append(1 / fit[token])
        found.add(token)
        gate = layer.gate.bias[n].double() + weight[n] @ x[token].double()
        assert gate > 0  # the expert of the token itself is active
        centres.append(x[token].double() - gate / GATE_NORM**2 * weight[n])
    assert len(found) == 24
    # every gate points from one common point to the input of its token
    assert (torch.stack(centres) - centres[0]).abs().max() < 1e-4 * x.abs().mean()
    assert torch.stack(scales).std() < 1e-4 * torch.stack(scales).mean()  # one scale for all


@pytest.mark.parametrize("sparsity", ["topk", "l1"])
def test_a_layer_initialised_on_text_is_a_regression_on_neighbours(source, sparsity):
    """The scale is optimal on tokens that are no experts, so the initialisation explains part of the output."""
    layer = started(source(), "mxd", 200, sparsity)
    x, y = tokens_of(source(), 0)
    with torch.no_grad():
        assert (layer.linear(x) - 1).abs().max() < 1e-5
        error = (layer(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert 0.02 < error < 0.9


def test_the_initialisation_depends_on_the_seed_and_the_text_alone(source):
    first, again, other = started(source()), started(source(sites=source().sites[:1])), started(source(seed=6))
    assert all(torch.equal(first.state_dict()[name], tensor) for name, tensor in again.state_dict().items())
    assert not torch.equal(first.experts, other.experts)


def test_the_initialisation_of_a_layer_is_independent_of_the_others(source, monkeypatch):
    """Layers trained together or in groups have the same initialisation; a layer of few experts needs fewer forwards."""
    monkeypatch.setattr(start, "FORWARD_TOKENS", 64)
    few, many = source().sites
    together = {few.index: fresh(few), many.index: fresh(many, experts=400)}
    init_from_tokens(together, Activations(source(), CPU))
    for site in (few, many):
        alone = fresh(site, experts=together[site.index].n_experts)
        init_from_tokens({site.index: alone}, Activations(source(), CPU))
        assert all(torch.equal(together[site.index].state_dict()[name], tensor) for name, tensor in alone.state_dict().items())


def test_experts_without_a_token_keep_a_random_gate(source):
    count = len(tokens_of(source(), 0)[0])
    layer = started(source(), "mxd", count)
    used = layer.experts.abs().amax(-1) > 0
    assert 100 < used.sum() < count / 2
    drawn = fresh(source().sites[0], "mxd", count).gate.weight
    assert torch.equal(layer.gate.weight[~used], drawn[~used])
    assert layer(torch.randn(5, 32)).isfinite().all()


@pytest.mark.parametrize("experts", [24, 400])
def test_no_two_experts_are_initialised_from_the_same_token(source, models, experts):
    """In the first layer of a GPT-NeoX, attention and MLP are parallel, so equal tokens give equal inputs."""
    base = load_base(Base(model=str(models["gpt_neox"])))
    from_neox = source(base=base, sites=find_sites(base, base.config, [0]))
    distinct = len(tokens_of(from_neox, 0)[0].unique(dim=0))
    assert 24 < distinct < 300
    layer = started(from_neox, "mxd", experts)
    used = layer.experts.abs().amax(-1) > 0
    assert used.sum() == 24 if experts == 24 else distinct / 2 < used.sum() <= distinct
    ways = torch.nn.functional.normalize(layer.gate.weight[used].double())
    assert (ways @ ways.T).fill_diagonal_(
        0
    ).max() < 0.95  # 0.9 from the mean of the first tokens, which differs from the mean of all


def test_a_layer_with_few_distinct_inputs_does_not_read_the_whole_text(source, monkeypatch):
    monkeypatch.setattr(start, "FORWARD_TOKENS", 64)
    monkeypatch.setattr(start, "MAX_TOKENS_PER_EXPERT", 0.5)
    activations = Activations(source(), CPU)
    read = []
    monkeypatch.setattr(
        activations, "read", lambda rows, indices, real=activations.read: read.append(len(rows)) or real(rows, indices)
    )
    init_from_tokens({0: fresh(source().sites[0], experts=400)}, activations)
    assert 200 <= sum(read) * source().blocks.context < 200 * 8 / 7 + 2 * 64


def test_a_text_that_ends_with_a_short_block_is_initialised(source, monkeypatch):
    """The common scale needs enough tokens: fitted on the last block alone, all rows would be 0."""
    short = source()
    layer = started(short, "mxd", 2000)
    ends_short = Activations(short, CPU)
    read = ends_short.read

    def first_whole_then_few(rows, indices):
        batch = read(rows, indices)
        if rows[0] != first:
            batch.counted_B[5:] = False
        return batch

    rows = block_order(len(short.blocks), 0, len(short.blocks), short.seed)
    first, at_once = rows[0], len(rows) // 2 + 1
    monkeypatch.setattr(ends_short, "read", first_whole_then_few)
    monkeypatch.setattr(start, "FORWARD_TOKENS", at_once * short.blocks.context)
    short_layer = fresh(short.sites[0], "mxd", 2000)
    init_from_tokens({short.sites[0].index: short_layer}, ends_short)
    used, all_used = (made.experts.abs().amax(-1) > 0 for made in (short_layer, layer))
    assert all_used.sum() / 3 < used.sum() < all_used.sum()
    assert short_layer.experts[used].norm() / used.sum() > 0.5 * layer.experts[all_used].norm() / all_used.sum()


def test_a_text_without_tokens_for_the_scale_keeps_its_rows(source):
    few = source()
    short = Activations(few, CPU)
    read = short.read

    def seven(rows, indices):
        batch = read(rows, indices)
        batch.counted_B[torch.arange(len(batch.counted_B)) >= 7] = False
        return batch

    short.read = seven
    layer = fresh(few.sites[0], "mxd", 2000)
    init_from_tokens({few.sites[0].index: layer}, short)
    assert (layer.experts.abs().amax(-1) > 0).sum() > 1


def test_a_zero_vector_resembles_no_other(source):
    layer = fresh(source().sites[0])
    one = start._TokenInit(layer)
    tokens = torch.randn(31, 32)
    with torch.no_grad():
        one.take(torch.cat((tokens.mean(0, keepdim=True), tokens)), torch.randn(32, 32))  # the first is the mean of all
    assert one.taken == 24
    alone = start._TokenInit(fresh(source().sites[0]))
    with torch.no_grad():
        for token in tokens:  # the first is the centre
            alone.take(token.unsqueeze(0), torch.randn(1, 32))
    assert alone.taken == 24


def test_an_untrained_gate_is_not_initialised_on_text(source):
    layer = started(source(), "random_gate")
    drawn = fresh(source().sites[0], "random_gate")
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in drawn.state_dict().items())


def test_more_experts_are_active_at_first():
    counts = [active_experts(step, 100, 32, 8) for step in range(100)]
    assert counts[0] == 32
    assert counts == sorted(counts, reverse=True)
    assert counts[25] == 20
    assert set(counts[50:]) == {8}
    assert active_experts(0, 1, 32, 8) == 8  # not the 32 of a longer schedule


def test_a_run_has_more_active_experts_at_first_and_k_at_the_end(models, text, tmp_path):
    result = convert(small_recipe(models["gpt2"], text, tmp_path / "out", train={"k_init": 16}), quiet=True)
    lines = [json.loads(line) for line in (result.output / "training_log.jsonl").read_text().splitlines()]
    assert lines[0]["layers"]["0"]["l0"] > 8
    assert lines[-1]["layers"]["0"]["l0"] <= 4
    assert {layer["k"] for layer in json.loads((result.output / "config.json").read_text())["mxd"]["layers"].values()} == {4}

"""The parts of a layer's output sum to it, and the direct effect of an expert equals the change of the logits without its part."""

import pytest
import torch
from observations import active_expert, ids_of
from random_layers import KINDS, small_layer
from tiny_models import LAYERS, tiny_model

from mxd_convert import InputError, decompose, expert_rank, load_checkpoint, logit_effect, steer
from mxd_convert.base_model import swap
from mxd_convert.base_model.capture import watching
from mxd_convert.base_model.families import ARCHITECTURES, find_sites
from mxd_convert.evaluation.experts.decomposition import Unembedding, decompose_layer
from mxd_convert.layers import MxD


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense_twin"])
@pytest.mark.parametrize("settings", [{}, {"sparsity": "l1"}])
@torch.no_grad()
def test_the_parts_of_every_kind_sum_to_the_output(kind, settings):
    layer, x = small_layer(kind, **settings), torch.randn(2, 5, 7, dtype=torch.float64)
    parts = decompose_layer(layer, x)
    assert (parts.output - layer(x)).abs().max() < 1e-12
    n = int(parts.experts[0, 0, 0])  # one part by its definition: a_n times the expert's own linear map
    z = layer.hidden(x[0, 0]) if layer.is_product else None
    expected = z @ layer.expert_weight(n) if z is not None else layer.experts[n]
    assert torch.allclose(parts.contributions[0, 0, 0], parts.values[0, 0, 0] * expected, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
@torch.no_grad()
def test_the_layers_of_a_steered_model_decompose(converted, family):
    model, ids = load_checkpoint(converted[family]).double(), ids_of()
    outputs = {}
    for index, layer in model.mxd_layers().items():
        layer.register_forward_hook(lambda module, arguments, output, index=index: outputs.__setitem__(index, output))
    with steer(model, 2, [3, 5], add=2.0), steer(model, 0, 1, ablate=True):
        parts = decompose(model, ids)
    assert set(parts) == {0, 2}
    for index in parts:
        assert (parts[index].output - outputs[index]).abs().max() < 1e-10
    assert parts[2].values.shape == (2, 9, 6)  # steered experts are separate parts


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
@torch.no_grad()
def test_the_direct_effect_equals_the_change_without_the_part(converted, family):
    """The reference removes the part from the last hidden state, with the norm's scale fixed, and applies norm and head."""
    model, ids = load_checkpoint(converted[family], dtype="float32"), ids_of(6, 11)
    norm, head = Unembedding.of(model).norm.module, model.get_output_embeddings()
    n = active_expert(model, ids)
    residual = []
    norm.register_forward_pre_hook(lambda module, arguments: residual.append(arguments[0]))
    with watching(model.mxd_layers()) as seen:
        model(input_ids=ids)
    parts = decompose_layer(model.mxd_layers()[2], seen[2].inputs)
    x, part = residual[-1].double(), torch.zeros_like(residual[-1]).double()
    fires = (parts.experts == n) & (parts.values > 0)
    part = (parts.contributions * fires.unsqueeze(-1)).sum(-2).double()
    centred = family != "llama"
    moved = part - part.mean(-1, keepdim=True) if centred else part
    spread = x.var(-1, correction=0, keepdim=True) if centred else x.square().mean(-1, keepdim=True)
    epsilon = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    change = moved / (spread + epsilon).sqrt() * norm.weight.double() @ head.weight.double().T
    change = (change - change.mean(-1, keepdim=True))[fires.any(-1)]
    effect = logit_effect(model, 2, n, ids, rows=4)
    assert effect.tokens == len(change) > 3
    assert torch.allclose(effect.mean.double(), change.mean(0), atol=1e-4 * change.abs().max().item())
    assert torch.allclose(effect.spread.double(), change.std(0, correction=0), atol=1e-3 * change.abs().max().item())
    assert effect.promoted(3) == change.mean(0).topk(3).indices.tolist()
    assert effect.suppressed(1) == [change.mean(0).argmin().item()]


@torch.no_grad()
def test_all_parts_together_give_the_logits_of_the_model(converted):
    """Everything written to the residual stream gives the logits, except for a constant and the norm's bias."""
    model, ids = load_checkpoint(converted["llama"], dtype="float32"), ids_of()
    unembedding = Unembedding.of(model)
    residual = []
    unembedding.norm.module.register_forward_pre_hook(lambda module, arguments: residual.append(arguments[0]))
    with unembedding.scales() as scales:
        logits = model(input_ids=ids).logits
    ours = unembedding.logits(residual[-1] * scales.final.unsqueeze(-1))
    assert torch.allclose(ours, logits - logits.mean(-1, keepdim=True), atol=1e-4)


def test_the_rank_of_an_expert_counts_its_nonzero_outputs():
    layer = small_layer("mxd")
    assert expert_rank(layer, 3) == 5
    with torch.no_grad():
        layer.experts[3, :2] = 0
    assert expert_rank(layer, 3) == 3
    with pytest.raises(IndexError, match="experts 0 to 12"):
        expert_rank(layer, 13)


def test_missing_layers_and_experts_are_refused(converted):
    model, ids = load_checkpoint(converted["llama"]), ids_of()
    with pytest.raises(InputError, match=r"layer 1 is not converted\. Converted layers: 0, 2"):
        logit_effect(model, 1, 0, ids)
    with pytest.raises(InputError, match=r"no expert 24\. It has experts 0 to 23"):
        logit_effect(model, 0, 24, ids)
    with pytest.raises(InputError, match="dense_twin has no experts"):
        decompose_layer(small_layer("dense_twin"), torch.randn(1, 7))
    model.mxd_layers()[0].gate.weight.zero_()
    model.mxd_layers()[0].gate.bias.fill_(-1)
    silent = logit_effect(model, 0, 3, ids)
    assert (silent.tokens, silent.mean.any().item()) == (0, False)


def random_conversion(family: str):
    """Return a tiny model of a family whose layers all have random experts."""
    torch.manual_seed(1)
    base = tiny_model(family)
    layers = {}
    for site in find_sites(base, base.config, range(LAYERS)):
        layers[site.index] = MxD(site.d_in, site.d_hidden, site.d_out, 24, 4, site.activation, site.glu)
        torch.nn.init.normal_(layers[site.index].decoder.weight, std=0.5)
        torch.nn.init.normal_(layers[site.index].output_bias, std=0.5)
    return swap.insert_layers(base, layers)


def held(norm, x, part):
    """Return the norm of a part of its input with the scale fixed, from the definition of its class."""
    kind = type(norm).__name__
    weight = (norm.weight.double() + 1) if kind.startswith("Gemma") else norm.weight.double()
    centred, x = "LayerNorm" in kind, x.double()
    spread = x.var(-1, correction=0, keepdim=True) if centred else x.square().mean(-1, keepdim=True)
    epsilon = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return (part - part.mean(-1, keepdim=True) if centred else part) / (spread + epsilon).sqrt() * weight


@pytest.mark.parametrize("family", ARCHITECTURES)
@torch.no_grad()
def test_the_direct_effect_is_exact_in_every_family(family):
    """Families differ between MLP and logits: a norm of the output, a multiplier, another norm, scaled logits."""
    model, ids, row = random_conversion(family), ids_of(6, 11), ARCHITECTURES[family]
    seen = {}

    def note(name):
        return lambda module, arguments: seen.__setitem__(name, arguments[0])

    final = model.get_submodule(row.norm)
    final.register_forward_pre_hook(note("final"))
    after = model.get_submodule(f"{row.layer.format(i=0)}.{row.after}") if row.after else None
    if after is not None:
        after.register_forward_pre_hook(note("after"))
    parts = decompose(model, ids)[0]
    with watching(model.mxd_layers()) as layers:
        model(input_ids=ids)
    assert (parts.output - layers[0].outputs).abs().max() < 1e-5 * layers[0].outputs.abs().max()
    n = int(parts.experts[parts.values > 0].mode().values)
    fires = (parts.experts == n) & (parts.values > 0)
    part = (parts.contributions * fires.unsqueeze(-1)).sum(-2).double()
    if after is not None:
        part = held(after, seen["after"], part)
    part = part * getattr(model.config, "residual_multiplier", 1.0)
    change = held(final, seen["final"], part) @ model.get_output_embeddings().weight.double().T
    change = change * getattr(model.config, "logit_scale", 1.0) / getattr(model.config, "logits_scaling", 1.0)
    change = (change - change.mean(-1, keepdim=True))[fires.any(-1)]
    effect = logit_effect(model, 0, n, ids, rows=4)
    assert effect.tokens == len(change) > 3
    assert torch.allclose(effect.mean.double(), change.mean(0), atol=1e-4 * change.abs().max().item())


@torch.no_grad()
def test_a_model_without_a_path_to_the_logits_is_refused():
    base = tiny_model("opt", do_layer_norm_before=False, word_embed_proj_dim=16)
    [site] = find_sites(base, base.config, [1])
    model = swap.insert_layers(base, {1: MxD(site.d_in, site.d_hidden, site.d_out, 24, 4, site.activation, site.glu)})
    with pytest.raises(InputError, match="no norm and head after its layers"):
        logit_effect(model, 1, 0, ids_of())

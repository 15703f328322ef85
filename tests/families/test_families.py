"""The converted model of every family passes the checks that its base class passes, as docs/families.md says."""

import json
import re
from pathlib import Path

import pytest
import torch
from conformance import BASE_FAILS, IDS, NAMES, NEW, PASSED, SLOW, constant_gain_layer, differs, logits, make, outcome
from project import ROOT
from small_runs import documents, small_recipe
from tiny_models import LAYERS, tiny_model
from transformers import AutoModelForImageTextToText

import mxd_convert
from mxd_convert import steer
from mxd_convert.base_model import swap
from mxd_convert.base_model.capture import apply_mlp, harvest, recording
from mxd_convert.base_model.families import ARCHITECTURES, find_sites, stem_of
from mxd_convert.checkpoint.read import load_checkpoint
from mxd_convert.evaluation.suffix import Prefix
from mxd_convert.layers import MxD

DOCS = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def family(request, tmp_path_factory):
    """Return (name, folder of a tiny base, folder of its conversion)."""
    name = request.param
    return name, *make(name, tmp_path_factory.mktemp(name))


CASES = [
    pytest.param(name, check, marks=[pytest.mark.slow] if check in SLOW else [], id=f"{name}-{check}")
    for name in ARCHITECTURES
    for check in NAMES
]


@pytest.mark.parametrize(("family", "check"), CASES, indirect=["family"])
def test_every_check_passed_by_the_base_is_passed_by_the_converted_model(family, check):
    """The cell in docs/families.md is the same; it names only the checks that the base fails."""
    name, base, converted = family
    found = outcome(check, base, converted)
    assert found in (PASSED, BASE_FAILS), found
    assert cells_of(name)[check] == found


def cells_of(name: str) -> dict[str, str]:
    """Return the row of a family in docs/families.md."""
    [row] = [line for line in DOCS.splitlines() if line.startswith(f"| `{name}` |")]
    return dict(zip(NAMES, [cell.strip() for cell in row.split("|")[3:-1]], strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_suffix_of_every_family_gives_the_logits_of_the_whole_model(name):
    """Evaluation runs the variants of a layer from there on; a family whose layers pass on more would cost whole forwards."""
    model = tiny_model(name)
    sites = find_sites(model, model.config, range(LAYERS))
    prefix = Prefix.of(model, sites, IDS)
    for site in sites:
        assert prefix.check(site), f"layer {site.index}"
        mlp = torch.nn.Sequential(*(model.get_submodule(path) for path in site.modules))
        zeroed, same = prefix.run(site, 2, lambda x, mlp=mlp: [0 * mlp(x), mlp(x)])
        assert torch.allclose(same, prefix.logits_BTV, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(zeroed, prefix.logits_BTV, rtol=1e-2, atol=1e-2)
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits, prefix.logits_BTV)


def test_base_classes_fail_few_checks():
    """A check that the base fails proves nothing; these are all such cells."""
    failing = {(name, check) for name in ARCHITECTURES for check, cell in cells_of(name).items() if cell == BASE_FAILS}
    assert failing == {("gpt_neo", "static cache")}


def test_the_table_has_every_family_and_check():
    rows = [line for line in DOCS.splitlines() if re.match(r"\| `\w+` \|", line)]
    assert [row.split("`")[1] for row in rows] == list(ARCHITECTURES)
    for name in NAMES:
        assert f"- **{name}**" in DOCS


@pytest.mark.slow
def test_inductor_keeps_logits_and_gradients():
    """Logits and all gradients equal those of the uncompiled model."""
    base = tiny_model("llama")
    sites = find_sites(base, base.config, range(LAYERS))
    layers = {site.index: MxD(site.d_in, site.d_hidden, site.d_out, 40, 3, site.activation, site.glu) for site in sites}
    model = swap.insert_layers(base, layers).requires_grad_(True)

    def run(forward):
        model.zero_grad()
        logits = forward(input_ids=IDS, use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
        return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    torch._dynamo.reset()
    (ours, gradients), (theirs, expected) = run(torch.compile(model, fullgraph=True)), run(model)
    assert differs(ours, theirs) is None
    for parameter, gradient in gradients.items():
        assert (gradient - expected[parameter]).abs().max() <= 1e-4 * expected[parameter].abs().max().clamp_min(1e-3), parameter


# --- variants ------------------------------------------------------------------------------------------------------------------------

VARIANTS = [
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ("cohere", {"use_qk_norm": True}),
    ("falcon", {"new_decoder_architecture": True}),
    ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    ("falcon", {"parallel_attn": False, "bias": True, "alibi": True, "multi_query": False, "num_kv_heads": 4}),
    ("gemma3_text", {"tie_word_embeddings": False}),
    ("gpt2", {"tie_word_embeddings": False, "n_inner": 40}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox", {"tie_word_embeddings": True}),
    ("gptj", {"n_inner": 40}),
    ("granite", {"residual_multiplier": 0.5, "logits_scaling": 4.0, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True}),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
    ("mistral", {"sliding_window": None}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    ("opt", {"enable_bias": False, "tie_word_embeddings": False}),
    ("phi3", {"tie_word_embeddings": True}),
    ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": False, "layer_types": ["full_attention"] * 2}),
    ("smollm3", {"mlp_bias": True}),
    ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    ("starcoder2", {"use_bias": False, "tie_word_embeddings": False}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=[f"{name}-{','.join(changes)}" for name, changes in VARIANTS])
@torch.no_grad()
def test_variants_of_families_convert_exactly(name, changes, tmp_path):
    """Harvested inputs and outputs are exact, and surgery changes nothing else, after saving and loading."""
    base = tiny_model(name, **changes)
    sites = find_sites(base, base.config, range(LAYERS))
    for index, activations in harvest(base, sites, IDS).items():
        assert activations.inputs.shape == (*IDS.shape, sites[index].d_in)
        assert apply_mlp(base, sites[index], activations.inputs).equal(activations.outputs)
    converted = swap.insert_layers(base, {site.index: constant_gain_layer(base, site) for site in sites})
    assert differs(logits(converted), logits(base)) is None
    converted.save_pretrained(tmp_path)
    assert differs(logits(load_checkpoint(tmp_path)), logits(converted), 0.0) is None
    zeros = {site.index: swap.Constant(torch.zeros(site.d_out)) for site in sites}
    before = logits(base)
    with swap.replaced_mlps(base, sites, zeros):
        assert differs(logits(base), before, 1e-3) is not None


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_harvest_records_the_mlp_in_any_surrounding(name):
    """This holds in the base and in the converted model, with the same shapes."""
    base = tiny_model(name)
    sites = find_sites(base, base.config, range(LAYERS))
    seen = harvest(base, sites, IDS)
    for site in sites:
        assert seen[site.index].inputs.shape == seen[site.index].outputs.shape == (*IDS.shape, site.d_in)
        assert apply_mlp(base, site, seen[site.index].inputs).equal(seen[site.index].outputs)
    layers = {
        site.index: MxD(site.d_in, site.d_hidden, site.d_out, 12, 3, site.activation, site.glu).eval() for site in sites[1:]
    }
    for layer in layers.values():
        layer.output_bias.normal_()
    converted = swap.insert_layers(base, layers)
    own = {}
    for index, layer in converted.mxd_layers().items():
        layer.register_forward_hook(lambda module, arguments, output, index=index: own.__setitem__(index, arguments[0].clone()))
    with recording(converted, sites[1:]) as seen:
        logits(converted)
    for index, layer in layers.items():
        assert own[index].equal(seen[index].inputs)
        assert layer(seen[index].inputs).allclose(seen[index].outputs, atol=1e-6)


@pytest.mark.parametrize("name", ["opt", "bloom", "falcon"])
@torch.no_grad()
def test_steering_applies_to_its_positions_in_any_surrounding(name):
    """Steering of the prompt or of the generation gives the same text with and without a cache, different from the unsteered one."""
    base = tiny_model(name)
    sites = find_sites(base, base.config, range(LAYERS))
    torch.manual_seed(0)
    layers = {site.index: MxD(site.d_in, site.d_hidden, site.d_out, 12, 3, site.activation, site.glu) for site in sites}
    for layer in layers.values():
        layer.decoder.weight.normal_()
    model = swap.insert_layers(base, layers)
    plain = model.generate(IDS[:2, :20], **NEW)
    texts = {}
    for positions in ("prompt", "generation"):
        with steer(model, layer=1, expert=4, add=20.0, positions=positions):
            texts[positions] = model.generate(IDS[:2, :20], **NEW)
            assert model.generate(IDS[:2, :20], **NEW, use_cache=False).equal(texts[positions])
        assert not texts[positions].equal(plain)
    assert texts["generation"][:, 20].equal(plain[:, 20])  # the first token is chosen at the prompt's end
    assert not texts["prompt"].equal(texts["generation"])


def test_the_classes_are_named_after_their_family():
    assert [stem_of(name) for name in ("gpt2", "gpt_neox", "gemma3_text", "opt", "stablelm")] == [
        *("GPT2", "GPTNeoX", "Gemma3Text", "OPT", "StableLm"),
    ]
    assert Path(ROOT / "docs" / "add-a-family.md").is_file()


@pytest.mark.parametrize("family", ["gemma3", "mistral3"], indirect=True)
@torch.no_grad()
def test_a_model_with_images_is_converted_as_a_whole(family, tmp_path):
    """The language model inside is converted. The outer class loads the checkpoint, with the processor's settings."""
    name, base, converted = family
    (base / "preprocessor_config.json").write_text('{"image_processor_type": "none"}')
    theirs, ours = (AutoModelForImageTextToText.from_pretrained(folder).eval() for folder in (base, converted))
    assert type(ours).base_class is type(theirs)
    assert list(ours.mxd_layers()) == [1]
    inputs = {"input_ids": torch.tensor([[7, 5, 5, 5, 5, 9]]), "pixel_values": torch.rand(1, 3, 28, 28)}
    inputs |= {"image_sizes": torch.tensor([[28, 28]])} if name == "mistral3" else {}
    with_image, other_image = ours(**inputs).logits, ours(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    assert not torch.allclose(with_image, other_image)
    reverted = swap.remove_layers(ours, theirs, [1])
    assert torch.equal(reverted(**inputs).logits, theirs(**inputs).logits)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents()))
    with torch.enable_grad():
        mxd_convert.convert(small_recipe(base, text, tmp_path / "again", layers=[1]), quiet=True)
    assert (tmp_path / "again" / "preprocessor_config.json").read_text() == (base / "preprocessor_config.json").read_text()

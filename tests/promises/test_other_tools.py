"""The blocks of docs/other-tools.md run in order and give the stated results with the installed peers.

The [test] extra does not include the peers; see "Installing the peers" there.
"""

import importlib
import json
import os
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from project import ROOT
from random_layers import ACTIVE, checkpoint_of, model_layer
from safetensors.torch import load_file

import mxd_convert
from mxd_convert import InputError, export_steering, load_checkpoint, parse_steering, steer

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # read when sparsify is imported
PAGE = (ROOT / "docs" / "other-tools.md").read_text()


def peer(*modules: str):
    """Import the modules and return the first; skip the test and name the module if one is missing."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name} can't be imported ({error}); docs/other-tools.md tells how to install the peers")
    return importlib.import_module(modules[0])


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory):
    """Write `runs/quickstart` of a tiny GPT-2 with an MxD in every layer."""
    folder = tmp_path_factory.mktemp("page")
    layers = {index: model_layer("mxd", index) for index in range(3)}
    (folder / "runs").mkdir()
    return checkpoint_of(folder / "runs" / "quickstart", models["gpt2"], layers).parent


@pytest.fixture
def page(runs, text, tmp_path, monkeypatch, mxd):
    """Run the blocks of a section in an empty folder, after those of "Hooks"; page("nnsight") returns the names they define."""
    shutil.copytree(runs, tmp_path / "runs")
    shutil.copy(text, tmp_path / "held-out.jsonl")
    monkeypatch.chdir(tmp_path)
    names: dict = {}

    def run(section: str, **given) -> dict:
        names.update(given)
        body = re.split(r"^## ", PAGE.split(f"## {section}\n")[1], flags=re.MULTILINE)[0]
        for number, (kind, code) in enumerate(re.findall(r"```(python|)\n(.*?)```", body, flags=re.DOTALL)):
            if kind == "python":
                path = tmp_path / f"{section}_{number}.py"  # nnsight reads the source of its blocks
                path.write_text(code)
                names.update(runpy.run_path(str(path), init_globals=names))
            elif code.startswith("mxd-convert "):
                status, _, err = mxd(*code.split()[1:], "--tokens", 2048)
                assert status == 0, err
        return names

    with torch.no_grad():
        run("Hooks")
        yield run


def dense(coefficients):
    values, indices = coefficients
    return torch.zeros(*values.shape[:-1], 24).scatter(-1, indices, values)


def test_every_block_about_hooks_runs(page):
    names = page("Hooks")
    assert torch.equal(names["hooked"], names["steered"])
    assert not torch.allclose(names["hooked"], names["without"], atol=1e-3)
    layer, ids = names["layer"], names["inputs"]["input_ids"]
    shape = tuple(ids.shape)
    assert names["values"].shape == names["experts"].shape == (*shape, ACTIVE)
    with steer(names["model"], layer=2, expert=17, ablate=True):
        assert torch.allclose(names["model"](input_ids=ids).logits, names["without"], atol=1e-5)
    outputs = {}
    for name in ("gate", "gain", "decoder"):
        getattr(layer, name).register_forward_hook(lambda module, args, output, name=name: outputs.update({name: output}))
    layer.register_forward_hook(lambda module, args, output: outputs.update(y=output))
    names["model"](input_ids=ids)
    assert list(outputs)[:2] == ["gate", "gain"]  # in the order in which nnsight meets them
    assert outputs["gate"].shape == (*shape, 24)
    assert outputs["gain"].shape == outputs["decoder"].shape == (*shape, 32)
    gain = outputs["gain"] if layer.shared_expert is None else outputs["gain"] + layer.shared_expert
    assert torch.allclose(gain * outputs["decoder"] + layer.output_bias, outputs["y"], atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
@torch.no_grad()
def test_adding_to_the_gain_is_steering_in_every_family(converted, family):
    model, ids = load_checkpoint(converted[family]), torch.arange(1, 13).view(2, 6)
    layer = model.mxd_layers()[2]
    handle = layer.gain.register_forward_hook(lambda module, arguments, output: output + 10.0 * layer.experts[17])
    hooked = model(input_ids=ids).logits
    handle.remove()
    with steer(model, 2, 17, add=10.0):
        assert torch.equal(model(input_ids=ids).logits, hooked)
    path = model.config.mxd["mlp"].format(i=2)
    assert model.get_submodule(f"{path}.gain") is layer.gain


def test_export_steering_writes_entries_for_lm_eval(converted):
    model = load_checkpoint(converted["gpt2"])
    orders = [parse_steering(text) for text in ("2:17:+10", "2:3:-4", "0:1:2")]
    entries = export_steering(model, orders)
    assert list(entries) == ["h.0.mlp.gain", "h.2.mlp.gain"]
    experts = model.mxd_layers()[2].experts
    assert torch.allclose(entries["h.2.mlp.gain"].pop("steering_vector"), 10 * experts[17] - 4 * experts[3])
    assert entries["h.2.mlp.gain"] == {"steering_coefficient": 1.0, "action": "add", "bias": None, "head_index": None}
    for text in ("2:17:=10", "2:17:x2", "2:17:off"):
        with pytest.raises(InputError, match="lm-eval can only add"):
            export_steering(model, [parse_steering(text)])
    with pytest.raises(InputError, match="all positions"):
        export_steering(model, [parse_steering("2:17:+1", "generation")])
    with pytest.raises(InputError, match="no expert 99"):
        export_steering(model, [parse_steering("2:99:+1")])


def test_the_blocks_about_nnsight_run(page):
    peer("nnsight")
    names = page("nnsight")
    assert torch.equal(names["logits"], names["hooked"])
    assert torch.equal(dense(names["coefficients"]), dense((names["values"], names["experts"])))


def test_the_blocks_about_lm_eval_run(page):
    peer("lm_eval.models.huggingface", "lm_eval.models.hf_steered")
    from lm_eval.models.hf_steered import SteeredModel
    from lm_eval.models.huggingface import HFLM

    names = page("lm-eval")
    model, ids = names["model"], names["inputs"]["input_ids"]
    with steer(model, layer=2, expert=17, scale=3.0):
        assert torch.equal(names["lm"]._model_call(ids), model(input_ids=ids).logits)
    preset = HFLM(pretrained="runs/steered", trust_remote_code=True, device="cpu", dtype="float32")
    assert torch.equal(preset._model_call(ids), names["steered"])
    entry = SteeredModel(
        pretrained="runs/quickstart", steer_path="steer.pt", trust_remote_code=True, device="cpu", dtype="float32"
    )
    assert torch.equal(entry._model_call(ids), names["steered"])
    assert not torch.equal(model(input_ids=ids).logits, names["steered"])


def layer_input(names):
    """Return the inputs of the MLP of layer 2 for a longer text, (tokens, I)."""
    seen, ids = [], torch.randint(1, 2048, (4, 30), generator=torch.Generator().manual_seed(0))
    handle = names["layer"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    names["model"](input_ids=ids)
    handle.remove()
    return seen[0].flatten(0, 1)


def test_the_blocks_about_sparsify_run(page):
    peer("sparsify")
    names = page("Hooks")
    x = layer_input(names)
    names = page("sparsify", layer_input=x)
    assert list(names["coders"]) == ["h.0.mlp", "h.1.mlp", "h.2.mlp"]
    ours, theirs = names["layer"].encode(x), names["found"]
    assert torch.equal(dense(ours), dense((theirs.top_acts, theirs.top_indices)))
    tensors = load_file("exports/sparsify/h.2.mlp/sae.safetensors")
    assert torch.allclose(names["output"], dense(ours) @ tensors["W_dec"] + tensors["b_dec"], atol=1e-5)


@pytest.mark.parametrize(("kind", "sparsity"), [("transcoder", "topk"), ("skip_transcoder", "topk"), ("skip_transcoder", "l1")])
@torch.no_grad()
def test_sparsify_and_circuit_tracer_compute_transcoders_exactly(kind, sparsity, models, text, tmp_path):
    layers = {index: model_layer(kind, index, sparsity=sparsity) for index in range(3)}
    folder, x = checkpoint_of(tmp_path / "checkpoint", models["llama"], layers), torch.randn(50, 32)
    found = 0
    for name, layout in (("sparsify", "sparsify"), ("circuit_tracer.transcoder.single_layer_transcoder", "circuit-tracer")):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        found += 1
        mxd_convert.export_transcoder(folder, tmp_path / layout, layout, text, tokens=512, quiet=True)
        if layout == "sparsify":
            output = module.SparseCoder.load_many(str(tmp_path / layout), local=True)["layers.1.mlp"](x).sae_out
        else:
            coder = module.load_relu_transcoder(str(tmp_path / layout / "layer_1.safetensors"), 1)
            if sparsity == "topk":
                from circuit_tracer.transcoder.activation_functions import TopK

                assert (coder(x) - layers[1](x)).abs().max() > 1  # the trap that the page describes
                coder.activation_function = torch.nn.Sequential(TopK(ACTIVE), torch.nn.ReLU())
            output = coder(x)
        assert torch.allclose(output, layers[1](x), atol=1e-4), layout
    if not found:
        pytest.skip("neither sparsify nor circuit_tracer can be imported; docs/other-tools.md tells how to install the peers")


def test_the_blocks_about_circuit_tracer_run(page):
    peer("circuit_tracer.transcoder.single_layer_transcoder")
    names = page("circuit-tracer")
    coders, x = names["transcoders"], layer_input(names)
    assert len(coders) == 3
    assert coders.feature_input_hook == "mlp.hook_in"
    assert torch.equal(coders[2].encode(x), dense(names["layer"].encode(x)))
    tensors = load_file("exports/circuits/layer_2.safetensors")
    assert torch.allclose(coders[2](x), coders[2].encode(x) @ tensors["W_dec"] + tensors["b_dec"], atol=1e-5)


def test_the_blocks_about_delphi_run(page):
    peer("delphi.latents", "delphi.config")
    names = page("delphi")
    records = {(record.latent.module_name, record.latent.latent_index): record for record in names["records"]}
    assert {module for module, _ in records} == {"h.0.mlp", "h.1.mlp", "h.2.mlp"}
    record = records[next(key for key in records if key[0] == "h.2.mlp")]
    example = max(record.examples, key=lambda example: float(example.activations.max()))
    assert example.tokens.shape == (32,)
    # the strongest activation of the record is the strongest of that expert in the cache
    from folders import cache_of

    entries, _, _ = cache_of(Path("exports/delphi/latents/h.2.mlp"))
    strongest = max(value for (_, _, expert), value in entries.items() if expert == record.latent.latent_index)
    assert float(example.activations.max()) == pytest.approx(float(strongest), rel=1e-3)


def test_delphi_finds_the_same_with_the_exported_gate(page):
    """delphi's cache of the gate, hooked to the MLP as a sparsify coder, equals ours."""
    peer("delphi.latents", "delphi.sparse_coders.load_sparsify", "sparsify")
    from delphi.latents import LatentCache
    from delphi.sparse_coders.load_sparsify import load_sparsify_hooks
    from folders import cache_of
    from transformers import AutoModel

    names = page("sparsify", layer_input=torch.zeros(1, 32))
    model = AutoModel.from_pretrained("runs/quickstart", dtype=torch.float32)
    hooks, transcode = load_sparsify_hooks(model, "exports/sparsify", ["h.2.mlp"])
    mxd_convert.cache_activations("runs/quickstart", "ours", "held-out.jsonl", tokens=2048, mask_first=False, quiet=True)
    entries, tokens, _ = cache_of(Path("ours/latents/h.2.mlp"))
    cache = LatentCache(model, hooks, batch_size=8, transcode=transcode)
    cache.run(tokens.size, torch.from_numpy(tokens))
    theirs = {tuple(entry) for entry in cache.cache.latent_locations["h.2.mlp"].tolist()}
    assert entries.keys() == theirs
    assert names["model"].config.model_type == "mxd_gpt2"
    assert json.loads(Path("ours/latents/h.2.mlp/config.json").read_text())["cache_ctx_len"] == 32

"""Exported transcoders are exact in the forward of each format, and reported losses equal those computed with numpy."""

import json

import numpy as np
import pytest
import torch
import yaml
from folders import nothing_left
from random_layers import ACTIVE, EXPERTS, checkpoint_of, model_layer
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from small_runs import blocks_of, small_recipe

import mxd_convert
from mxd_convert import InputError, export_transcoder, load_checkpoint
from mxd_convert.base_model.load import load_base, load_tokenizer
from mxd_convert.commands import export as transcoders
from mxd_convert.export import job as job_module
from mxd_convert.recipe.schema import Base


def sparsify_forward(folder, x):
    """Compute sparsify's SparseCoder from its format: ReLU, top-k, decoder; the skip path uses the raw input."""
    cfg, t = json.loads((folder / "cfg.json").read_text()), load_torch(folder / "sae.safetensors")
    assert cfg["transcode"] is True
    assert cfg["activation"] == "topk"
    assert t["encoder.weight"].shape == (cfg["num_latents"], cfg["d_in"])
    assert ("W_skip" in t) == cfg["skip_connection"]
    pre = torch.relu(x @ t["encoder.weight"].T + t["encoder.bias"])
    values, indices = pre.topk(cfg["k"], sorted=False)
    y = torch.zeros_like(pre).scatter(-1, indices, values) @ t["W_dec"] + t["b_dec"]
    return y + x @ t["W_skip"].T if "W_skip" in t else y


def circuit_forward(folder, index, x):
    """Compute circuit-tracer's SingleLayerTranscoder from its config.yaml; return its output and the number of positive gates."""
    config, t = yaml.safe_load((folder / "config.yaml").read_text()), load_torch(folder / f"layer_{index}.safetensors")
    assert {"W_enc", "b_enc", "W_dec", "b_dec"} <= set(t) <= {"W_enc", "b_enc", "W_dec", "b_dec", "W_skip"}
    pre = x @ t["W_enc"].T + t["b_enc"]
    if config["activation"] == "relu":
        acts = torch.relu(pre)
    else:
        values, indices = pre.topk(config["k"])  # negative ones too
        acts = torch.zeros_like(pre).scatter(-1, indices, values)
    y = acts @ t["W_dec"] + t["b_dec"]
    return y + x @ t["W_skip"].T if "W_skip" in t else y, (pre > 0).sum(-1)


@pytest.mark.parametrize("sparsity", ["topk", "l1"])
@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder"])
@torch.no_grad()
def test_a_transcoder_is_exported_exactly(kind, sparsity, models, text, tmp_path):
    layers = {index: model_layer(kind, index, sparsity=sparsity) for index in range(3)}
    folder = checkpoint_of(tmp_path / "checkpoint", models["llama"], layers)
    x = torch.randn(200, 32)
    for layout in ("sparsify", "circuit-tracer"):
        found = export_transcoder(folder, tmp_path / layout, layout, text, tokens=512, quiet=True)
        assert found["data"]["tokens_estimated"] == 0
        assert found["data"]["tokens_measured"] == 512
        for figures in found["layers"].values():
            assert figures["exact"] is True
            assert figures["never_fired"] is None
            assert figures["fvu_against_layer"] < 1e-10
            assert figures["fvu_surrogate"] == pytest.approx(figures["fvu_layer"], rel=1e-6)
            assert abs(figures["delta_ce"]) < 1e-5
            assert figures["k"] == (ACTIVE if sparsity == "topk" else None)
    for index, layer in layers.items():
        assert torch.allclose(sparsify_forward(tmp_path / "sparsify" / f"layers.{index}.mlp", x), layer(x), atol=1e-5)
        y, positive = circuit_forward(tmp_path / "circuit-tracer", index, x)
        same = (positive >= ACTIVE) | torch.tensor(sparsity == "l1")
        assert same.any()
        assert torch.allclose(y[same], layer(x)[same], atol=1e-5)
        assert not torch.isclose(y[~same], layer(x)[~same], atol=1e-3).all(-1).any()  # the difference that the notes describe
    for coder in load_file(tmp_path / "sparsify" / "layers.0.mlp" / "sae.safetensors").values():
        assert coder.dtype == np.float32


@torch.no_grad()
def activations_of(model, path, ids):
    """Return inputs (tokens, I) and outputs (tokens, O) of a module, without first positions and BOS, which is id 0."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    model(input_ids=ids)
    handle.remove()
    counted = ids != 0
    counted[:, 0] = False
    return seen[0][0][counted], seen[0][1][counted]


def cross_entropy(model, ids):
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1).double()
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).item()


def fvu(output, target):
    output, target = np.asarray(output, np.float64), np.asarray(target, np.float64)
    return ((output - target) ** 2).sum() / ((target - target.mean(0)) ** 2).sum()


PATHS = {"gpt2": "transformer.h.{i}.mlp", "llama": "model.layers.{i}.mlp"}


@pytest.mark.parametrize(
    ("family", "settings"), [("gpt2", {}), ("llama", {"skip": True, "glu": True}), ("llama", {"sparsity": "l1"})]
)
@torch.no_grad()
def test_the_surrogate_of_an_mxd_equals_its_formula_and_its_losses(family, settings, models, text, tmp_path):
    layers = {0: model_layer("mxd", 0, **settings), 2: model_layer("random_gate", 2, **settings)}
    layers[2].gate.bias[5] = -1e3  # never fires
    folder = checkpoint_of(tmp_path / "checkpoint", models[family], layers)
    found = export_transcoder(folder, tmp_path / "out", "sparsify", text, tokens=1024, quiet=True)
    assert found == json.loads((tmp_path / "out" / "mxd_surrogate.json").read_text())
    assert (found["data"]["tokens_estimated"], found["data"]["tokens_measured"]) == (768, 256)
    assert found["activations"] == "base"
    blocks = blocks_of(text, load_tokenizer(str(folder)), tmp_path, tokens=1024)
    first, last = blocks.take(slice(0, 24)), blocks.take(slice(24, 32))
    base, model = load_base(Base(model=str(models[family]))), load_checkpoint(folder)
    surrogates = {}
    for index, layer in layers.items():
        path = PATHS[family].format(i=index)
        exported = tmp_path / "out" / path.split(".", 1)[1]
        x, _ = activations_of(base, path, first)
        u = (layer.hidden(x) @ layer.decoder.weight.T).double()
        coefficients = layer.encode(x)
        dense = (
            coefficients
            if settings.get("sparsity") == "l1"
            else torch.zeros(len(x), EXPERTS).scatter(-1, coefficients[1], coefficients[0])
        )
        tensors, never = load_torch(exported / "sae.safetensors"), 0
        for n in range(EXPERTS):
            fires = dense[:, n] > 0
            never += not fires.any()
            row = layer.experts[n].double() * (u[fires].mean(0) if fires.any() else u.mean(0))
            assert torch.allclose(tensors["W_dec"][n].double(), row, atol=1e-5, rtol=1e-4), n
        assert torch.equal(tensors["encoder.weight"], layer.gate.weight)
        if layer.shared_expert is None:
            assert torch.equal(tensors["b_dec"], layer.output_bias)
        else:  # what it adds at every token is replaced by a linear fit, or by its mean
            always = u * layer.shared_expert
            kept = x @ (tensors["W_skip"] - layer.skip.weight).T if layer.skip is not None else torch.zeros(len(x), 1)
            fitted = kept.double() + tensors["b_dec"] - layer.output_bias
            assert torch.allclose(fitted.mean(0), always.mean(0), atol=1e-4, rtol=1e-3)
            if layer.skip is not None:
                ones = torch.cat([x, torch.ones(len(x), 1)], 1).double()
                best = ones @ torch.linalg.lstsq(ones, always).solution
                assert fvu(fitted, always) < 1.01 * fvu(best, always) < 0.99
        figures = found["layers"][str(index)]
        assert figures["never_fired"] == never
        assert never > 0 or index == 0
        assert figures["exact"] is False
        x, y = activations_of(base, path, last)
        ours, theirs = layer(x), sparsify_forward(exported, x)
        assert figures["fvu_layer"] == pytest.approx(fvu(ours, y), rel=1e-5)
        assert figures["fvu_surrogate"] == pytest.approx(fvu(theirs, y), rel=1e-4)
        assert figures["fvu_against_layer"] == pytest.approx(fvu(theirs, ours), rel=1e-4)
        assert figures["fvu_against_layer"] > 1e-3
        positive = (x @ layer.gate.weight.T + layer.gate.bias > 0).sum(-1).double()
        if settings.get("sparsity") == "l1":
            assert figures["l0"] == pytest.approx(positive.mean().item())
            assert figures["fewer_than_k"] is None
        else:
            assert figures["l0"] == pytest.approx(positive.clamp_max(ACTIVE).mean().item())
            assert figures["fewer_than_k"] == pytest.approx((positive < ACTIVE).double().mean().item())
        surrogates[index] = exported

    def hook(exported):
        return lambda module, args, output: sparsify_forward(exported, args[0])

    def in_place(indices):
        handles = [model.mxd_layers()[i].register_forward_hook(hook(surrogates[i])) for i in indices]
        value = cross_entropy(model, last)
        for handle in handles:
            handle.remove()
        return value

    assert found["ce_base"] == pytest.approx(cross_entropy(base, last), rel=1e-5)
    assert found["ce_converted"] == pytest.approx(in_place([]), rel=1e-5)
    assert found["ce_surrogates"] == pytest.approx(in_place([0, 2]), rel=1e-5)
    assert found["delta_ce_converted"] == pytest.approx(found["ce_surrogates"] - found["ce_converted"])
    assert found["delta_ce_base"] == pytest.approx(found["ce_surrogates"] - found["ce_base"])
    for index in (0, 2):
        assert found["layers"][str(index)]["delta_ce"] == pytest.approx(in_place([index]) - in_place([]), abs=1e-4)


def tensors_of(folder):
    return {str(path.relative_to(folder)): load_torch(path) for path in sorted(folder.rglob("*.safetensors"))}


def same_tensors(one, other, **tolerance) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[file][name], other[file][name], **tolerance) for file in one for name in one[file]
    )


def test_layers_exported_in_groups_are_the_same(converted, text, tmp_path, monkeypatch):
    export_transcoder(converted["gpt2"], tmp_path / "one", "sparsify", text, tokens=512, quiet=True)
    monkeypatch.setattr(job_module, "_SUMS", 1)
    export_transcoder(converted["gpt2"], tmp_path / "two", "sparsify", text, tokens=512, quiet=True)
    assert same_tensors(tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two"), atol=0, rtol=0)


def test_a_missing_base_is_replaced_by_the_converted_model(copy, text, tmp_path, models, refused):
    (copy / "mxd_local.json").unlink()
    found = export_transcoder(copy, tmp_path / "out", "sparsify", text, tokens=512, quiet=True)
    assert found["activations"] == "converted"
    assert found["ce_base"] is None
    assert found["delta_ce_base"] is None
    assert found["layers"]["0"]["fvu_layer"] is None
    assert found["layers"]["0"]["fvu_surrogate"] is None
    assert found["layers"]["0"]["fvu_against_layer"] > 0
    assert any("--base PATH" in note for note in found["notes"])
    given = export_transcoder(copy, tmp_path / "given", "sparsify", text, tokens=512, base=str(models["llama"]), quiet=True)
    assert given["activations"] == "base"
    arguments = ("export", copy, tmp_path / "wrong", "--to", "sparsify", "--data", text, "--tokens", 512)
    refused(*arguments, "--base", models["gpt2"], words=("--base", "not the base model"))
    refused(*arguments, "--base", tmp_path / "nowhere", words=("nowhere",))
    assert not list(tmp_path.glob("*wrong*"))


def test_a_steering_preset_is_left_out_and_reported(copy, text, tmp_path):
    plain = export_transcoder(copy, tmp_path / "plain", "sparsify", text, tokens=512, quiet=True)
    config = json.loads((copy / "config.json").read_text())
    config["mxd"]["steering"] = [{"layer": 0, "expert": 1, "add": 50.0}]
    (copy / "config.json").write_text(json.dumps(config))
    steered = export_transcoder(copy, tmp_path / "steered", "sparsify", text, tokens=512, quiet=True)
    assert steered["layers"] == plain["layers"]
    assert any("steering" in note for note in steered["notes"])
    assert same_tensors(tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "steered"), atol=0, rtol=0)


@pytest.mark.parametrize(("kind", "why"), [("dense_twin", "no experts"), ("dense_assisted", "hidden units beside")])
def test_a_layer_without_a_transcoder_s_form_is_left_out(models, text, tmp_path, refused, kind, why):
    layers = {0: model_layer(kind), 1: model_layer("transcoder")}
    folder = checkpoint_of(tmp_path / "checkpoint", models["llama"], layers)
    found = export_transcoder(folder, tmp_path / "out", "sparsify", text, tokens=512, quiet=True)
    assert list(found["layers"]) == ["1"]
    assert kind in found["notes"][0]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"layers.1.mlp", "mxd_surrogate.json"}
    arguments = ("export", folder, tmp_path / "none", "--data", text)
    for layout in ("sparsify", "delphi"):
        refused(*arguments, "--to", layout, "--layers", "0", words=(kind, why))


def test_the_command_prints_the_losses(mxd, converted, text, tmp_path, models):
    arguments = ("export", converted["llama"], tmp_path / "out", "--to", "sparsify", "--data", text, "--tokens", 512)
    status, out, err = mxd(*arguments)
    assert status == 0, err
    assert "FVU of surrogate" in " ".join(out.split())
    assert "over the converted model" in out
    assert out.strip().splitlines()[-1] == str(tmp_path / "out")
    (tmp_path / "json").mkdir()  # an empty folder is accepted
    status, out, _ = mxd("export", converted["llama"], tmp_path / "json", *arguments[3:], "--layers", "2", "--json")
    assert status == 0
    assert json.loads(out)["layers"].keys() == {"2"}
    folder = tmp_path / "all"
    mxd_convert.convert(small_recipe(models["gpt2"], text, folder, layer={"kind": "transcoder", "k": 4}), quiet=True)
    status, out, err = mxd("export", folder, tmp_path / "ct", "--to", "circuit-tracer", "--data", text, "--tokens", 512)
    assert status == 0, err
    assert "note: top-k" in err
    assert "fewer_than_k" in err
    names = {path.name for path in (tmp_path / "ct").iterdir()}
    assert names == {"config.yaml", "mxd_surrogate.json", *(f"layer_{i}.safetensors" for i in range(3))}
    config = yaml.safe_load((tmp_path / "ct" / "config.yaml").read_text())
    assert config["model_name"] == "tiny-gpt2"
    assert (config["activation"], config["k"]) == ("topk", 4)
    assert (config["feature_input_hook"], config["feature_output_hook"]) == ("mlp.hook_in", "hook_mlp_out")
    assert config["scan"] == config["scan_name"] == "local/tiny-gpt2-mxd"


def test_impossible_exports_are_refused(refused, mxd, converted, models, text, tmp_path):
    folder, out = converted["llama"], tmp_path / "out"
    arguments = ("export", folder, out, "--data", text)
    to = ("--to", "sparsify")
    assert mxd(*arguments)[0] == 2
    assert mxd(*arguments, "--to", "saelens")[0] == 2
    assert mxd("export", folder, out, *to)[0] == 2
    refused("export", tmp_path / "nowhere", out, "--data", text, *to, words=("nowhere", "no such folder"))
    refused("export", folder, out, "--data", tmp_path / "none.txt", *to, words=("none.txt", "no such file"))
    refused(*arguments, *to, "--text-field", "body", words=("body", "its fields are text"))
    refused(*arguments, *to, "--tokens", 31, words=("--tokens 31", "32"))
    refused(*arguments, *to, "--tokens", 33, words=("single block", "--tokens"))
    refused(*arguments, *to, "--layers", "1", words=("layer 1 is not converted", "0, 2"))
    refused(*arguments, *to, "--layers", "x", words=("--layers", "'x'"))
    refused(*arguments, "--to", "circuit-tracer", words=("layer 1 of 3 has no experts", "Convert all layers"))
    for other, words in (
        (model_layer("mxd", n_experts=16), ("same experts", "24 in layer 0, 16 in layer 2")),
        (model_layer("mxd", k=3), ("same active experts",)),
        (model_layer("mxd", skip=True), ("same skip path",)),
        (model_layer("mxd", sparsity="l1"), ("same sparsity",)),
    ):
        layers = {0: model_layer("mxd"), 1: model_layer("transcoder"), 2: other}
        mixed = checkpoint_of(tmp_path / "-".join(words).replace(" ", "-"), models["llama"], layers)
        refused("export", mixed, out, "--data", text, "--to", "circuit-tracer", words=(*words, "--to sparsify"))
    assert not list(tmp_path.glob("*out*"))
    out.mkdir()
    (out / "mine").write_text("")
    refused(*arguments, *to, words=("exists already",))
    refused("export", folder, folder / "below", "--data", text, *to, words=("inside the checkpoint",))
    with pytest.raises(InputError, match="expected one of sparsify, circuit-tracer"):
        export_transcoder(folder, tmp_path / "new", "saelens", text)


def test_layers_of_two_widths_are_refused(copy, text, tmp_path, refused):
    config = json.loads((copy / "config.json").read_text())
    config["mxd"]["layers"]["0"]["d_out"] = 16
    (copy / "config.json").write_text(json.dumps(config))
    arguments = ("export", copy, tmp_path / "out", "--data", text)
    refused(*arguments, "--to", "sparsify", words=("layer 0 maps 32 features to 16", "equal width"))


@pytest.mark.parametrize("command", ["export --to sparsify", "export --to delphi", "export-onnx"])
def test_weights_that_are_not_finite_are_named(command, copy, text, tmp_path, refused):
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if name.endswith("experts"))
    weights[name][3] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    command, *options = command.split()
    refused(command, copy, tmp_path / "out", *options, "--data", text, "--tokens", 512, words=(name, "not finite"))
    assert nothing_left(tmp_path / "out")


def test_an_interrupted_export_leaves_no_files(converted, text, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(transcoders, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        export_transcoder(converted["gpt2"], tmp_path / "out", "sparsify", text, tokens=512, quiet=True)
    assert list(tmp_path.iterdir()) == []

"""The commands behave as documented, and stdout is readable by programs."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import FAMILIES

from mxd_convert.recipe.load import load_recipe


def test_help_has_examples_and_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-m", "mxd_convert.cli", "run", "--help"], capture_output=True, text=True, check=True)
    assert "Example" in done.stdout
    code = "import sys; sys.orig_argv[1:3] = ['-m', 'mxd_convert.cli']; import mxd_convert.cli; print('torch' in sys.modules)"
    light = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert light.stdout.strip() == "False", "the command line imports torch before it needs it"
    code = (
        "import sys; sys.argv = ['mxd-convert', 'run', 'quickstart', '--set', 'layer.kk=3']; import mxd_convert.cli as cli\n"
        "try: cli.main()\nexcept SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    light = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert light.stdout.strip() == "2 False", "a mistake in the recipe is reported only after torch is loaded"


def test_init_writes_a_commented_recipe_that_loads(mxd, models, tmp_path):
    path = tmp_path / "mine.yaml"
    status, _, err = mxd("init", models["llama"], "--output", path)
    assert status == 0, err
    content = path.read_text()
    assert "# Active experts (for a transcoder: latents) per token." in content
    assert "llama, 3 layers, width 32" in content
    recipe = load_recipe(path)
    assert recipe == load_recipe({"base": {"model": str(models["llama"])}})
    status, _, err = mxd("init", models["llama"], "--output", path)
    assert status == 2
    assert "--force" in err
    assert mxd("init", models["llama"], "--output", path, "--force")[0] == 0


def test_plan_shows_layers_and_sizes(mxd, recipe):
    path = recipe(layers=[0, 2], layer={"experts": "auto"})
    status, out, _ = mxd("plan", path)
    assert status == 0
    for word in (
        "layer",
        "experts",
        "parameters",
        "steps of 256 tokens",
        "memory",
        "disk",
        "MFLOP per token",
        "tokens/s",
        "one pass",
    ):
        assert word in out
    status, out, _ = mxd("plan", path, "--set", "layer.k=8", "--json")
    plan = json.loads(out)
    assert [layer["index"] for layer in plan["layers"]] == [0, 2]
    assert {layer["k"] for layer in plan["layers"]} == {8}
    assert {(layer["d_in"], layer["d_hidden"], layer["d_out"]) for layer in plan["layers"]} == {(32, 128, 32)}
    assert plan["layers"][0]["experts"] == 32 * 32 - 129  # matched: N = M - (2 I H + H + O) / (I + O + 1), rounded down
    assert plan["recipe"]["train"]["warmup_steps"] is not None
    assert plan["groups"] == [[0, 2]]
    assert plan["memory_bytes"]["peak"] >= plan["memory_bytes"]["training"] > 2**28
    speed = plan["speed"]
    assert 0 < speed["training_seconds"] < speed["seconds"]
    assert speed["tokens_per_second"] == pytest.approx(4096 / speed["training_seconds"])


def test_plan_names_the_setting_to_change_if_memory_is_short(mxd, recipe):
    status, out, _ = mxd("plan", recipe(train={"memory_gib": 0.1}), "--json")
    plan = json.loads(out)
    assert status == 0
    assert plan["speed"] is None
    assert plan["groups"] == [[0], [1], [2]]
    assert "`run` would stop: train.memory_gib: 0.1" in plan["warnings"][0]


def test_plan_warns_about_a_model_several_times_larger(mxd, recipe):
    _, out, _ = mxd("plan", recipe(layer={"experts": "auto", "expansion": 512}), "--json")
    [warning] = json.loads(out)["warnings"]
    assert "times the base's parameters. Set layer.expansion to " in warning


def test_run_prints_figures_and_the_output_path(mxd, recipe, tmp_path):
    path = recipe(layers=[1])
    status, out, err = mxd("run", path, "--output", tmp_path / "elsewhere")
    assert status == 0, err
    assert out.strip().endswith(str(tmp_path / "elsewhere"))
    assert "verdict" in out
    assert "held-out cross-entropy" in out
    status, out, err = mxd("run", path, "--output", tmp_path / "elsewhere", "--json")
    result = json.loads(out)
    assert (status, result["already_finished"]) == (0, True)
    assert result["report"]["fidelity"]["ce_base"] > 0


def test_eval_prints_the_figures(mxd, converted, text):
    status, out, err = mxd("eval", converted["gpt2"], "--data", text, "--tokens", 500, "--json")
    assert status == 0, err
    figures = json.loads(out)
    assert set(figures) == {"data", "fidelity", "reliance", "cost"}
    assert 400 < figures["fidelity"]["tokens"] <= 500
    status, out, _ = mxd("eval", converted["gpt2"], "--data", text, "--tokens", 500)
    assert f"{figures['fidelity']['ce_converted']:.4f}" in out


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_checks_a_checkpoint_in_fresh_processes(mxd, converted, family):
    status, out, err = mxd("verify", converted[family], "--json")
    found = json.loads(out)
    assert status == 0, (found, err)
    assert found["ok"]
    assert all(check["ok"] for check in found["checks"]), found
    assert len(found["checks"]) == 22


def test_verify_finds_changed_tensors_and_broken_code(mxd, copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3  # a layer that was not converted
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    status, out, _ = mxd("verify", copy)
    assert status == 1
    assert "FAILED      tensors outside the layers are the base's, bit for bit: model.layers.1.mlp.up_proj.weight differs" in out
    (copy / "modeling_mxd.py").write_text("raise RuntimeError('broken')\n")
    status, out, _ = mxd("verify", copy)
    assert "not checked runs in a fresh process (without it" in out
    assert "modeling_mxd.py is not this package's own, and was not run" in out
    assert "FAILED      loads (without" not in out
    status, out, _ = mxd("verify", copy, "--trust-remote-code")
    assert status == 1
    assert "FAILED      loads (without it, trust_remote_code=True): RuntimeError: broken" in out


def test_verify_without_a_base_names_the_skipped_checks(mxd, copy):
    (copy / "mxd_local.json").unlink()
    status, out, _ = mxd("verify", copy)
    assert status == 0
    assert out.count("not checked") == 2
    assert "--base PATH" in out


def test_revert_writes_a_checkpoint_with_the_original_layers(mxd, converted, models, tmp_path):
    status, _, err = mxd("revert", converted["llama"], "--layers", "0", "--output", tmp_path / "partly")
    assert status == 0, err
    assert mxd("verify", tmp_path / "partly")[0] == 0
    assert not (tmp_path / "partly" / "mxd_report.json").exists()
    assert mxd("revert", converted["llama"], "--layers", "all", "--output", tmp_path / "whole", "--base", models["llama"])[0] == 0
    ours, theirs = load_file(tmp_path / "whole" / "model.safetensors"), load_file(models["llama"] / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_generate_prints_plain_and_steered_text(mxd, converted):
    plain = json.loads(mxd("generate", converted["gpt2"], "--prompt", "The value", "--max-new-tokens", 12, "--json")[1])
    steered = json.loads(
        mxd("generate", converted["gpt2"], "--prompt", "The value", "--max-new-tokens", 12, "--steer", "0:7:+500", "--json")[1]
    )
    nothing = json.loads(
        mxd("generate", converted["gpt2"], "--prompt", "The value", "--max-new-tokens", 12, "--steer", "0:7:+0", "--json")[1]
    )
    assert plain["text"].startswith("The value")
    assert steered["text"] != plain["text"]
    assert nothing["text"] == plain["text"]
    assert steered["steering"] == [{"layer": 0, "expert": 7, "add": 500.0, "positions": "all"}]


@torch.no_grad()
def test_steering_adds_to_the_coefficient(converted):
    """y changes by amount * c_n * u at every position, computed without the layer's code, and not at all afterwards."""
    from mxd_convert import load_checkpoint, steer

    model = load_checkpoint(converted["llama"])
    layer, x = model.mxd_layers()[2], torch.randn(2, 5, 32)
    before = layer(x)
    with steer(model, layer=2, expert=7, add=3.0), steer(model, layer=2, expert=1, add=-1.0):
        change = layer(x) - before
    u = layer.hidden(x) @ layer.decoder.weight.T
    assert torch.allclose(change, (3.0 * layer.experts[7] - layer.experts[1]) * u, atol=1e-5)
    assert layer(x).equal(before)

"""One recipe makes a finished checkpoint; an interrupted run resumes; no file is half-written or lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from interruptions import interrupted_run
from processes import until, wait_for_states
from programs import Running
from safetensors.torch import load_file
from small_runs import FAMILIES, documents, small_recipe
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import mxd_convert
from mxd_convert import convert, evaluate
from mxd_convert.errors import InputError

CONTRACT_FILES = {
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "configuration_mxd.py",
    "layers_mxd.py", "modeling_mxd.py", "steering_mxd.py", "README.md", "recipe.yaml", "mxd_report.json", "training_log.jsonl", "plots",
    "mxd_local.json",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_finished_folder_holds_the_files_of_the_contract(converted, family):
    folder = converted[family]
    assert {path.name for path in folder.iterdir()} == CONTRACT_FILES
    assert not folder.with_name(f"{folder.name}.partial").exists()
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == f"mxd_{family}"
    assert config["mxd"]["format_version"] == 3  # a shared expert
    assert set(config["mxd"]["layers"]) == {"0", "2"}
    report = json.loads((folder / "mxd_report.json").read_text())
    assert set(report) == {"base", "recipe_sha256", "data", "fidelity", "reliance", "cost", "versions", "seeds", "files", "local"}
    assert set(report["base"]) == {"model", "revision", "sha256"}
    assert {"path", "fingerprint", "tokens", "repeats"} <= set(report["data"]["train"])
    cost = {"resumed_at_steps", "train_seconds", "tokens_per_second", "peak_rss_bytes", "peak_gpu_bytes", "evaluation"}
    assert set(report["cost"]) == cost
    assert set(report["cost"]["evaluation"]) == {"seconds", "full_passes", "suffix_passes"}
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["train"]["lr"] == 3e-3
    assert recipe["train"]["warmup_steps"] is not None
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12, 16]
    assert set(lines[0]) == {"step", "tokens", "lr", "tokens_per_second", "layers"}
    assert set(lines[0]["layers"]["2"]) == {"loss", "fvu", "l0", "dead_fraction"}
    assert lines[-1]["layers"]["0"]["fvu"] < lines[0]["layers"]["0"]["fvu"]


@pytest.mark.parametrize("family", FAMILIES)
def test_published_files_name_no_machine(converted, family, text):
    folder = converted[family]
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "mxd_local.json":
            assert str(text.parent).encode() not in path.read_bytes(), path
            assert str(folder.parent).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained_loads_and_generates(converted, family):
    model = AutoModelForCausalLM.from_pretrained(converted[family])
    tokenizer = AutoTokenizer.from_pretrained(converted[family])
    assert type(model).__module__ == "mxd_convert.modeling.modeling_mxd"
    output = model.generate(**tokenizer("The value", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert output.shape[1] > 4
    assert sorted(model.mxd_layers()) == [0, 2]
    headless = AutoModel.from_pretrained(converted[family])
    assert sorted(headless.mxd_layers()) == [0, 2]
    ids = torch.arange(1, 9).view(1, 8)
    hidden = model(ids, output_hidden_states=True).hidden_states[-1]
    assert headless(ids).last_hidden_state.equal(hidden)
    values, indices = model.mxd_layers()[0].encode(torch.randn(2, 3, 32))
    assert values.shape == indices.shape == (2, 3, 4)


def test_the_report_describes_the_checkpoint_on_disk(converted, tmp_path):
    """`evaluate` on the held-out documents gives the figures of the report."""
    from mxd_convert.data.documents import is_held_out

    report = json.loads((converted["llama"] / "mxd_report.json").read_text())
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents() if is_held_out(d)))
    figures = evaluate(converted["llama"], held_out, tokens=512, quiet=True)
    assert figures["fidelity"] == report["fidelity"]
    assert figures["reliance"] == report["reliance"]
    assert figures["data"]["fingerprint"] == report["data"]["eval"]["fingerprint"]


def test_repeated_text_is_reported(models, text, tmp_path):
    result = convert(small_recipe(models["gpt2"], text, tmp_path / "out", layers=[1], data={"tokens": 30_000}), quiet=True)
    train = result.report["data"]["train"]
    assert train["tokens"] > train["available_tokens"]
    assert train["repeats"] == pytest.approx(train["tokens"] / train["available_tokens"])


def test_a_finished_output_is_kept_unless_fresh_is_given(models, text, tmp_path):
    recipe = small_recipe(models["gpt2"], text, tmp_path / "out", layers=[1])
    first = convert(recipe, quiet=True)
    stamp = (first.output / "model.safetensors").stat().st_mtime_ns
    again = convert(recipe, quiet=True)
    assert again.already_finished
    assert again.report == first.report
    assert (first.output / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="result of another recipe"):
        convert(recipe, overrides={"layer.k": 2}, quiet=True)
    fresh = convert(recipe, overrides={"layer.k": 2}, fresh=True, quiet=True)
    assert not fresh.already_finished
    assert json.loads((fresh.output / "config.json").read_text())["mxd"]["layers"]["1"]["k"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_files_in_the_output_are_kept(models, text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="not a converted checkpoint"):
        convert(small_recipe(models["gpt2"], text, tmp_path / "out"), quiet=True)
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


def run_until(programs, recipe: Path, file: Path, number: int = signal.SIGKILL) -> Running:
    """Start a run and send a signal as soon as a file exists that matches."""
    process = programs.start("run", recipe)
    until(lambda: process.ended or list(file.parent.glob(file.name)))
    if not process.ended:
        process.send(number)
    return process


def comparable(folder: Path) -> tuple[dict, list]:
    """Return report and log without times, memory and signs of a resumed run."""
    report = json.loads((folder / "mxd_report.json").read_text())
    del report["cost"]
    for name in ("training_log.jsonl", "recipe.yaml"):  # these hold times and the name of the folder
        assert len(report["files"].pop(name)) == 64
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return report, [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in log]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_interrupted_resumes_and_ends_the_same(programs, models, text, tmp_path, number):
    settings = {"layers": [0, 1], "data": {"tokens": 16_384}, "train": {"checkpoint_every": 3}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe(models["llama"], text, tmp_path / "cut", **settings)))
    whole = tmp_path / "whole"
    assert programs.run("run", recipe, "--output", whole).status == 0
    cut = run_until(programs, recipe, tmp_path / "cut.partial" / "state" / "layers-0-1" / "step-*09.json", number).wait()
    assert cut.status == (130 if number == signal.SIGINT else None), cut.err
    assert "Traceback" not in cut.err
    assert number == signal.SIGKILL or "interrupted. The same command resumes where it stopped" in cut.err
    assert not (tmp_path / "cut").exists()
    done = programs.run("run", recipe)
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "cut" / "mxd_report.json").read_text())
    assert report["cost"]["resumed_at_steps"], "the kill came too late to show anything"
    ours, theirs = load_file(tmp_path / "cut" / "model.safetensors"), load_file(whole / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert comparable(tmp_path / "cut") == comparable(whole)
    assert f"resumed at step {report['cost']['resumed_at_steps'][0]}" in done.err


def test_an_output_in_use_is_refused(programs, models, text, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe(models["gpt2"], text, tmp_path / "out", data={"tokens": 2_000_000})))
    first = programs.start("run", recipe)
    try:
        wait_for_states(tmp_path / "out")
        assert not first.ended
        second = programs.run("run", recipe)
        assert second.status == 2
        assert "in use by another run" in second.err
        assert "Traceback" not in second.err
        assert not first.ended
    finally:
        first.process.kill()
        first.wait()


def test_a_full_disk_is_a_one_line_error_and_the_run_resumes(programs, models, text, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe(models["gpt2"], text, tmp_path / "out", layers=[1])))
    full = programs.run("run", recipe, largest_file=40_000)  # bytes: the token files fit, the saved state does not
    assert full.status == 2, full.err
    assert "no space left" in full.err
    assert "Traceback" not in full.err
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").rglob("*.tmp"))
    done = programs.run("run", recipe)
    assert done.status == 0, done.err


def test_too_little_disk_space_is_reported_before_any_work(models, text, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(InputError, match=r"needs about .* MiB of disk space, and 0 MiB are free"):
        convert(small_recipe(models["gpt2"], text, tmp_path / "out", layers=[1]), quiet=True)


def test_a_damaged_state_is_skipped(tmp_path):
    from mxd_convert.training.state import load_state, save_state

    for step in (1, 2, 3):
        save_state(tmp_path, step, {"a": torch.full((4,), float(step))}, {}, "f")
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == ["step-000000002", "step-000000003"]
    with (tmp_path / "step-000000003.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    step, tensors, _ = load_state(tmp_path, "f")
    assert step == 2
    assert tensors["a"].tolist() == [2.0] * 4
    assert load_state(tmp_path, "another") is None


def test_a_damaged_note_is_skipped_and_leftovers_of_a_kill_are_removed(tmp_path):
    from mxd_convert.training.state import groups_with_state, load_state, save_state

    folder = tmp_path / "layers-0"
    facts = {"steps": 9, "layers": [0]}
    for step in (1, 2):
        save_state(folder, step, {"a": torch.full((4,), float(step))}, facts, "f")
    (folder / "step-000000002.json").write_text('{"step": 2, "sha')
    (folder / "step-000000005.safetensors").write_text("cut off before its note")
    (folder / "step-000000006.tmp").write_text("cut off")
    assert load_state(folder, "f")[0] == 1
    assert [(path.name, note["step"]) for path, note in groups_with_state(tmp_path, "f")] == [("layers-0", 1)]
    save_state(folder, 3, {"a": torch.zeros(4)}, facts, "f")
    assert sorted({path.stem for path in folder.iterdir()}) == ["step-000000002", "step-000000003"]
    for content in ("null", "[]", "{}", ""):
        (folder / "step-000000003.json").write_text(content)
        assert load_state(folder, "f") is None


def test_leftovers_of_a_kill_do_not_block_the_next_run(models, text, tmp_path):
    recipe = small_recipe(models["gpt2"], text, tmp_path / "out", layers=[1])
    work = tmp_path / "out.partial"
    work.mkdir()
    (work / "fingerprint.tmp").write_text("cut off here")  # killed before the mark was written
    (work / "lock").touch()
    done = convert(recipe, quiet=True)
    for leftover in ("lock", "fingerprint", "checkpoint.tmp"):  # killed while the work folder was removed
        work.mkdir(exist_ok=True)
        (work / "fingerprint").write_text("some run of ours") if leftover == "checkpoint.tmp" else None
        (work / leftover).touch()
        again = convert(recipe, quiet=True)
        assert again.already_finished
        assert again.report == done.report
        assert not work.exists()


def test_a_fresh_run_that_was_interrupted_resumes_without_fresh(models, text, tmp_path):
    recipe = small_recipe(models["gpt2"], text, tmp_path / "out", layers=[1])
    first = convert(recipe, quiet=True)
    stamp = (first.output / "model.safetensors").stat().st_mtime_ns
    interrupted_run(recipe, 5, fresh=True)
    assert (first.output / "model.safetensors").stat().st_mtime_ns == stamp  # the old result stays until the new one is complete
    done = convert(recipe, quiet=True)
    assert not done.already_finished
    assert done.report["cost"]["resumed_at_steps"] == [6]
    assert (first.output / "model.safetensors").stat().st_mtime_ns > stamp
    assert convert(recipe, quiet=True).already_finished


def test_a_loss_that_is_not_finite_names_the_layer(models, text, tmp_path):
    with pytest.raises(InputError, match=r"layer 0: the loss is not finite at step 2\. Lower train\.lr"):
        convert(small_recipe(models["gpt2"], text, tmp_path / "out", train={"lr": 1e30}), quiet=True)


def test_a_base_that_is_not_finite_is_named_instead_of_the_learning_rate(models, text, tmp_path):
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(models["gpt2"])
    with torch.no_grad():
        model.transformer.h[2].mlp.c_proj.bias[0] = float("inf")
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(models["gpt2"]).save_pretrained(broken)
    recipe = small_recipe(broken, text, tmp_path / "out", layers=[2])
    with pytest.raises(
        InputError, match=r"layer 2: the loss .* at step 1\. The base model's MLP output .* base.dtype \(float32\)"
    ):
        convert(recipe, quiet=True)


def test_float16_weights_missing_from_the_config_take_no_gradients(models, text, tmp_path):
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(models["gpt2"]).half().save_pretrained(half)
    AutoTokenizer.from_pretrained(models["gpt2"]).save_pretrained(half)
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({name: value for name, value in config.items() if "dtype" not in name}))
    recipe = small_recipe(half, text, tmp_path / "out", layers=[2], train={"joint": 0.4})
    recipe["base"]["dtype"] = "auto"
    with pytest.raises(InputError, match=r"train.joint: 0.4: gradients through a base in float16 underflow"):
        convert(recipe, quiet=True)


def test_l1_bf16_skip_and_a_tracker_work_together(models, text, tmp_path):
    recipe = small_recipe(
        models["llama"],
        text,
        tmp_path / "out",
        layer={"sparsity": "l1", "skip": True, "hidden": 20},
        train={"precision": "bf16", "tracker": "tensorboard"},
    )
    result = convert(recipe, quiet=True)
    model = AutoModelForCausalLM.from_pretrained(result.output)
    layer = model.mxd_layers()[1]
    assert (layer.sparsity, layer.d_hidden) == ("l1", 20)
    assert layer.skip is not None
    assert layer.encode(torch.randn(3, 32)).shape == (3, 24)
    assert 0 < result.report["fidelity"]["layers"]["1"]["l0"] < 24


def test_the_public_api_is_complete():
    for name in mxd_convert.__all__:
        assert getattr(mxd_convert, name) is not None
    assert set(mxd_convert.__all__) == set(mxd_convert._HOMES)


def test_another_text_of_the_same_name_is_another_recipe(models, text, tmp_path):
    recipe = small_recipe(models["gpt2"], text, tmp_path / "out", layers=[1])
    convert(recipe, quiet=True)
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / text.name
    other.write_text(text.read_text().upper())
    with pytest.raises(InputError, match="result of another recipe"):
        convert(small_recipe(models["gpt2"], other, tmp_path / "out", layers=[1]), quiet=True)


def test_a_resumed_run_notices_text_changed_in_place(programs, models, text, tmp_path):
    changing = tmp_path / "text.jsonl"
    changing.write_text(text.read_text())
    recipe = tmp_path / "recipe.yaml"
    settings = {"layers": [1], "data": {"tokens": 200_000}, "train": {"checkpoint_every": 3}}
    recipe.write_text(yaml.safe_dump(small_recipe(models["gpt2"], changing, tmp_path / "out", **settings)))
    cut = run_until(programs, recipe, tmp_path / "out.partial" / "state" / "layers-1" / "step-*3.json").wait()
    assert cut.status is None, "the kill came too late to show anything"
    (tmp_path / "out.partial" / "fingerprint").with_suffix(".tmp").write_text("cut off here")  # killed while it was written
    changing.write_text(text.read_text() + text.read_text().upper())
    with pytest.raises(InputError, match=r"text\.jsonl has changed since it began\. Undo that change"):
        convert(recipe, quiet=True)


def test_a_model_of_the_hub_is_pinned_to_its_commit(models, text, tmp_path):
    """The model is in the local cache, in the layout of the Hub's client."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "home" / "hub" / "models--someone--tiny"
    shutil.copytree(models["gpt2"], cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe("someone/tiny", text, tmp_path / "out", layers=[1])))
    command = [sys.executable, "-m", "mxd_convert.cli", "run", str(recipe), "--json"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["report"]
    assert report["base"]["model"] == "someone/tiny"
    assert report["base"]["revision"] == commit
    assert "base_model: someone/tiny" in (tmp_path / "out" / "README.md").read_text()
    local = json.loads((tmp_path / "out" / "mxd_local.json").read_text())
    assert set(local) == {"recipe", "data"}

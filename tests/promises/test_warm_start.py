"""The promise: a conversion can start from another one's layers, with another k, more tokens or a fine-tuned base."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from interruptions import interrupted_run
from small_runs import small_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

import mxd_convert
from mxd_convert.checkpoint.read import load_checkpoint
from mxd_convert.errors import InputError


@pytest.fixture(scope="module")
def first(models, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "converted"
    mxd_convert.convert(small_recipe(models["llama"], text, folder, layers=[0, 2], train={"init": "tokens"}), quiet=True)
    return folder


def warm(models, text, folder, first, **sections) -> dict:
    train = {"init": str(first), **sections.pop("train", {})}
    return small_recipe(models["llama"], text, folder, **{"layers": [2], **sections}, train=train)


def first_line(folder: Path) -> dict:
    return json.loads((folder / "training_log.jsonl").read_text().splitlines()[0])["layers"]["2"]


def test_layers_are_those_of_the_other_conversion_before_the_first_step(first, models, text, tmp_path):
    recipe = warm(models, text, tmp_path / "warm", first, train={"lr": 1e-12})
    mxd_convert.convert(recipe, quiet=True)
    theirs, ours = (load_checkpoint(folder).mxd_layers()[2].state_dict() for folder in (first, tmp_path / "warm"))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-7)


def test_another_k_starts_from_what_was_learnt(first, models, text, tmp_path):
    for name, init in (("warm", str(first)), ("cold", "tokens")):
        mxd_convert.convert(warm(models, text, tmp_path / name, init, layer={"k": 6}), quiet=True)
    assert first_line(tmp_path / "warm")["fvu"] < 0.9 * first_line(tmp_path / "cold")["fvu"]
    assert load_checkpoint(tmp_path / "warm").mxd_layers()[2].k == 6


def test_a_fine_tuned_base_starts_from_the_layers_of_the_other(first, models, text, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(models["llama"]), AutoTokenizer.from_pretrained(models["llama"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "tuned")
    for name, init in (("warm", str(first)), ("cold", "tokens")):
        recipe = warm(models, text, tmp_path / name, init, base={"model": str(tmp_path / "tuned")})
        mxd_convert.convert(recipe, quiet=True)
    assert first_line(tmp_path / "warm")["fvu"] < 0.9 * first_line(tmp_path / "cold")["fvu"]
    assert mxd_convert.verify_provenance(tmp_path / "warm").ok


def test_a_run_does_not_resume_from_another_start(first, models, text, tmp_path):
    start = Path(shutil.copytree(first, tmp_path / "start"))
    recipe = warm(models, text, tmp_path / "out", start)
    interrupted_run(recipe, 4)
    mxd_convert.convert(small_recipe(models["llama"], text, start, layers=[0, 2], train={"seed": 9}), fresh=True, quiet=True)
    with pytest.raises(InputError, match=r"start/\S+ has changed"):
        mxd_convert.convert(recipe, quiet=True)


def test_a_warm_start_keeps_the_final_k_from_the_first_step(first, models, text, tmp_path):
    recipe = warm(models, text, tmp_path / "fast", first, train={"lr": None, "batch_tokens": None})
    train = mxd_convert.make_plan(mxd_convert.load_recipe(recipe)).recipe.train
    assert (train.k_init, train.init) == (4, str(first))


def test_the_folder_stays_on_this_machine(first, models, text, tmp_path):
    recipe = warm(models, text, tmp_path / "warm", first, data={"tokens": 1024})
    mxd_convert.convert(recipe, quiet=True)
    assert yaml.safe_load((tmp_path / "warm" / "recipe.yaml").read_text())["train"]["init"] == first.name
    assert "train.init" in json.loads((tmp_path / "warm" / "mxd_report.json").read_text())["local"]
    for file in (tmp_path / "warm").rglob("*"):
        if file.is_file() and file.name != "mxd_local.json":
            assert str(first.parent).encode() not in file.read_bytes(), file
    assert mxd_convert.verify_provenance(tmp_path / "warm").ok


@pytest.mark.parametrize("kind", ["mxd", "transcoder"])
def test_open_keys_of_the_layer_come_from_the_other_conversion(models, text, tmp_path, kind):
    """A checkpoint made with another default needs no more settings than one made with this default."""
    own = {"kind": kind, **({"hidden": 20, "shared_expert": False} if kind == "mxd" else {})}
    first = small_recipe(models["llama"], text, tmp_path / "first", layers=[0, 2], layer=own, data={"tokens": 1024})
    mxd_convert.convert(first, quiet=True)
    recipe = warm(models, text, tmp_path / "warm", tmp_path / "first", layer={"kind": kind}, train={"balance": None})
    plan = mxd_convert.make_plan(mxd_convert.load_recipe(recipe))
    assert (plan.shapes[2].d_hidden, plan.shapes[2].shared_expert) == (own.get("hidden", 0), False)
    assert plan.recipe.train.balance == 0.0


def test_layers_that_dont_fit_are_refused(first, models, text, tmp_path, refused):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(warm(models, text, tmp_path / "out", first)))
    (tmp_path / "empty").mkdir()
    for settings, words in {
        ("layer.experts=25",): ("n_experts 24 there", "Set layer.experts: 24"),
        ("layer.hidden=7",): ("has d_hidden", "Set layer.hidden"),
        ("layer.skip=true",): ("skip False there", "Set layer.skip: false"),
        ("layer.shared_expert=false",): ("shared_expert True there", "Set layer.shared_expert: true"),
        ("layer.kind=transcoder",): ("kind mxd there", "Set layer.kind: mxd"),
        ("layers=[1]",): ("layer 1 is not converted there", "0, 2"),
        (f"base.model={models['gpt2']}",): ("layer 2 has",),
        ("train.twin=true",): ("train.twin: true can't be used with train.init",),
        ("train.init=token",): ("token: no such folder", "tokens, paper, or the folder"),
        (f"train.init={tmp_path / 'empty'}",): ("train.init:", "not a checkpoint"),
    }.items():
        options = [part for setting in settings for part in ("--set", setting)]
        refused("run", path, *options, words=words)
    assert not (tmp_path / "out").exists()

"""A sweep trains its runs from one harvest, bit for bit as alone; it resumes, and reports mistakes before any work."""

import csv
import json

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from small_runs import small_recipe

from mxd_convert import InputError, convert, load_recipe, make_plan, parse_arm, parse_grid, sweep
from mxd_convert.base_model import capture as harvest
from mxd_convert.plan.memory import estimate, fitting_together
from mxd_convert.training import stage

GRID = {"layer.kind": ["mxd", "transcoder", "dense_twin"], "layer.k": [2, 4]}


@pytest.fixture
def base_recipe(models, text, tmp_path):
    return small_recipe(models["llama"], text, tmp_path / "alone", layers=[0, 2])


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same(ours, theirs):
    assert all(torch.equal(weights(ours)[name], tensor) for name, tensor in weights(theirs).items())


def test_every_run_of_a_sweep_equals_the_run_alone(base_recipe, tmp_path, monkeypatch):
    forwards = []
    whole = harvest.harvest

    def counting(*arguments):
        forwards.append(1)
        return whole(*arguments)

    monkeypatch.setattr("mxd_convert.training.stream.harvest", counting)
    base_recipe["train"]["joint"] = 0.25  # every run has its own joint stage
    beside = {
        "train": {**base_recipe["train"], "twin": True},
        "output": {"push_to": "nobody/nothing"},
    }  # a sweep does neither
    done = sweep({**base_recipe, **beside}, GRID, tmp_path / "sweep", quiet=True)
    together = len(forwards)
    names = [row["name"] for row in done.rows]
    # the twin has no k: one run for both
    assert names == ["kind-mxd_k-2", "kind-mxd_k-4", "kind-transcoder_k-2", "kind-transcoder_k-4", "kind-dense_twin"]
    for kind, k, name in (
        ("mxd", 4, "kind-mxd_k-4"),
        ("transcoder", 2, "kind-transcoder_k-2"),
        ("dense_twin", 4, "kind-dense_twin"),
    ):
        forwards.clear()
        overrides = {"layer.kind": kind, "layer.k": k, "output.dir": str(tmp_path / kind)}
        alone = convert(base_recipe, overrides=overrides, quiet=True)
        assert together == len(forwards)  # one harvest for all five
        assert_same(done.output / "runs" / name, alone.output)
        row = next(row for row in done.rows if row["name"] == name)
        assert row["delta_ce"] == alone.report["fidelity"]["delta_ce"]
        logs = [
            [json.loads(line)["layers"] for line in (folder / "training_log.jsonl").read_text().splitlines()]
            for folder in (done.output / "runs" / name, alone.output)
        ]
        assert logs[0] == logs[1]


def test_a_sweep_writes_its_table_and_plots(base_recipe, tmp_path, mxd):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(base_recipe))
    arguments = ("sweep", path, "--set", "layer.kind=mxd,dense_twin", "--set", "train.seed=0,1", "--output", tmp_path / "sweep")
    status, out, err = mxd(*arguments)
    assert status == 0, err
    assert "kind-mxd_seed-1" in out
    assert out.strip().endswith(str(tmp_path / "sweep"))
    table = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [row["name"] for row in table["runs"]]
    assert [float(row["delta_ce"]) for row in rows] == [row["delta_ce"] for row in table["runs"]]
    assert {row["kind"] for row in rows} == {"mxd", "dense_twin"}
    assert (rows[2]["gate_share"], rows[2]["hidden_share"]) == ("0.0", "1.0")
    assert [float(row["behind_best"]) for row in rows].count(0.0) == 1
    assert all(float(row["behind_best_se"]) >= 0 for row in rows)
    assert str(tmp_path) not in json.dumps(table)  # no paths of this machine
    for name in ("frontier.png", "shares.png"):
        with Image.open(tmp_path / "sweep" / "plots" / name) as picture:
            assert min(picture.size) > 500
    assert not (tmp_path / "sweep" / "data").exists()
    before = (tmp_path / "sweep" / "sweep.csv").read_bytes()
    status, out, err = mxd(*arguments, "--json")  # nothing is repeated
    assert status == 0
    assert "4 already finished" in err
    assert json.loads(out)["runs"] == table["runs"]
    assert (tmp_path / "sweep" / "sweep.csv").read_bytes() == before


def test_a_sweep_that_was_interrupted_resumes(base_recipe, tmp_path, monkeypatch):
    whole = sweep(base_recipe, GRID, tmp_path / "whole", quiet=True)
    step = stage.Stage._step

    def interrupted(self, number, interrupt):
        step(self, number, interrupt)
        if number == 9 and self.recipe.layer.kind == "transcoder" and self.recipe.layer.k == 2:
            raise KeyboardInterrupt  # in the middle of a round: earlier runs are a step ahead

    with monkeypatch.context() as patched:
        patched.setattr(stage.Stage, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep(base_recipe, GRID, tmp_path / "cut", quiet=True)
    assert len(list((tmp_path / "cut" / "runs").glob("*.partial/state/*/step-*.json"))) >= 5
    done = sweep(base_recipe, GRID, tmp_path / "cut", quiet=True)
    for ours, theirs in zip(done.rows, whole.rows, strict=True):
        assert_same(done.output / "runs" / ours["name"], whole.output / "runs" / theirs["name"])
        assert ours["delta_ce"] == theirs["delta_ce"]


def test_a_diverging_run_is_noted_and_the_others_continue(base_recipe, tmp_path):
    done = sweep(base_recipe, {"train.lr": [1e-3, 1e30]}, tmp_path / "sweep", quiet=True)
    good, bad = done.rows
    assert isinstance(good["delta_ce"], float)
    assert "the loss is not finite" in bad["error"]
    assert (done.output / "plots" / "frontier.png").is_file()


def test_runs_that_do_not_fit_together_are_trained_in_turn(base_recipe, tmp_path):
    plans = [make_plan(load_recipe(base_recipe, {"layer.k": k})) for k in (2, 3, 4)]
    one = estimate(plans[0], plans[0].layers).training
    assert fitting_together(plans, 10 * one) == [[0, 1, 2]]
    assert fitting_together(plans, one) == [[0], [1], [2]]
    apart = sweep(base_recipe, {"layer.k": [2, 3], "train.memory_gib": [one / 2**30]}, tmp_path / "apart", quiet=True)
    whole = sweep(base_recipe, {"layer.k": [2, 3]}, tmp_path / "whole", quiet=True)
    for name in ("k-2", "k-3"):
        assert_same(apart.output / "runs" / name, whole.output / "runs" / name)


def test_grids_are_parsed():
    assert parse_grid(["layer.k=8,16", "train.lr=1e-3"]) == {"layer.k": [8, 16], "train.lr": [0.001]}
    assert parse_grid(["layers=[0],[0, 2]", "layer.kind=mxd"]) == {"layers": [[0], [0, 2]], "layer.kind": ["mxd"]}
    with pytest.raises(InputError, match="at least one value"):
        parse_grid(["layer.k="])


def test_each_arm_is_combined_with_all_of_the_grid(base_recipe, tmp_path, mxd):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(base_recipe))
    arms = ("--arm", "layer.kind=mxd train.lr=1e-2 layer.k=2", "--arm", "layer.kind=dense_twin train.lr=0.02")
    status, _, err = mxd("sweep", path, *arms, "--set", "train.seed=0,1", "--output", tmp_path / "sweep")
    assert status == 0, err
    assert "training 2 runs on the same activations" in err
    runs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]
    settings = [{key: run[key] for key in ("layer.kind", "train.lr", "train.seed")} for run in runs]
    assert settings == [
        {"layer.kind": kind, "train.lr": lr, "train.seed": seed}
        for kind, lr in (("mxd", 0.01), ("dense_twin", 0.02))
        for seed in (0, 1)
    ]
    recipe = load_recipe(tmp_path / "sweep" / "runs" / "kind-mxd_lr-0.01_k-2_seed-0" / "recipe.yaml")
    assert (recipe.layer.k, recipe.train.lr) == (2, 0.01)


def test_arms_are_parsed():
    assert parse_arm("layer.kind=mxd  train.lr=1e-3") == {"layer.kind": "mxd", "train.lr": 0.001}
    with pytest.raises(InputError, match=r"--arm 'layer.kind': not of the form KEY=VALUE"):
        parse_arm("layer.kind mxd")


def test_mistakes_are_reported_before_any_work(recipe, refused, tmp_path):
    path, out = recipe(), tmp_path / "sweep"
    refused("sweep", path, "--output", out, words=("--set", "layer.k=8,16,32"))
    twice = ("--arm", "layer.k=2", "--set", "layer.k=2,3")
    refused("sweep", path, *twice, "--output", out, words=("--set layer.k", "--arm sets this key too"))
    refused("sweep", path, "--set", "layer.q=1,2", "--output", out, words=("layer.q", "unknown key"))
    refused("sweep", path, "--set", "layer.k=2,99", "--output", out, words=("layer.k", "99"))
    refused("sweep", path, "--set", "layer.kind=mxd,coder", "--output", out, words=("layer.kind", "coder"))
    assert not out.exists()
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    refused("sweep", path, "--set", "layer.k=2,4", "--output", out, "--fresh", words=("not a sweep",))
    assert (out / "precious.txt").read_text() == "mine"


def test_sweeps_of_different_recipes_are_not_mixed(base_recipe, tmp_path):
    sweep(base_recipe, {"layer.k": [2]}, tmp_path / "sweep", quiet=True)
    sweep(base_recipe, {"layer.k": [2, 4]}, tmp_path / "sweep", quiet=True)  # a grid may grow; new runs have new names
    with pytest.raises(InputError, match=r"contains a sweep of another recipe. Use --fresh"):
        sweep(base_recipe, {"layer.k": [2, 4], "data.tokens": [2048]}, tmp_path / "sweep", quiet=True)
    rows = sweep(base_recipe, {"layer.k": [2, 4], "data.tokens": [2048]}, tmp_path / "sweep", fresh=True, quiet=True).rows
    assert {row["tokens"] for row in rows} == {2048}

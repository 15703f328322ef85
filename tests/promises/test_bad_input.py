"""Every mistake is an error of one or two lines that names its cause, with exit status 2. No file is lost or half-written."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from project import ROOT
from safetensors.torch import load_file, save_file
from small_runs import documents

from mxd_convert.modeling.configuration_mxd import FORMAT_VERSION
from mxd_convert.recipe.load import load_recipe


def test_bad_options_are_refused(mxd, refused, recipe):
    assert mxd("plan")[0] == 2
    assert mxd("nonsense")[0] == 2
    refused("plan", recipe(), "--set", "layer.kk=3", words=("layer.kk", "did you mean 'k'"))
    refused("plan", recipe(), "--set", "layer.k", words=("KEY=VALUE",))
    refused("plan", "nowhere.yaml", words=("nowhere.yaml", "no such recipe file", "init"))
    refused("run", "quikstart", words=("quikstart", "did you mean 'quickstart'"))


def test_bad_recipes_are_refused_before_any_work(refused, recipe, tmp_path, text):
    refused("run", recipe(layer={"k": 30}), words=("layer.k", "30", "24"))
    refused("run", recipe(layer={"k": 3000, "experts": "auto"}), words=("layer.k", "3000", "895"))
    refused("run", recipe(layers=[3]), words=("layers", "3", "layers 0 to 2"))
    refused("run", recipe(layer={"activation": "gulu"}), words=("layer.activation", "gulu"))
    refused(
        "run",
        recipe(data={"context": 4096, "eval": {"tokens": 8192}}, train={"batch_tokens": 4096}),
        words=("data.context", "4096", "128"),
    )
    refused("run", recipe(train={"device": "cuda"}), words=("train.device", "cuda")) if not torch.cuda.is_available() else None
    refused("run", recipe(base={"model": str(tmp_path / "nowhere")}), words=("base.model", "nowhere", "no such folder"))
    refused("run", recipe(base={"model": str(text.parent)}), words=("base.model", "no config.json"))
    refused("run", recipe(base={"model": "nobody/nothing"}), words=("nobody/nothing", "can't be loaded"))
    refused("run", recipe(layer={"expansion": 1, "experts": "auto"}), words=("layer.expansion", "raise"))
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"], "something was written before the recipe was refused"


def test_bad_text_is_refused(refused, recipe, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    one = tmp_path / "one.txt"
    one.write_text("a single document " * 100)
    refused(
        "run",
        recipe(data={"train": {"path": str(tmp_path / "none.jsonl")}}),
        words=("data.train.path", "none.jsonl", "no such file"),
    )
    refused("run", recipe(data={"train": {"path": str(empty)}}), words=("empty.txt", "the text is empty"))
    refused("run", recipe(data={"train": {"path": str(one)}}), words=("one.txt", "single document", "data.eval.path"))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        (
            "mixtral",
            (
                "'mixtral', whose MLPs are mixtures of experts already, is not supported",
                "gpt2, gpt_neo, gpt_neox",
                "families.py",
            ),
        ),
        ("bert", ("'bert', no causal language model, is not supported",)),
        ("mxd_gpt2", ("already converted",)),
    ],
)
def test_unsupported_architectures_are_refused(refused, recipe, tmp_path, converted, model_type, words):
    folder = tmp_path / "other"
    if model_type == "mxd_gpt2":
        folder = converted["gpt2"]
    else:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    refused("run", recipe(base={"model": str(folder)}), words=words)


def test_a_quantised_base_that_transformers_cant_dequantise_is_refused(refused, recipe, tmp_path, models):
    folder = Path(shutil.copytree(models["gpt2"], tmp_path / "quantised"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    refused(
        "run",
        recipe(base={"model": str(folder)}),
        words=("is quantised", "c_attn becomes a Linear, not a Conv1D", "Give the unquantised model"),
    )


def lose_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.experts"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_a_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.experts"] = tensors["model.layers.2.mlp.experts"][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_the_file(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def add_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_a_tensor, ("missing", "model.layers.2.mlp.experts")),
        (change_a_shape, ("model.layers.2.mlp.experts",)),
        (cut_the_file, ("model.safetensors", "truncated or damaged")),
        (add_a_tensor, ("unexpected", "model.layers.1.mlp.experts")),
        (lambda folder: (folder / "model.safetensors").unlink(), ("model.safetensors", "missing")),
    ],
)
def test_damaged_checkpoints_end_verify_with_1_and_other_commands_with_2(mxd, refused, copy, text, tmp_path, damage, words):
    damage(copy)
    status, out, err = mxd("verify", copy)
    assert status == 1
    assert "Traceback" not in out + err
    assert out.startswith("FAILED")
    for word in words:
        assert word in out
    refused("eval", copy, "--data", text, words=words)
    refused("generate", copy, "--prompt", "a", words=words)
    refused("revert", copy, "--layers", "0", "--output", tmp_path / "reverted", words=words)
    assert not (tmp_path / "reverted").exists()


def test_a_truncated_base_is_refused(refused, recipe, models, tmp_path):
    folder = Path(shutil.copytree(models["gpt2"], tmp_path / "cut"))
    cut_the_file(folder)
    refused("run", recipe(base={"model": str(folder)}), words=("cut", "truncated or damaged"))


def test_a_base_with_fewer_layers_in_its_config_is_refused(refused, recipe, models, tmp_path):
    for family, key in (("gpt2", "n_layer"), ("llama", "num_hidden_layers")):
        folder = Path(shutil.copytree(models[family], tmp_path / family))
        damage_config(folder, **{key: 2})
        refused("run", recipe(base={"model": str(folder)}), "--fresh", words=(family, "says 2 layers", "the weights have more"))


def test_bad_arguments_of_other_commands_are_refused(refused, converted, models, text, tmp_path):
    folder = converted["llama"]
    refused("eval", tmp_path / "nowhere", "--data", text, words=("nowhere", "no such folder"))
    refused("eval", models["llama"], "--data", text, words=("'llama' model", "not of one with MxD layers"))
    refused("eval", folder, "--data", tmp_path / "none.txt", words=("none.txt", "no such file"))
    refused("eval", folder, "--data", text, "--text-field", "body", words=("body", "its fields are text"))
    refused("eval", folder, "--data", text, "--base", models["gpt2"], words=("--base", "not the base model"))
    refused("eval", folder, "--data", text, "--tokens", 0, words=("--tokens 0",))
    refused("generate", folder, "--prompt", "a", "--steer", "0:1", words=("--steer 0:1", "LAYER:EXPERT:AMOUNT"))
    refused("generate", folder, "--prompt", "a", "--steer", "1:1:+1", words=("layer 1 is not converted", "0, 2"))
    refused("generate", folder, "--prompt", "a", "--steer", "0:99:+1", words=("experts 0 to 23", "99"))
    refused("generate", folder, "--prompt", "a", "--max-new-tokens", 9999, words=("9999", "128"))
    refused("revert", folder, "--layers", "1", "--output", tmp_path / "r", words=("layer 1 is not converted",))
    refused("revert", folder, "--layers", "x", "--output", tmp_path / "r", words=("layers", "'x'"))
    refused(
        "revert",
        folder,
        "--layers",
        "0",
        "--output",
        tmp_path / "r",
        "--base",
        models["gpt2"],
        words=("--base", "not the base model"),
    )
    refused("revert", folder, "--layers", "0", "--output", folder, words=("exists already",))
    refused("verify", tmp_path / "nowhere", words=("nowhere", "no such folder"))
    refused("verify", folder, "--base", models["gpt2"], words=("--base", "not the base model"))


def test_a_newer_format_is_a_one_line_error(refused, copy):
    config = json.loads((copy / "config.json").read_text())
    config["mxd"]["format_version"] = FORMAT_VERSION + 1
    (copy / "config.json").write_text(json.dumps(config))
    refused("generate", copy, "--prompt", "a", words=(f"format version {FORMAT_VERSION + 1}", "Upgrade"))


def test_an_unwritable_output_is_refused(refused, recipe, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    refused("run", recipe(output={"dir": str(blocker)}), words=("is a file",))
    refused("run", recipe(output={"dir": str(blocker / "below")}), words=("can't be written",))


def test_committed_files_hold_no_local_path():
    """Recipes, docs and cards hold no absolute path."""
    files = [
        *ROOT.glob("recipes/*"),
        *ROOT.glob("docs/*"),
        *ROOT.glob("model_cards/*"),
        *ROOT.glob("examples/**/*.md"),
        ROOT / "README.md",
    ]
    assert len(files) > 10
    for path in files:
        if path.suffix in (".md", ".yaml", ".json"):
            assert not re.search(r"(?<![\w.}])/(home|root|tmp|work|Users|mnt|var)/", path.read_text()), path


def test_fresh_never_replaces_other_files(refused, recipe, tmp_path):
    project = tmp_path / "out"
    (project / ".git").mkdir(parents=True)
    (project / "main.py").write_text("mine")
    refused("run", recipe(), "--fresh", words=("not a converted checkpoint", "another output.dir"))
    assert (project / "main.py").read_text() == "mine"
    shutil.rmtree(project)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes").write_text("mine too")
    refused("run", recipe(), "--fresh", words=("out.partial", "has other files"))
    assert (tmp_path / "out.partial" / "notes").read_text() == "mine too"
    refused("run", recipe(), "--output", "/", words=("/", "another output.dir"))


def test_fresh_replaces_a_checkpoint_and_nothing_beside_it(mxd, converted, recipe, tmp_path):
    shutil.copytree(converted["gpt2"], tmp_path / "out")
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "notes").write_text("mine")
    assert mxd("run", recipe(layers=[1]), "--fresh")[0] == 0
    assert list(json.loads((tmp_path / "out" / "config.json").read_text())["mxd"]["layers"]) == ["1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.old", "recipe.yaml"]
    assert (tmp_path / "out.old" / "notes").read_text() == "mine"


def test_revert_keeps_an_unfinished_run_of_the_same_name(mxd, converted, tmp_path):
    (tmp_path / "r.partial" / "state").mkdir(parents=True)
    (tmp_path / "r.partial" / "state" / "step").write_text("precious")
    assert mxd("revert", converted["gpt2"], "--layers", "0", "--output", tmp_path / "r")[0] == 0
    assert (tmp_path / "r.partial" / "state" / "step").read_text() == "precious"
    assert (tmp_path / "r" / "recipe.yaml").is_file()


def damage_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        last, *rest = key.split("__")[::-1]
        target = config
        for part in rest[::-1]:
            target = target[part]
        target[last] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"mxd": 3},
        {"mxd": []},
        {"mxd__layers": {}},
        {"mxd__layers__0": None},
        {"mxd__layers__0__n_experts": "lots"},
        {"mxd__layers__0__k": 99},
        {"mxd__layers__0__kind": "other"},
        {"mxd__layers__99": {"d_in": 1, "d_hidden": 1, "d_out": 1, "n_experts": 1, "k": 1}},
        {"mxd__mlp": "nowhere.{i}"},
        {"architectures": 3},
        {"architectures": None},
        {"hidden_size": "x"},
        {"vocab_size": 77},
    ],
)
def test_a_damaged_config_is_refused(mxd, refused, copy, changes):
    damage_config(copy, **changes)
    refused("generate", copy, "--prompt", "a", words=("copy",))
    status, out, err = mxd("verify", copy)
    assert status == 1
    assert "FAILED" in out
    assert "Traceback" not in out + err


def test_damaged_side_files_are_refused(mxd, refused, copy, text, tmp_path):
    (copy / "recipe.yaml").write_text("data: 3")
    refused("eval", copy, "--data", text, words=("recipe.yaml", "not a section of a recipe"))
    (copy / "recipe.yaml").unlink()
    (copy / "mxd_local.json").write_text("[")
    refused("revert", copy, "--layers", "0", "--output", tmp_path / "r", words=("--base PATH",))
    (copy / "tokenizer.json").write_text("{")
    refused("generate", copy, "--prompt", "a", words=("tokenizer",))
    status, out, _ = mxd("verify", copy)
    assert status == 1
    assert "FAILED      its tokenizer loads and reads text" in out


def test_odd_text_files_are_read_or_refused(mxd, refused, recipe, tmp_path):
    odd = tmp_path / "odd.jsonl"
    odd.write_bytes(b"\xef\xbb\xbf" + b"".join(json.dumps({"text": f"a \ud800 {d}"}).encode() + b"\n" for d in documents()))
    assert mxd("run", recipe(data={"train": {"path": str(odd)}}, layers=[1]))[0] == 0  # half a surrogate pair, and a BOM
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\u00e9 ".encode("latin-1") * 500)
    refused("run", recipe(data={"train": {"path": str(latin)}}), "--fresh", words=("latin.txt", "not UTF-8"))
    deep = tmp_path / "deep.jsonl"
    deep.write_text("[" * 100_000 + "\n")
    refused("run", recipe(data={"train": {"path": str(deep)}}), "--fresh", words=("deep.jsonl",))


def test_odd_recipes_are_refused(refused, recipe, tmp_path):
    for setting, words in (
        ("layers=0-99999999999", ("out of range",)),
        ("train.seed=-1", ("train.seed",)),
        ("train.seed=99999999999999999999999", ("train.seed",)),
        ("train.batch_tokens=99999999999999999999", ("train.batch_tokens",)),
        ("train.lr=.inf", ("train.lr",)),
        ("data.tokens=1e6", ("data.tokens", "write 1_000_000")),
        ("data.eval.tokens=1", ("data.eval.tokens", "one block")),
        (".k=3", ("KEY=VALUE",)),
        ("train.tracker=wandb", ("train.tracker", "wandb", "not installed")),
        ("data.train.path=${NOWHERE}/a.txt", ("NOWHERE is not set",)),
    ):
        refused("plan", recipe(), "--set", setting, words=words)
    for content in ("? [a, b]\n: 3\n", "base: &a {model: *a}\n", "[" * 5000):
        path = tmp_path / "odd.yaml"
        path.write_text(content)
        refused("plan", path, words=("odd.yaml",))


def test_init_writes_a_model_path_valid_from_the_recipe(mxd, refused, models, tmp_path, monkeypatch):
    shutil.copytree(models["gpt2"], tmp_path / "model")
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    assert mxd("init", "model", "--output", "recipes/r.yaml")[0] == 0
    assert load_recipe("recipes/r.yaml").base.model == str(tmp_path / "model")
    refused("init", "model", "--output", "nowhere/r.yaml", words=("nowhere",))
    refused("init", "model", "--output", "recipes", "--force", words=("recipes", "exists"))


def test_generate_refuses_numbers_that_overflow(refused, converted):
    folder = converted["llama"]
    refused("generate", folder, "--prompt", "a", "--temperature", "nan", words=("--temperature",))
    refused("generate", folder, "--prompt", "a", "--steer", "0:1:1e300", words=("--steer", "exceeds"))
    refused("generate", folder, "--prompt", "a", "--seed", "99999999999999999999999", words=("--seed",))


def test_a_converted_base_is_refused_in_a_fresh_process(converted, recipe):
    command = [sys.executable, "-m", "mxd_convert.cli", "plan", str(recipe(base={"model": str(converted["gpt2"])}))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "already converted" in done.stderr

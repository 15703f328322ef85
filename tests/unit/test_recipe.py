"""Recipes are strict, give one-line errors, and resolve as documented."""

import json

import pytest
import yaml
from project import ROOT

from mxd_convert.errors import InputError
from mxd_convert.recipe.kinds import KINDS
from mxd_convert.recipe.load import load_recipe, parse_overrides, shipped_recipes
from mxd_convert.recipe.presets import resolve_layer, resolve_precision, resolve_train
from mxd_convert.recipe.schema import PRESET_KEYS, Recipe, json_schema, layer_indices

MINIMAL = {"base": {"model": "openai-community/gpt2"}}


def refused(content: dict, *words: str) -> None:
    with pytest.raises(InputError) as error:
        load_recipe({**MINIMAL, **content})
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_every_key_except_the_base_has_a_default():
    recipe = load_recipe(MINIMAL)
    assert recipe.data.context == 128
    assert recipe.data.tokens == 480_000_000
    assert recipe.layer.k == 32
    assert recipe.train.preset == "fast"
    with pytest.raises(InputError, match=r"base: missing"):
        load_recipe({})


@pytest.mark.parametrize(
    ("precision", "dtype", "native", "expected"),
    [
        ("auto", "float32", True, ("bf16", "bfloat16")),
        ("auto", "float32", False, ("fp32", "float32")),
        ("auto", "float16", True, ("bf16", "float16")),
        ("fp32", "float32", True, ("fp32", "float32")),
        ("bf16", "float32", False, ("bf16", "float32")),
    ],
)
def test_auto_is_bfloat16_where_the_device_multiplies_it(precision, dtype, native, expected):
    recipe = load_recipe({"base": {"model": "openai-community/gpt2", "dtype": dtype}, "train": {"precision": precision}})
    resolved = resolve_precision(recipe, native)
    assert (resolved.train.precision, resolved.base.dtype) == expected


def test_a_renamed_key_is_named_with_its_values():
    refused({"train": {"mask_bos": True}}, "this key is now train.mask", "none, bos, special, prompt")
    refused({"train": {"start": "tokens"}}, "this key is now train.init", "tokens or paper")


def test_mistakes_are_named_with_a_suggestion():
    refused({"layr": {}}, "layr", "'layer'")
    refused({"layer": {"exprts": 3}}, "layer.exprts", "'experts'")
    refused({"k": 3}, "belongs under layer:")
    refused({"layer": {"kind": "mdx"}}, "layer.kind", "'mxd'")
    refused({"layer": {"k": "many"}}, "layer.k", "integer")
    refused({"layer": {"k": 33, "experts": 32}}, "33", "32")
    refused({"train": {"lr": -1.0}}, "train.lr", "greater than 0")
    refused({"train": {"batch_tokens": 64}}, "train.batch_tokens", "128")
    refused({"data": {"context": 1}}, "data.context")
    refused({"layers": "3-1"}, "backwards")
    refused({"layers": [1, 1]}, "twice")
    refused({"layers": []}, "empty")
    refused({"layers": "first"}, "first")
    refused({"base": "gpt2"}, "base")


def test_a_kind_has_one_name():
    refused({"layer": {"kind": "transcoder", "skip": True}}, "layer.skip", "skip_transcoder")


def test_numbers_follow_yaml_1_2(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("base: {model: a/b, revision: no}\ntrain: {lr: 2e-3}\ndata: {tokens: 1_000_000}\n")
    recipe = load_recipe(path)
    assert recipe.train.lr == 0.002
    assert recipe.data.tokens == 1_000_000
    assert recipe.base.revision == "no"


def test_damaged_recipes_are_one_line_errors(tmp_path):
    for content, words in (
        ("base: {model: a", "line"),
        ("- a\n- b\n", "mapping"),
        ("", "nothing"),
        ("base: {model: a}\nbase: {model: b}\n", "twice"),
    ):
        path = tmp_path / "r.yaml"
        path.write_text(content)
        with pytest.raises(InputError, match=words) as error:
            load_recipe(path)
        assert "\n" not in str(error.value)


def test_overrides_take_precedence_over_the_file_and_a_preset_over_its_keys(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("base: {model: a/b}\ntrain: {preset: fast, lr: 3e-3, seed: 5}\n")
    assert load_recipe(path, {"train.lr": 1e-3}).train.lr == 1e-3
    assert load_recipe(path).train.lr == 3e-3
    paper = load_recipe(path, {"train.preset": "paper"}).train
    assert (paper.lr, paper.seed) == (None, 5)
    assert load_recipe(path, {"train.preset": "paper", "train.lr": 7e-4}).train.lr == 7e-4
    assert parse_overrides(["train.lr=2e-3", "layers=0-2", "layer.skip=true", "data.eval.path=null"]) == {
        "train.lr": 0.002, "layers": "0-2", "layer.skip": True, "data.eval.path": None,
    }  # fmt: skip
    with pytest.raises(InputError, match="KEY=VALUE"):
        parse_overrides(["train.lr"])
    with pytest.raises(InputError, match="did you mean 'lr'"):
        load_recipe(path, {"train.lrr": 1})


def test_paths_are_relative_to_the_recipe_and_variables_are_expanded(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "model").mkdir()
    path = tmp_path / "recipes" / "r.yaml"
    path.write_text(
        "base: {model: ../model}\ndata: {train: {path: '${TEXTS}/a.txt'}, eval: {path: '${NONE:-b.txt}'}}\noutput: {dir: out}\n"
    )
    monkeypatch.setenv("TEXTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path, {"output.dir": "elsewhere"})
    assert recipe.base.model == str(tmp_path / "model")
    assert recipe.data.train.path == str(tmp_path / "a.txt")
    assert recipe.data.eval.path == str(tmp_path / "recipes" / "b.txt")
    assert recipe.output.dir == str(tmp_path / "elsewhere")
    monkeypatch.delenv("TEXTS")
    with pytest.raises(InputError, match="TEXTS is not set"):
        load_recipe(path)


def test_published_recipes_hold_no_local_path(tmp_path):
    (tmp_path / "model").mkdir()
    recipe = load_recipe(
        {
            "base": {"model": str(tmp_path / "model")},
            "data": {"train": {"path": str(tmp_path / "t.txt")}},
            "output": {"dir": str(tmp_path / "o")},
        }
    )
    text = recipe.to_yaml()
    assert str(tmp_path) not in text
    assert yaml.safe_load(text)["data"]["train"]["path"] == "t.txt"
    Recipe.model_validate(yaml.safe_load(text))  # written back in full, so it reads again


def test_layer_ranges_are_parsed():
    assert layer_indices("all", 3) == [0, 1, 2]
    assert layer_indices("0-1,3", 4) == [0, 1, 3]
    assert layer_indices([2, 0], 4) == [0, 2]
    assert layer_indices(2, 4) == [2]
    with pytest.raises(ValueError, match="layers 0 to 3"):
        layer_indices([4], 4)


def test_presets_fill_in_open_keys():
    open_recipe = load_recipe({**MINIMAL, "layer": {"k": 32}})
    paper = resolve_train(load_recipe({**MINIMAL, "layer": {"k": 32}, "train": {"preset": "paper"}}), 768, 21_490).train
    expected = {"lr": 1e-4, "batch_tokens": 4096, "warmup_steps": 5000, "schedule": "constant", "init": "paper"}
    assert {key: getattr(paper, key) for key in PRESET_KEYS["train"]} == {
        **expected,
        "k_init": 32,
        "joint": 0.0,
        "joint_lr": 2e-5,
        "jacobian": 0.0,
        "balance": 0.0,
    }
    fast = resolve_train(resolve_layer(open_recipe, 1024), 256, 7168).train
    expected = {"lr": 5e-3, "batch_tokens": 4096, "warmup_steps": 3515, "schedule": "trapezoid", "init": "tokens"}
    assert {key: getattr(fast, key) for key in PRESET_KEYS["train"]} == {
        **expected,
        "k_init": 128,
        "joint": 0.4,
        "joint_lr": 2.5e-4,
        "jacobian": 0.02,
        "balance": 0.75,
    }
    other = resolve_train(load_recipe({**MINIMAL, "layer": {"kind": "skip_transcoder"}}), 256, 7168).train
    assert (other.lr, other.joint_lr, other.jacobian, other.balance) == (5e-3, 1e-3, 0.0, 0.0)
    assert resolve_train(load_recipe({**MINIMAL, "layer": {"sparsity": "l1"}}), 64, 50).train.joint == 0
    assert resolve_train(open_recipe, 64, 50).train.k_init == 50
    own = load_recipe({**MINIMAL, "train": {"init": "paper", "k_init": 40, "lr": 1e-3}})
    assert (resolve_train(own, 64, 50).train.init, resolve_train(own, 64, 50).train.k_init) == ("paper", 40)


@pytest.mark.parametrize("kind", [*KINDS])
def test_the_preset_sets_hidden_width_and_shared_expert(kind):
    layer = resolve_layer(load_recipe({**MINIMAL, "layer": {"k": 4, "kind": kind}}), 172).layer
    assert (layer.hidden, layer.shared_expert) == (43 if kind == "dense_assisted" else None, kind in ("mxd", "random_gate"))
    paper = resolve_layer(load_recipe({**MINIMAL, "layer": {"kind": kind}, "train": {"preset": "paper"}}), 172).layer
    assert (paper.hidden, paper.shared_expert) == (None, False)
    own = resolve_layer(load_recipe({**MINIMAL, "layer": {"kind": kind, "hidden": 99, "shared_expert": False}}), 172).layer
    assert (own.hidden, own.shared_expert) == (99, False)


def test_only_a_product_can_have_a_shared_expert():
    refused(
        {"layer": {"kind": "transcoder", "shared_expert": True}}, "layer.shared_expert: true", "transcoder", "layer.kind: mxd"
    )


def test_a_preset_on_the_command_line_takes_precedence_over_the_hidden_width_of_the_file():
    plain = load_recipe({**MINIMAL, "layer": {"hidden": 40}}, {"train.preset": "paper"})
    assert plain.layer.hidden is None
    assert load_recipe({**MINIMAL}, {"train.preset": "paper", "layer.hidden": 40}).layer.hidden == 40


def test_the_recipes_of_the_paper_have_its_settings():
    expected = {
        "gpt2-paper": (8, 21_490),
        "pythia-410m-paper": (15, 28_658),
        "pythia-1.4b-paper": (12, 57_330),
        "llama-3.2-3b-paper": (12, 86_015),
    }
    for name, (layer, experts) in expected.items():
        recipe = load_recipe(name)
        assert (recipe.layers, recipe.layer.experts, recipe.layer.k) == ([layer], experts, 32)
        assert (recipe.data.tokens, recipe.data.context, recipe.train.preset) == (480_000_000, 128, "paper")


def test_every_shipped_recipe_is_valid_and_says_whether_it_was_run():
    for name in shipped_recipes():
        recipe = load_recipe(name)
        assert recipe.output.dir.endswith(name)
        on_hub = not recipe.base.is_local
        second = (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines()[1]
        assert on_hub == ("Not run yet." in second or "Run: docs/results/" in second), name


def test_recipes_found_by_name_write_into_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart").output.dir == str(tmp_path / "runs" / "quickstart")
    with pytest.raises(InputError, match="did you mean 'quickstart'"):
        load_recipe("quikstart")


def test_the_schema_in_docs_is_current():
    assert json.loads((ROOT / "docs" / "recipe.schema.json").read_text()) == json_schema()


@pytest.mark.parametrize("name", ["quickstart", "stories260k"])
def test_a_new_key_leaves_the_hash_of_earlier_recipes_as_it_was(name):
    """One of the committed cards was made before the newest keys; `verify` compares these hashes."""
    folder = ROOT / "model_cards" / name
    recorded = json.loads((folder / "mxd_report.json").read_text())["recipe_sha256"]
    assert load_recipe(folder / "recipe.yaml").published_sha256() == recorded
    other = not load_recipe(folder / "recipe.yaml").layer.shared_expert
    for changes in ({"train.jacobian": 0.1}, {"train.joint_lr": 1e-3}, {"train.balance": 0.5}, {"layer.shared_expert": other}):
        assert load_recipe(folder / "recipe.yaml", changes).published_sha256() != recorded

"""Families without a row are described in the recipe; code of a base model is saved with its conversion."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from project import QUICKSTART
from small_runs import TEXT, small_recipe
from tiny_models import SIZES, save_tiny, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import mxd_convert
from mxd_convert import InputError
from mxd_convert.base_model.detect import guess
from mxd_convert.base_model.families import ARCHITECTURES, architecture_of, find_sites
from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.base_model.remote_code import is_trusted
from mxd_convert.checkpoint.read import load_checkpoint
from mxd_convert.recipe.load import load_recipe
from mxd_convert.recipe.schema import Mlp

IDS = torch.randint(1, 2048, (2, 12), generator=torch.Generator().manual_seed(3))
EXAONE = {
    "module": "model.layers.{i}.mlp",
    "up": "up_proj",
    "gate": "gate_proj",
    "down": "down_proj",
    "activation": "silu",
    "norm": "model.norm",
}
XGLM = {"module": "model.layers.{i}", "up": "fc1", "down": "fc2", "activation": "gelu", "chain": ["fc1", "activation_fn", "fc2"]}


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(str(QUICKSTART))


def converted_by(recipe, folder):
    return mxd_convert.convert(recipe, folder, quiet=True).output


# --- described in the recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "mlp"), [("exaone4", EXAONE), ("xglm", XGLM)])
def test_a_family_without_a_row_is_converted(family, mlp, tokenizer, text, tmp_path, mxd):
    """`base.mlp` is enough to convert, verify with and without the package, evaluate, steer and revert."""
    base = save_tiny(family, tmp_path / "base", tokenizer)
    assert family not in ARCHITECTURES
    recipe = small_recipe(base, text, tmp_path / "out", layers=[1], base={"model": str(base), "mlp": mlp})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    status, out, err = mxd("plan", tmp_path / "recipe.yaml")
    assert status == 0, err
    assert f"MLPs      {mlp['module']}: {mlp['activation']}({mlp.get('gate', mlp['up'])})" in out  # its result
    status, out, err = mxd("plan", tmp_path / "recipe.yaml", "--json")
    assert json.loads(out)["layers"][0]["path"] == mlp["module"].format(i=1) + (".fc1" if "chain" in mlp else "")
    assert mxd("run", tmp_path / "recipe.yaml")[0] == 0
    checks = mxd_convert.verify(tmp_path / "out").checks
    assert [check for check in checks if not check.ok] == []
    figures = mxd_convert.evaluate(tmp_path / "out", text, tokens=512, quiet=True)
    assert figures["fidelity"]["ce_converted"] > 0
    kept = json.loads((tmp_path / "out" / "config.json").read_text())["mxd"]["base"]["mlp"]
    assert Mlp(**kept) == Mlp(**mlp)
    assert load_recipe(tmp_path / "out" / "recipe.yaml").base.mlp == Mlp(**mlp)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The package loads the model with `mxd_convert.load(name)`" in card
    assert card.count("AutoModelForCausalLM.from_pretrained(name") == 1  # with trust_remote_code
    plain = mxd_convert.generate(tmp_path / "out", TEXT, max_new_tokens=8)
    assert mxd_convert.generate(tmp_path / "out", TEXT, [{"layer": 1, "expert": 3, "add": 50.0}], 8) != plain
    reverted = mxd_convert.revert(tmp_path / "out", "all", tmp_path / "reverted")
    theirs, ours = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (base, reverted))
    assert ours(input_ids=IDS).logits.equal(theirs(input_ids=IDS).logits)
    delta = mxd_convert.delta(tmp_path / "out", tmp_path / "delta").output
    again = mxd_convert.apply(delta, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_init_finds_the_mlp(tokenizer, text, tmp_path, mxd):
    base = save_tiny("exaone4", tmp_path / "base", tokenizer)
    assert mxd("init", base, "--output", tmp_path / "mine.yaml")[0] == 0
    assert load_recipe(tmp_path / "mine.yaml").base.mlp == Mlp(**EXAONE)
    recipe = load_recipe(small_recipe(base, text, tmp_path / "out", base={"model": str(base)}))
    with pytest.raises(InputError, match=r"exaone4.*\n.*looks like its MLP: base.mlp: .*gate_proj"):
        mxd_convert.make_plan(recipe)


@pytest.mark.parametrize("family", [name for name in ARCHITECTURES if name not in ("bloom", "opt")])
def test_init_finds_the_row_of_a_known_family(family):
    model = tiny_model(family)
    found, row = guess(model, model.config), ARCHITECTURES[family]
    assert found is not None
    ours = (found.module, found.up, found.gate, found.down, found.norm)
    assert ours == (row.mlp, row.up, row.gate, row.down, row.norm)
    assert found.activation == getattr(model.config.get_text_config(), row.activation)


def test_wrong_descriptions_are_one_line_errors(tokenizer, text, tmp_path, refused):
    base = save_tiny("exaone4", tmp_path / "base", tokenizer)

    def refuse(words, **changes):
        mlp = {**EXAONE, **changes}
        (tmp_path / "recipe.yaml").write_text(
            yaml.safe_dump(small_recipe(base, text, tmp_path / "out", base={"model": str(base), "mlp": mlp}))
        )
        refused("plan", tmp_path / "recipe.yaml", words=words)

    refuse(("no model.layers.0.ffn", "looks like its MLP", "up_proj"), module="model.layers.{i}.ffn")
    refuse(("no model.layers.0.mlp.w1",), up="w1")
    refuse(("base.mlp.module", "{i}"), module="model.layers.0.mlp")
    refuse(("activation 'sillu'", "gelu"), activation="sillu")
    refuse(("48 hidden units", "takes 32"), down="up_proj", up="gate_proj", gate=None)
    refuse(("act_fn", "expected a linear projection"), down="act_fn")
    refuse(("base.mlp.chain", "alone"), chain=["up_proj"])
    refuse(("base.mlp.gates", "unknown key", "gate"), gates="gate_proj")


def test_models_that_can_not_be_converted_are_named(tmp_path, refused, text):
    """The error names the kind of model, the supported families and the place for a new one."""
    for config, words in (
        ({"model_type": "mixtral"}, ("'mixtral'", "mixtures of experts already")),
        ({"model_type": "qwen3_moe"}, ("'qwen3_moe'", "mixtures of experts already")),
        ({"model_type": "bert"}, ("'bert'", "no causal language model")),
        ({"model_type": "t5"}, ("'t5'", "encoder-decoder")),
    ):
        folder = tmp_path / config["model_type"]
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small_recipe(folder, text, tmp_path / "out")))
        everywhere = (
            "Supported: bloom, cohere, falcon",
            "stablelm",
            "mxd_convert/base_model/families.py",
            "docs/add-a-family.md",
        )
        for command in ("plan", "run"):
            refused(command, tmp_path / "recipe.yaml", words=(*words, *everywhere))
        refused("init", folder, "--output", tmp_path / "mine.yaml", words=(*words, *everywhere))
    assert not (tmp_path / "mine.yaml").exists()


# --- code of its own --------------------------------------------------------------------------------------------------------------

CODE = {
    "configuration_odd.py": """
from transformers import LlamaConfig


class OddConfig(LlamaConfig):
    model_type = "odd"
""",
    "parts_odd.py": """
import torch
from torch import nn


class OddMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.into = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.out_of = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.into(x).chunk(2, dim=-1)
        return self.out_of(torch.relu(gate) * up)
""",
    "modeling_odd.py": """
from transformers import LlamaForCausalLM, LlamaModel

from .configuration_odd import OddConfig
from .parts_odd import OddMLP


class OddModel(LlamaModel):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            layer.mlp = OddMLP(config)
        self.post_init()


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = OddModel(config)
        self.post_init()
""",
}
ODD = {
    "module": "model.layers.{i}.mlp",
    "up": "into",
    "gate": "into",
    "down": "out_of",
    "activation": "relu",
    "norm": "model.norm",
}


@pytest.fixture(scope="session")
def odd(tmp_path_factory, tokenizer):
    """Save a model whose class is in its own files."""
    folder = tmp_path_factory.mktemp("odd") / "odd-lm"
    folder.mkdir()
    for name, content in CODE.items():
        (folder / name).write_text(content)
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    config = {key: SIZES[key] for key in keys} | {"max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0}
    config |= {
        "model_type": "odd",
        "architectures": ["OddForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    made = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    AutoModelForCausalLM.from_config(made, trust_remote_code=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def odd_converted(odd, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd-converted") / "out"
    base = {"model": str(odd), "trust_remote_code": True, "mlp": ODD}
    return converted_by(small_recipe(odd, text, folder, layers=[1], base=base), folder)


def test_a_base_with_code_of_its_own_is_converted(odd, odd_converted, text, tmp_path, mxd):
    """If it is trusted, the model is evaluated, verified without the package, edited and reverted."""
    names = {path.name for path in odd_converted.glob("*.py")}
    glue = {"configuration_mxd_base.py", "modeling_mxd_base.py"}
    assert names == {*CODE, *glue, "configuration_mxd.py", "layers_mxd.py", "modeling_mxd.py", "steering_mxd.py"}
    card = (odd_converted / "README.md").read_text()
    assert "including the base model's own" in card
    assert "mxd-convert --trust-remote-code inspect full" in card
    content = json.loads((odd_converted / "config.json").read_text())
    assert content["model_type"] == "mxd_own_odd"
    assert content["auto_map"]["AutoModelForCausalLM"] == "modeling_mxd_base.MxdOddForCausalLM"
    status, _, err = mxd("--trust-remote-code", "eval", odd_converted, "--data", text, "--tokens", 512, "--json")
    assert status == 0, err
    assert not is_trusted()  # trust was limited to that command
    checks = mxd_convert.verify(odd_converted, trust_remote_code=True).checks
    assert [check for check in checks if not check.ok] == []
    with mxd_convert.trusting():
        model = load_checkpoint(odd_converted)
        assert sorted(model.mxd_layers()) == [1]
        edited = mxd_convert.edit(odd_converted, tmp_path / "edited", [{"layer": 1, "expert": 3, "ablate": True}])
        assert not load_checkpoint(edited).mxd_layers()[1].experts[3].any()
        delta = mxd_convert.delta(odd_converted, tmp_path / "delta").output
        again = mxd_convert.apply(delta, tmp_path / "again")
        assert (again / "model.safetensors").read_bytes() == (odd_converted / "model.safetensors").read_bytes()
        reverted = mxd_convert.revert(odd_converted, "all", tmp_path / "reverted")
    assert {path.name for path in reverted.glob("*.py")} == set(CODE)
    theirs, ours = (AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval() for folder in (odd, reverted))
    assert ours(input_ids=IDS).logits.equal(theirs(input_ids=IDS).logits)


def test_the_logits_are_the_same_without_the_package(odd_converted):
    code = (
        "import sys, json, torch\n"
        "sys.modules['mxd_convert'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "print(json.dumps(model(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits.tolist()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(odd_converted), json.dumps(IDS.tolist())],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    with mxd_convert.trusting(), torch.no_grad():
        ours = load_checkpoint(odd_converted)(input_ids=IDS).logits
    assert (torch.tensor(json.loads(done.stdout)) - ours).abs().max() < 1e-5


def test_code_runs_only_if_it_is_trusted(programs, odd, odd_converted, text, tmp_path):
    """Code of a base and of a checkpoint would write a file, in processes that did not trust it before."""
    mark = tmp_path / "it ran"
    for folder in (odd, odd_converted):
        copy = shutil.copytree(folder, tmp_path / folder.name)
        for file in copy.glob("*.py"):
            file.write_text(f"open({str(mark)!r}, 'w').close()\n{file.read_text()}")
    recipe = small_recipe(tmp_path / "odd-lm", text, tmp_path / "new", base={"model": str(tmp_path / "odd-lm"), "mlp": ODD})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    checkpoint = tmp_path / odd_converted.name
    for command, words in (
        (("plan", tmp_path / "recipe.yaml"), ("odd-lm", "trust_remote_code")),
        (("eval", checkpoint, "--data", text), ("custom code", "--trust-remote-code before the command")),
        (("generate", checkpoint, "--prompt", "a"), ("custom code",)),
        (("verify", checkpoint), ("custom code",)),
    ):
        done = programs.run(*command)
        assert done.status == 2, done.err
        assert len(done.err.strip().splitlines()) <= 2, done.err
        for word in words:
            assert word in done.err
    assert not mark.exists()


def test_the_description_is_read_from_a_checkpoint(odd_converted):
    with mxd_convert.trusting():
        config = mxd_convert.checkpoint.read.read_config(odd_converted)
    row = architecture_of(config)
    assert (row.mlp, row.up, row.gate, row.down) == ("model.layers.{i}.mlp", "into", "into", "out_of")
    with mxd_convert.trusting():
        base = AutoModelForCausalLM.from_pretrained(odd_converted, trust_remote_code=True)
    with pytest.raises(InputError, match=r"has no model\.layers\.1\.mlp\.into"):
        find_sites(base, config, [1])  # the description is of the base, not of the conversion

"""The promise: a GGUF file is a base model like any other."""

import io
import json
import os
import sys

import gguf
import pytest
import torch
import yaml
from gguf_files import write_gguf
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from small_runs import small_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

import mxd_convert
from mxd_convert.base_model.gguf import from_gguf
from mxd_convert.base_model.load import base_tokenizer, card_of, load_base, load_config, model_sha256
from mxd_convert.errors import InputError
from mxd_convert.recipe.load import load_recipe
from mxd_convert.recipe.schema import Base

IDS = torch.arange(60).reshape(2, 30) * 7 % 2048


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return {kind: write_gguf(models["llama"], folder / f"tiny-{kind}.gguf", kind) for kind in ("F32", "F16", "Q8_0", "Q4_1")}


def test_an_unquantised_file_gives_the_models_tensors_bit_for_bit(files, models):
    base = load_base(Base(model=str(files["F32"])), dtype="auto")
    original = load_base(Base(model=str(models["llama"])), dtype="auto")
    assert model_sha256(base) == model_sha256(original)
    with torch.no_grad():
        torch.testing.assert_close(base(IDS).logits, original(IDS).logits, rtol=0, atol=1e-5)


def test_the_tokenizer_is_the_models(files, models):
    ours, theirs = base_tokenizer(Base(model=str(files["Q8_0"]))), AutoTokenizer.from_pretrained(models["llama"])
    text = "def f(x):\n    return x + 1  # the value is returned"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert (ours.bos_token_id, ours.eos_token_id) == (0, 0)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("Q8_0", "bfloat16"), ("Q4_1", "bfloat16")])
def test_matrices_keep_their_dtype_unless_they_are_quantised(files, kind, dtype):
    base = Base(model=str(files[kind]))
    assert str(load_config(base).dtype) == f"torch.{dtype}"
    assert str(load_base(base, dtype="auto").dtype) == f"torch.{dtype}"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_quantised_weights_are_those_of_the_files_blocks(files, kind):
    """The blocks are decoded here by their definition: a scale, for Q4_1 a minimum, and 32 numbers."""
    reader = gguf.GGUFReader(files[kind])
    stored = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_gate.weight")
    blocks = torch.from_numpy(stored.data.copy()).reshape(-1, {"Q8_0": 34, "Q4_1": 20}[kind])
    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    if kind == "Q8_0":
        values = scale * blocks[:, 2:].contiguous().view(torch.int8).float()
    else:
        least = blocks[:, 2:4].contiguous().view(torch.float16).float()
        values = scale * torch.cat([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], 1).float() + least
    weight = load_base(Base(model=str(files[kind])), dtype="auto").state_dict()["model.layers.1.mlp.gate_proj.weight"]
    assert torch.equal(weight, values.reshape(weight.shape).bfloat16())


def test_a_file_is_dequantised_once(files, monkeypatch):
    base = Base(model=str(files["Q8_0"]))
    first = from_gguf(base)
    monkeypatch.setattr("mxd_convert.base_model.gguf._dequantise", None)  # a second call would fail
    assert from_gguf(base) == first
    assert first.gguf_file is None


@pytest.mark.parametrize("silent", [True, False])
def test_dequantisation_says_what_it_does(models, text, tmp_path, capfd, silent):
    number = int.from_bytes(os.urandom(2), "big")  # a file that is not in the cache yet
    file = write_gguf(models["llama"], tmp_path / "new.gguf", "Q8_0", general__quantization_version=number)
    capfd.readouterr()
    from_gguf(Base(model=str(file)), silent)
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == ("" if silent else "dequantising new.gguf into the cache\n")


def test_a_terminal_shows_a_bar_with_a_clock(models, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    number = int.from_bytes(os.urandom(2), "big")
    file = write_gguf(models["llama"], tmp_path / "new.gguf", "Q8_0", general__quantization_version=number)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    from_gguf(Base(model=str(file)))
    shown = sys.stderr.getvalue()
    assert "dequantising new.gguf into the cache" in shown
    assert "100%" in shown
    assert "0:00:0" in shown


def test_the_licence_is_the_files_own(files):
    assert card_of(Base(model=str(files["Q4_1"]))) == {"license": "apache-2.0"}


def test_a_conversion_of_a_gguf_file_is_verified_packed_restored_and_reverted(files, text, tmp_path):
    file = files["Q4_1"]
    output = tmp_path / "converted"
    result = mxd_convert.convert(small_recipe(file, text, output), quiet=True)
    config = json.loads((output / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["mxd"]["base"]["gguf_file"] == config["mxd"]["base"]["model"] == file.name
    assert result.report["base"]["model"] == file.name
    assert file.name in (output / "README.md").read_text()
    assert str(file.parent) not in (output / "recipe.yaml").read_text()
    assert mxd_convert.verify_provenance(output).ok
    (output / "mxd_local.json").unlink()  # as on another machine
    with pytest.raises(InputError, match=f"{file.name} was local"):
        mxd_convert.delta(output, tmp_path / "delta")
    assert mxd_convert.verify(output, base=str(file)).ok
    mxd_convert.delta(output, tmp_path / "delta", base=str(file.parent))
    mxd_convert.apply(tmp_path / "delta", tmp_path / "restored", base=str(file))
    assert (tmp_path / "restored" / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    mxd_convert.revert(output, [0, 1, 2], tmp_path / "reverted", base=str(file))
    reverted, base = load_file(tmp_path / "reverted" / "model.safetensors"), load_base(Base(model=str(file)), dtype="auto")
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in reverted.items())
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "reverted")).__name__ == "LlamaForCausalLM"


def test_a_gguf_path_in_an_override_replaces_file_and_folder(files, tmp_path):
    recipe = {"base": {"model": str(tmp_path), "gguf_file": "other.gguf"}}
    loaded = load_recipe(recipe, {"base.model": str(files["F16"])})
    assert (loaded.base.model, loaded.base.gguf_file) == (str(files["F16"].parent), files["F16"].name)
    named = load_recipe({"base": {"model": str(files["F16"].parent), "gguf_file": files["F16"].name}})
    assert named.base == loaded.base
    assert load_recipe({"base": {"model": "owner/name/tiny.gguf"}}).base.path == "owner/name/tiny.gguf"
    assert load_recipe({"base": {"model": "owner/name/tiny.gguf"}}).base.model == "owner/name"


def _cut(file, path, size):
    path.write_bytes(file.read_bytes()[:size])
    return path


def test_bad_files_are_refused_in_one_line(files, models, tmp_path, refused):
    (tmp_path / "text.gguf").write_text("not a model")
    (tmp_path / "empty").mkdir()
    bad = {
        write_gguf(models["llama"], tmp_path / "unknown.gguf", architecture="weird"): "architecture 'weird'",
        write_gguf(models["llama"], tmp_path / "split.gguf", split__count=3): "one of 3 parts of a split GGUF file",
        _cut(files["Q4_1"], tmp_path / "cut.gguf", os.path.getsize(files["Q4_1"]) // 2): "truncated: it has",
        _cut(files["Q4_1"], tmp_path / "header.gguf", 200): "not a readable GGUF file",
        tmp_path / "text.gguf": "not a readable GGUF file",
        tmp_path / "missing.gguf": "no such file",
        files["F32"].parent: "Set base.gguf_file to tiny-F16.gguf or tiny-F32.gguf or tiny-Q4_1.gguf",
    }
    for path, message in bad.items():
        said = refused("plan", "quickstart", "--set", f"base.model={path}", words=(message, str(path)))
        assert len(said.strip().splitlines()) == 1


def test_a_file_on_the_hub_is_named_by_its_repository(hub, program, files, text, tmp_path):
    commit = (
        hub.put("bob/tiny-gguf", {"tiny-Q4_1.gguf": files["Q4_1"].read_bytes(), "README.md": b"---\nlicense: mit\n---\n"})
        .refs["main"][-1]
        .oid
    )
    recipe = small_recipe("bob/tiny-gguf/tiny-Q4_1.gguf", text, tmp_path / "out", layers=[0])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = program("run", tmp_path / "recipe.yaml")
    assert done.status == 0, done.err
    base = json.loads((tmp_path / "out" / "mxd_report.json").read_text())["base"]
    assert (base["model"], base["gguf_file"], base["revision"], base["license"]) == (
        "bob/tiny-gguf",
        "tiny-Q4_1.gguf",
        commit,
        "mit",
    )
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == "bob/tiny-gguf"
    assert program("push", tmp_path / "out", "alice/of-a-gguf").status == 0  # verified against the base from the Hub
    assert "quantization_config" not in json.loads(hub.files("alice/of-a-gguf")["config.json"])

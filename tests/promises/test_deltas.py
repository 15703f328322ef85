"""A delta holds the tensors that the base lacks; with the base it restores the checkpoint exactly."""

import json
import shutil

import pytest
import torch
from folders import contents
from hub_client import logits_of
from safetensors.torch import load_file, save_file
from small_runs import FAMILIES

from mxd_convert import InputError, apply, delta, load, load_checkpoint
from mxd_convert.base_model.load import untied_tensors


def of_the_checkpoint(folder):
    """Return all files except the one with local paths."""
    return {path: content for path, content in contents(folder).items() if path != "mxd_local.json"}


@pytest.mark.parametrize("family", FAMILIES)
def test_apply_restores_the_files_of_the_checkpoint(converted, models, family, tmp_path):
    folder = converted[family]
    made = delta(folder, tmp_path / "delta")
    own = load_file(tmp_path / "delta" / "layers.safetensors")
    assert made.tensors == len(own)
    assert {name.split(".mlp.")[0].rpartition(".")[2] for name in own} == {"0", "2"}
    assert all(".mlp." in name for name in own)
    assert not list((tmp_path / "delta").rglob("model*.safetensors"))
    for base in (None, str(models[family])):
        output = apply(tmp_path / "delta", tmp_path / f"full-{base is None}", base)
        assert of_the_checkpoint(output) == of_the_checkpoint(folder)
    assert made.size == sum(path.stat().st_size for path in (tmp_path / "delta").rglob("*") if path.is_file())


def test_a_sharded_checkpoint_with_tied_weights_is_restored(converted, tmp_path):
    model = load_checkpoint(converted["gpt2"])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shutil.copyfile(converted["gpt2"] / "mxd_local.json", tmp_path / "sharded" / "mxd_local.json")
    delta(tmp_path / "sharded", tmp_path / "delta")
    assert of_the_checkpoint(apply(tmp_path / "delta", tmp_path / "full")) == of_the_checkpoint(tmp_path / "sharded")


@pytest.mark.parametrize("family", FAMILIES)
def test_load_accepts_a_delta(converted, family, tmp_path):
    delta(converted[family], tmp_path / "delta")
    ours, theirs = load(str(tmp_path / "delta")), load_checkpoint(converted[family])
    tensors = untied_tensors(theirs)
    assert untied_tensors(ours).keys() == tensors.keys()
    assert all(tensor.equal(tensors[name]) for name, tensor in untied_tensors(ours).items())
    ids = torch.arange(1, 13).reshape(1, -1)
    assert ours(input_ids=ids).logits.equal(theirs(input_ids=ids).logits)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert ours.generate(ids, **options).equal(theirs.generate(ids, **options))
    assert load(converted[family]).config.mxd == ours.config.mxd


def test_a_delta_holds_fine_tuned_tensors_outside_the_layers(converted, tmp_path):
    model = load_checkpoint(converted["llama"])
    model.model.norm.weight += 0.25
    shutil.copytree(converted["llama"], tmp_path / "tuned")
    model.save_pretrained(tmp_path / "tuned")
    delta(tmp_path / "tuned", tmp_path / "delta")
    assert "model.norm.weight" in load_file(tmp_path / "delta" / "layers.safetensors")
    assert of_the_checkpoint(apply(tmp_path / "delta", tmp_path / "full")) == of_the_checkpoint(tmp_path / "tuned")


def test_wrong_bases_and_folders_are_refused(refused, converted, models, tmp_path):
    delta(converted["llama"], tmp_path / "delta")
    other = tmp_path / "other"
    shutil.copytree(models["llama"], other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 0.25
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    words = ("not the base model of this delta", "--base")
    refused("apply", tmp_path / "delta", tmp_path / "full", "--base", other, words=words)
    refused("delta", converted["llama"], tmp_path / "d", "--base", other, words=("not the base model of this checkpoint",))
    assert not (tmp_path / "full").exists()
    refused("apply", converted["llama"], tmp_path / "full", words=("not a delta",))
    refused("eval", tmp_path / "delta", "--data", "x.txt", words=("a delta", "mxd-convert apply"))
    refused("delta", converted["llama"], tmp_path / "delta", words=("exists already",))
    damaged = tmp_path / "damaged"
    shutil.copytree(tmp_path / "delta", damaged)
    (damaged / "full" / "tokenizer.json").write_text("{}")
    refused("apply", damaged, tmp_path / "full", words=("tokenizer.json doesn't have the recorded hash",))
    (damaged / "layers.safetensors").write_bytes((damaged / "layers.safetensors").read_bytes()[:-10])
    refused("apply", damaged, tmp_path / "full", words=("layers.safetensors", "truncated or damaged"))
    content = json.loads((damaged / "mxd_delta.json").read_text())
    (damaged / "mxd_delta.json").write_text(json.dumps({**content, "format_version": 9}))
    refused("apply", damaged, tmp_path / "full", words=("format 9", "Upgrade mxd-convert"))
    content["files"]["../outside"] = "0"
    (damaged / "mxd_delta.json").write_text(json.dumps(content))
    refused("apply", damaged, tmp_path / "full", words=("can't be read",))
    assert not (tmp_path / "full").exists()


def test_a_delta_is_pushed_to_the_hub_and_loaded_from_it(program, programs, converted, models, tmp_path):
    assert program("delta", converted["llama"], tmp_path / "delta").status == 0
    done = program("push", tmp_path / "delta", "alice/a-delta")
    assert done.status == 0, done.err
    load_it = f"mxd_convert.load(name, base={str(models['llama'])!r})"
    theirs = logits_of(programs, "alice/a-delta", tmp_path / "a", load_it, "import mxd_convert")
    ours = logits_of(programs, converted["llama"], tmp_path / "b", "mxd_convert.load(name)", "import mxd_convert")
    assert ours.equal(theirs)
    assert program("pull", "alice/a-delta", tmp_path / "pulled").status == 0
    assert program("apply", tmp_path / "pulled", tmp_path / "full", "--base", models["llama"]).status == 0
    assert (tmp_path / "full" / "model.safetensors").read_bytes() == (converted["llama"] / "model.safetensors").read_bytes()


def test_the_delta_of_the_story_model_is_small(stories, tmp_path):
    made = delta(stories.output, tmp_path / "delta")
    assert made.size < made.full_size
    assert of_the_checkpoint(apply(tmp_path / "delta", tmp_path / "full")) == of_the_checkpoint(stories.output)


@pytest.mark.parametrize(
    "change",
    [
        {"base": None},
        {"files": []},
        {"format_version": "x"},
        {"weights": [{"path": "model.safetensors"}]},
        {"weights": [{"path": "model.safetensors", "header": "no JSON"}]},
        {"weights": [{"path": "", "header": "{}"}]},
        {"layers_sha256": None},
    ],
)
def test_a_malformed_delta_is_a_one_line_error(refused, converted, tmp_path, change):
    delta(converted["llama"], tmp_path / "delta")
    content = json.loads((tmp_path / "delta" / "mxd_delta.json").read_text())
    (tmp_path / "delta" / "mxd_delta.json").write_text(json.dumps({**content, **change}))
    refused("apply", tmp_path / "delta", tmp_path / "full", words=("can't be read",))


def test_a_flipped_bit_is_found_on_loading(converted, tmp_path):
    delta(converted["llama"], tmp_path / "delta")
    file = tmp_path / "delta" / "layers.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="truncated or damaged"):
        load(str(tmp_path / "delta"))


def test_a_full_disk_leaves_no_files(program, converted, tmp_path):
    delta(converted["llama"], tmp_path / "delta")
    for command in (("apply", tmp_path / "delta"), ("delta", converted["llama"])):
        done = program(*command, tmp_path / "out", largest_file=20_000)
        assert done.status == 2
        assert "no space left on the disk" in done.err
        assert not (tmp_path / "out").exists()

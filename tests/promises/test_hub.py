"""Publishing and downloading work with the real client and a server on loopback."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from folders import contents
from hub_client import LOGITS, logits_of, on_hub, published
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from small_runs import small_recipe

from mxd_convert import convert, delta, edit


def test_a_checkpoint_is_the_same_after_push_and_pull(hub, program, converted, tmp_path):
    folder = converted["llama"]
    before = contents(folder)
    done = program("push", folder, "there-and-back", "--message", "first")
    assert done.status == 0, done.err
    assert done.out.strip() == f"{hub.url}/alice/there-and-back"
    assert "a new repository" in done.err
    assert "model.safetensors" in done.err
    assert on_hub(hub, "alice/there-and-back") == published(folder, "alice/there-and-back")
    assert hub.repos["alice/there-and-back"].refs["main"][-1].title == "first"
    assert contents(folder) == before

    asked = len(hub.requests)
    again = program("push", folder, "alice/there-and-back")
    assert again.status == 0
    assert "already has the same files" in again.err
    assert {request.path for request in hub.requests[asked:] if request.method not in ("GET", "HEAD")} == {"/api/validate-yaml"}

    pulled = program("pull", "alice/there-and-back", tmp_path / "pulled", token=None)
    assert pulled.status == 0, pulled.err
    assert contents(tmp_path / "pulled") == on_hub(hub, "alice/there-and-back")
    assert "already downloaded" in program("pull", "alice/there-and-back", tmp_path / "pulled").err
    pulled_card = (tmp_path / "pulled" / "README.md").read_text()
    assert program("push", tmp_path / "pulled", "alice/elsewhere", verified=False).status == 0
    assert on_hub(hub, "alice/elsewhere")["README.md"].decode() == pulled_card.replace("alice/there-and-back", "alice/elsewhere")
    assert program("verify", tmp_path / "pulled", environment={"HF_HUB_OFFLINE": "1"}).status == 0


def test_from_pretrained_loads_a_repository(program, programs, converted, tmp_path):
    folder = converted["gpt2"]
    assert program("push", folder, "alice/straight").status == 0
    ours = logits_of(programs, folder, tmp_path / "a", "AutoModelForCausalLM.from_pretrained(name)", "import mxd_convert")
    theirs = logits_of(
        programs, "alice/straight", tmp_path / "b", "AutoModelForCausalLM.from_pretrained(name)", "import mxd_convert"
    )
    assert ours.equal(theirs)
    loaded = logits_of(programs, "alice/straight", tmp_path / "c", "mxd_convert.load(name)", "import mxd_convert")
    assert ours.equal(loaded)
    # without the package: a process that can't import it
    script = tmp_path / "without.py"
    blocked = "sys.modules['mxd_convert'] = None"
    script.write_text(LOGITS.format(load="AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)", imports=blocked))
    environment = {**os.environ, **programs.environment, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run(
        [sys.executable, "-I", script, "alice/straight", tmp_path / "d"], env=environment, check=True, capture_output=True
    )
    assert ours.equal(load_file(tmp_path / "d")["logits"])


def test_list_shows_the_figures_of_cards(hub, program, converted):
    for family in ("llama", "gpt2"):
        assert program("push", converted[family], f"alice/listed-{family}").status == 0
    hub.put("bob/other", {"README.md": b"---\ntags: [something]\n---\n", "config.json": b"{}"})
    hub.put("bob/strange", {"README.md": b"---\ntags: [mxd-convert]\nmxd: 3\n---\n"})
    found = {one["repo_id"]: one for one in json.loads(program("list", "--json", token=None).out)["checkpoints"]}
    assert "bob/other" not in found
    assert found["bob/strange"]["delta_ce"] is None
    report = json.loads((converted["llama"] / "mxd_report.json").read_text())
    one = found["alice/listed-llama"]
    assert (one["base"], one["layers"], one["k"], one["verdict"]) == ("tiny-llama", [0, 2], 4, report["reliance"]["verdict"])
    assert one["delta_ce"] == pytest.approx(report["fidelity"]["delta_ce"], abs=1e-4)
    only = json.loads(program("list", "--base", "tiny-gpt2", "--json").out)["checkpoints"]
    assert {one["base"] for one in only} == {"tiny-gpt2"}
    table = program("list", "--author", "alice").out
    assert "alice/listed-gpt2" in table
    assert "bob/" not in table


def test_a_dry_run_publishes_nothing(hub, program, converted):
    asked = len(hub.requests)
    done = program("push", converted["llama"], "alice/dry", "--dry-run", token=None)
    assert done.status == 0, done.err
    assert "--dry-run" in done.err
    for line in ("added", "model.safetensors", "README.md"):
        assert line in done.err
    assert "alice/dry" not in hub.repos
    assert {request.path for request in hub.requests[asked:] if request.method != "GET"} == {"/api/validate-yaml"}


def test_a_push_shows_its_changes_and_keeps_other_files(hub, program, converted, tmp_path):
    folder, name = shutil.copytree(converted["llama"], tmp_path / "copy"), "alice/changes"
    assert program("push", folder, name, verified=False).status == 0
    theirs = {
        "notes.md": b"mine",
        "model_lora.safetensors": b"mine",
        "models/other.safetensors": b"mine",
        "onnx/model.onnx": b"graph",
    }
    stale = {"model-00001-of-00002.safetensors": b"stale"}
    hub.put(name, {**hub.files(name), **theirs, **stale})
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nA line of mine.\n")
    (folder / "mxd_labels.json").write_text("[]\n")
    done = json.loads(program("push", folder, name, "--json", verified=False).out)
    assert list(done["changed"]) == ["README.md"]
    assert list(done["added"]) == ["mxd_labels.json"]
    assert list(done["removed"]) == list(stale)  # transformers would load it instead of ours
    assert done["left"].keys() == theirs.keys()
    assert done["commit"] == hub.repos[name].refs["main"][-1].oid
    assert on_hub(hub, name) == {**published(folder, name), **theirs}


def test_branches_pull_requests_and_private_repositories_work(hub, program, converted, tmp_path):
    folder, name = converted["llama"], "alice/more"
    assert program("push", folder, name, "--private", "--revision", "v2", verified=False).status == 0
    assert hub.repos[name].private
    assert on_hub(hub, name) == {}
    assert on_hub(hub, name, "v2") == published(folder, name)
    assert program("pull", name, tmp_path / "pulled", "--revision", "v2").status == 0
    done = program("push", folder, name, "--create-pr", verified=False)
    assert done.out.strip() == f"{hub.url}/{name}/discussions/1"
    assert on_hub(hub, name) == {}
    assert on_hub(hub, name, "refs/pr/1") == published(folder, name)
    refused = program("push", folder, name, "--create-pr", "--revision", "v2")
    assert refused.status == 2
    assert "a pull request goes to main" in refused.err
    hub.put("bob/open", {**published(folder, "bob/open"), "recipe.yaml": b"older"})
    assert program("push", folder, "bob/open", "--create-pr", verified=False).status == 0  # to another user's repository
    assert on_hub(hub, "bob/open", "refs/pr/1") == published(folder, "bob/open")


def test_a_checkpoint_that_fails_verification_is_not_published(hub, program, converted, tmp_path):
    folder = shutil.copytree(converted["llama"], tmp_path / "copy")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    done = program("push", folder, "alice/broken")
    assert done.status == 2
    assert "nothing was published" in done.err
    assert "alice/broken" not in hub.repos


def test_a_recipe_can_publish_its_result(hub, program, models, text, tmp_path):
    recipe = small_recipe(models["gpt2"], text, tmp_path / "out", layers=[0])
    recipe["output"]["push_to"] = "from-a-recipe"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    refused = program("run", path, token="hf_wrong")
    assert (refused.status, (tmp_path / "out.partial").exists()) == (2, False)  # before any work
    hub.fail("POST", "/commit/", 403)
    halfway = program("run", path)
    assert halfway.status == 2
    assert f"mxd-convert push {tmp_path / 'out'} from-a-recipe" in halfway.err
    assert (tmp_path / "out" / "mxd_report.json").is_file()
    done = json.loads(program("run", path, "--json").out)
    assert done["already_finished"]
    assert done["url"] == f"{hub.url}/alice/from-a-recipe"
    assert on_hub(hub, "alice/from-a-recipe") == published(tmp_path / "out", "alice/from-a-recipe")
    # other users may run it again
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["output"]["push_to"] is None
    assert "from-a-recipe" not in (tmp_path / "out" / "README.md").read_text()


def test_a_base_on_the_hub_is_named_by_id_commit_and_licence(hub, program, models, text, tmp_path):
    files = {path.name: path.read_bytes() for path in models["gpt2"].iterdir()}
    card = b"---\nlicense: mit\nlanguage: en\n---\n# a base\n"
    commit = hub.put("bob/base", {**files, "README.md": card}).refs["main"][-1].oid
    recipe = small_recipe(models["gpt2"], text, tmp_path / "out", layers=[0])
    recipe["base"]["model"] = "bob/base"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert program("run", path).status == 0
    report = json.loads((tmp_path / "out" / "mxd_report.json").read_text())
    assert report["base"] | {"sha256": ""} == {
        "model": "bob/base",
        "revision": commit,
        "sha256": "",
        "license": "mit",
        "language": "en",
    }
    found = ModelCard.load(tmp_path / "out" / "README.md")
    assert (found.data.base_model, found.data.base_model_relation, found.data.license) == ("bob/base", "finetune", "mit")
    assert f"commit `{commit}`" in found.text
    assert program("push", tmp_path / "out", "alice/of-bobs").status == 0  # verified against the base from the Hub
    assert json.loads(program("list", "--base", "base", "--json").out)["checkpoints"][0]["repo_id"] == "alice/of-bobs"
    assert program("verify", tmp_path / "out", "--provenance").status == 0
    delta = program("delta", tmp_path / "out", tmp_path / "delta")
    assert delta.status == 0, delta.err
    assert program("apply", tmp_path / "delta", tmp_path / "again").status == 0
    assert contents(tmp_path / "again").items() >= published(tmp_path / "out", "THIS_REPOSITORY").items()


def test_figures_of_another_checkpoint_are_not_published(hub, program, converted, tmp_path):
    folder = shutil.copytree(converted["llama"], tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.decoder.weight"] *= 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = program("push", folder, "alice/trained-on", verified=False)
    assert done.status == 2
    assert "model.safetensors is not the one that mxd_report.json was measured on" in done.err
    assert program("delta", folder, tmp_path / "delta").status == 0
    assert "is not the one that mxd_report.json was measured on" in program("push", tmp_path / "delta", "alice/trained-on").err
    assert "alice/trained-on" not in hub.repos
    for name in ("mxd_report.json", "README.md"):
        (folder / name).unlink()
    assert program("push", folder, "alice/trained-on", verified=False).status == 0


def test_an_earlier_report_is_removed_with_its_weights(hub, program, converted, tmp_path):
    name = "alice/edited"
    assert program("push", converted["llama"], name, verified=False).status == 0
    edit(converted["llama"], tmp_path / "edited", [{"layer": 0, "expert": 3, "ablate": True}])
    assert program("push", tmp_path / "edited", name, verified=False).status == 0
    assert on_hub(hub, name) == published(tmp_path / "edited", name)
    assert "mxd_report.json" not in on_hub(hub, name)


def test_a_repository_with_other_shapes_is_refused(program, models, text, converted, tmp_path):
    assert program("push", converted["gpt2"], "alice/shapes", verified=False).status == 0
    convert(small_recipe(models["gpt2"], text, tmp_path / "out", layers=[0, 2], layer={"k": 2, "experts": 24}), quiet=True)
    done = program("push", tmp_path / "out", "alice/shapes", verified=False)
    assert done.status == 2
    assert "a conversion with other layers or settings" in done.err
    assert delta(converted["gpt2"], tmp_path / "delta").tensors
    done = program("push", tmp_path / "delta", "alice/shapes")
    assert "a model of type mxd_gpt2" in done.err


def test_odd_cards_of_strangers_are_listed(hub, program):
    odd = [
        "{layers: 3}",
        "{delta_ce: x}",
        "{verdict: 5, kind: 3, base: 5}",
        '{verdict: "\\e[31m\\e]0;hello\\a"}',
        "[1]",
        "{k: [1], layers: [a]}",
    ]
    for number, said in enumerate(odd):
        card = f"---\ntags: [mxd-convert]\nbase_model: [{{a: b}}]\nmxd: {said}\n---\n"
        hub.put(f"bob/odd-{number}", {"README.md": card.encode()})
    done = program("list")
    assert done.status == 0, done.err
    assert "\x1b" not in done.out
    assert all(f"bob/odd-{number}" in done.out for number in range(len(odd)))


def test_a_card_refused_by_the_hub_is_reported_before_any_upload(hub, program, converted, tmp_path):
    folder = shutil.copytree(converted["llama"], tmp_path / "copy")
    card = folder / "README.md"
    card.write_text(card.read_text().replace("pipeline_tag:", "base_model: /home/me/model\npipeline_tag:"))
    done = program("push", folder, "alice/refused-card", verified=False)
    assert done.status == 2
    assert '"base_model" with value' in done.err
    assert "alice/refused-card" not in hub.repos


def test_a_cached_checkpoint_loads_without_the_network(program, programs, converted, tmp_path):
    assert program("push", converted["llama"], "alice/cached", verified=False).status == 0
    load_it = "mxd_convert.load(name)"
    ours = logits_of(programs, "alice/cached", tmp_path / "a", load_it, "import mxd_convert")
    done = programs.run_anew("python", tmp_path / "a.py", "alice/cached", tmp_path / "b", HF_HUB_OFFLINE="1")
    assert done.status == 0, done.err
    assert ours.equal(load_file(tmp_path / "b")["logits"])

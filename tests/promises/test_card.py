"""The card has its figures from the report, every block of code runs, and it holds no local path."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from folders import write_card
from hub_client import on_hub
from hub_routes import card_errors
from huggingface_hub import ModelCard
from project import ROOT
from small_runs import FAMILIES

from mxd_convert import convert, delta, edit
from mxd_convert.recipe.schema import Recipe


def blocks_of(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


def run_blocks(card, programs, folder, replace):
    """Run a card's Python blocks as one script, then its command lines; return the number of blocks and the last result."""
    parts = re.findall(r"```(python|bash)\n(.*?)```", card, re.DOTALL)
    script = folder / "blocks.py"
    script.write_text("\n".join(code for language, code in parts if language == "python").replace("BASE", replace["BASE"]))
    done = programs.run("python", script, cwd=str(folder))
    assert done.status == 0, done.err
    for line in "\n".join(code for language, code in parts if language == "bash").splitlines():
        if not (words := line.split()):
            continue
        assert words[0] == "mxd-convert"
        for name, value in replace.items():
            words = [re.sub(rf"\b{name}\b", value, word) for word in words]
        done = programs.run(*[word.strip('"') for word in words[1:]], cwd=str(folder))
        assert done.status == 0, (line, done.err)
    return len(parts), done


@pytest.mark.parametrize("kind", ["mxd", "random_gate", "transcoder", "skip_transcoder", "dense_twin"])
def test_every_block_of_a_published_card_runs(hub, program, programs, models, text, tmp_path, kind, recipe):
    path = recipe(
        layers=[0, 2],
        layer={"kind": kind} if kind == "dense_twin" else {"kind": kind, "k": 4, "experts": 24},
    )
    result = convert(path, output=tmp_path / "made", quiet=True)
    name = f"alice/card-{kind.replace('_', '-')}"
    assert program("push", result.output, name, verified=False).status == 0
    card = on_hub(hub, name)["README.md"].decode()
    assert "THIS_REPOSITORY" not in card
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(blocks_of(card, "yaml")[0])
    assert (folder / "recipe.yaml").read_text() == (result.output / "recipe.yaml").read_text()
    card = card.replace("base.model=PATH", f"base.model={models['gpt2']}").replace("train.path=PATH", f"train.path={text}")
    count, last = run_blocks(card, programs, folder, {"BASE": str(models["gpt2"])})
    assert count == (2 if kind == "dense_twin" else 5)
    again = json.loads((folder / "reproduced" / "mxd_report.json").read_text())
    assert again["fidelity"] == result.report["fidelity"], last.err
    assert again["recipe_sha256"] == result.report["recipe_sha256"]


def test_every_block_of_the_card_of_a_delta_runs(hub, program, programs, converted, models, text, tmp_path):
    delta(converted["llama"], tmp_path / "delta")
    assert program("push", tmp_path / "delta", "alice/card-delta").status == 0
    card = on_hub(hub, "alice/card-delta")["README.md"].decode()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "recipe.yaml").write_text(blocks_of(card, "yaml")[0])
    card = card.replace("base.model=PATH", f"base.model={models['llama']}").replace("train.path=PATH", f"train.path={text}")
    count, _ = run_blocks(card, programs, tmp_path / "elsewhere", {"BASE": str(models["llama"])})
    assert count == 6
    assert "mxd-delta" in ModelCard(card).data.tags


def figures_in(card: str) -> set[str]:
    body = card.split("## Fidelity to the base model")[1].split("## Provenance", maxsplit=1)[0]
    return set(re.findall(r"(?<![\w.])[+-]?\d[\d,]*\.\d+%?", body))


def test_the_figures_of_the_card_are_those_of_the_report(copy):
    card = (copy / "README.md").read_text()
    report = json.loads((copy / "mxd_report.json").read_text())

    def leaves(content):
        if isinstance(content, dict):
            for value in content.values():
                yield from leaves(value)
        elif isinstance(content, float | int):
            yield content

    numbers = list(leaves(report["fidelity"])) + list(leaves(report["reliance"]))
    forms = {
        f"{sign}{number:.{digits}f}" for number in numbers for digits in (1, 2, 3) for sign in ("", "+" if number >= 0 else "")
    }
    forms |= {f"{number:.1%}" for number in numbers}
    for figure in figures_in(card):
        assert figure in forms, figure
    changed = {**report, "fidelity": {**report["fidelity"], "delta_ce": 12.345}}
    assert "+12.345" not in card
    recipe = (copy / "recipe.yaml").read_text()
    write_card(copy, changed, recipe, base_on_hub=False)
    assert "+12.345" in (copy / "README.md").read_text()
    write_card(copy, report, recipe, base_on_hub=False)
    assert (copy / "README.md").read_text() == card


def test_the_metadata_of_the_card_is_valid_on_the_hub(converted, tmp_path):
    folder = shutil.copytree(converted["llama"], tmp_path / "copy")
    report = json.loads((folder / "mxd_report.json").read_text())
    data = ModelCard.load(folder / "README.md").data
    assert card_errors(data.to_dict()) == []
    assert data.base_model is None  # a local folder is no model on the Hub
    assert "tiny-llama" in (folder / "README.md").read_text()
    (result,) = [one for one in data.eval_results if one.metric_type == "delta_ce"]
    assert result.metric_value == pytest.approx(report["fidelity"]["delta_ce"], abs=1e-4)
    assert data["mxd"]["verdict"] == report["reliance"]["verdict"]
    # of a base on the Hub
    report["base"] |= {"model": "someone/base", "revision": "a" * 40, "license": "apache-2.0", "language": ["en"]}
    report["data"]["train"]["path"], report["local"] = "someone/texts", []
    write_card(folder, report, (folder / "recipe.yaml").read_text(), base_on_hub=True)
    data = ModelCard.load(folder / "README.md").data
    assert card_errors(data.to_dict()) == []
    assert (data.base_model, data.base_model_relation, data.license) == ("someone/base", "finetune", "apache-2.0")
    assert (data.language, data.datasets) == (["en"], ["someone/texts"])
    assert f"commit `{'a' * 40}`" in (folder / "README.md").read_text()


def test_the_card_says_how_the_layers_were_trained(converted, tmp_path):
    folder = shutil.copytree(converted["llama"], tmp_path / "copy")
    report = json.loads((folder / "mxd_report.json").read_text())
    alone = "each layer was trained on activations of the base model."
    assert f"{alone}\n" in (folder / "README.md").read_text()
    recipe = (folder / "recipe.yaml").read_text()
    assert "  joint: 0.0\n" in recipe
    write_card(folder, report, recipe.replace("  joint: 0.0\n", "  joint: 0.4\n"), base_on_hub=False)
    assert (
        f"{alone} In the last 40.0% of the steps, the joint stage trained all layers together in the model"
        in (folder / "README.md").read_text()
    )


def test_the_card_names_figures_that_were_not_measured(converted, tmp_path):
    folder = edit(converted["gpt2"], tmp_path / "edited", [{"layer": 0, "expert": 3, "ablate": True}])
    card = (folder / "README.md").read_text()
    assert "Not measured since the checkpoint was changed" in card
    assert "mxd_report.json" not in card  # it has no report
    assert "the checkpoint before its manual changes" in card
    assert ModelCard(card).data.eval_results is None
    full = (converted["gpt2"] / "README.md").read_text()
    assert "Rise in cross-entropy on other text: not measured." in full


@pytest.mark.parametrize("family", FAMILIES)
def test_published_files_hold_no_local_path(converted, family):
    for path in converted[family].rglob("*"):
        if path.is_file() and path.name != "mxd_local.json":
            content = path.read_bytes()
            for word in (str(Path.home()), str(ROOT), str(converted[family].parent), "/tmp/"):
                assert word.encode() not in content, (path.name, word)


@pytest.mark.parametrize("name", ["quickstart", "stories260k"])
def test_committed_cards_match_their_reports(name, tmp_path):
    kept = ROOT / "model_cards" / name
    folder = shutil.copytree(kept, tmp_path / name)
    report = json.loads((kept / "mxd_report.json").read_text())
    recipe = (kept / "recipe.yaml").read_text()
    write_card(folder, report, recipe, base_on_hub=False)
    assert (folder / "README.md").read_text() == (kept / "README.md").read_text()
    settings = yaml.safe_load(recipe)
    shipped = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    assert settings["layer"]["k"] == shipped["layer"]["k"]
    assert Recipe(**settings).published_sha256() == report["recipe_sha256"]

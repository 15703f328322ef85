"""Commands list the experts that fire on a prompt, keep labels, change experts permanently and compare reports."""

import json

import pytest
import torch
from observations import ids_of
from safetensors.torch import load_file
from small_runs import small_recipe

from mxd_convert import InputError, add_labels, convert, edit, inspect, load_checkpoint, read_labels, revert, steered
from mxd_convert.base_model.load import load_tokenizer

PROMPT = "The value 7 is returned when index 3 is given."


@torch.no_grad()
def test_inspect_lists_the_experts_that_fire(converted):
    """The reference is the layer's encoding of inputs recorded by a plain hook."""
    folder = converted["llama"]
    model, tokenizer = load_checkpoint(folder), load_tokenizer(str(folder))
    seen = {}
    for index, layer in model.mxd_layers().items():
        layer.register_forward_hook(lambda module, arguments, output, index=index: seen.__setitem__(index, arguments[0]))
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    model(input_ids=ids)
    views = inspect(folder, PROMPT)
    assert [view.id for view in views] == ids[0].tolist()
    assert "".join(view.text for view in views) == tokenizer.decode(ids[0])
    for view in views:
        assert set(view.layers) == {0, 2}
        for index, firings in view.layers.items():
            values, experts = model.mxd_layers()[index].encode(seen[index][0, view.position])
            fired = {n: value for n, value in zip(experts.tolist(), values.tolist(), strict=True) if value > 0}
            assert {firing.expert for firing in firings} == set(fired)
            for firing in firings:
                assert firing.coefficient == pytest.approx(fired[firing.expert], rel=1e-5)
            assert sum(firing.share for firing in firings) == pytest.approx(1.0, abs=1e-4)
            assert [firing.share for firing in firings] == sorted((firing.share for firing in firings), reverse=True)
    assert [len(view.layers[2]) for view in inspect(folder, PROMPT, layers=[2], most=1)] == [1] * len(views)


def test_inspect_shows_labels_on_the_command_line(mxd, copy, refused):
    expert = inspect(copy, PROMPT, most=1)[0].layers[0][0].expert
    mxd("label", copy, f"0:{expert}", "numbers [bold]", "--author", "mara")
    status, out, _ = mxd("inspect", copy, "--prompt", PROMPT, "--layers", "0")
    assert status == 0
    assert f"{expert} " in out
    assert "numbers [bold]" in out  # a label is text, not markup
    content = json.loads(mxd("inspect", copy, "--prompt", PROMPT, "--json")[1])
    assert content[0]["layers"]["0"][0]["label"] == "numbers [bold]"
    refused("inspect", copy, "--prompt", PROMPT, "--layers", "1", words=("--layers", "layer 1 has no experts", "0, 2"))
    refused("inspect", copy, "--prompt", PROMPT, "--layers", "x", words=("--layers", "'x'"))
    refused("inspect", copy, "--prompt", PROMPT, "--top", "0", words=("--top 0",))
    refused("inspect", copy, "--prompt", PROMPT * 100, words=("tokens are more than the model's 128. Shorten the prompt.",))


def test_labels_are_kept_by_edit_and_revert(mxd, copy, tmp_path, refused):
    _, out, _ = mxd("label", copy, "2:17", "negations", "--author", "mara", "--json")
    assert json.loads(out) == [{"layer": 2, "expert": 17, "text": "negations", "author": "mara"}]
    add_labels(
        copy,
        [{"layer": 2, "expert": 17, "text": "not", "author": "ben"}, {"layer": 0, "expert": 1, "text": "a", "author": "ben"}],
    )
    mxd("label", copy, "2:17", "negated clauses", "--author", "mara")  # replaces her older one
    said = [(label.layer, label.expert, label.text) for label in read_labels(copy)]
    assert said == [(0, 1, "a"), (2, 17, "not"), (2, 17, "negated clauses")]
    assert "2:17  negated clauses  (mara)" in mxd("label", copy)[1]
    edit(copy, tmp_path / "edited", [{"layer": 0, "expert": 1, "ablate": True}])
    assert read_labels(tmp_path / "edited") == read_labels(copy)
    revert(copy, [0], tmp_path / "reverted")
    assert [label.layer for label in read_labels(tmp_path / "reverted")] == [2, 2]
    before = (copy / "mxd_labels.json").read_bytes()
    refused("label", copy, "2:24", "x", "--author", "m", words=("experts 0 to 23", "no expert 24"))
    refused("label", copy, "1:2", "x", "--author", "m", words=("layer 1 has no experts", "0, 2"))
    refused("label", copy, "2:2", "x", words=("--author",))
    refused("label", copy, "2", "x", "--author", "m", words=("LAYER:EXPERT",))
    bad = tmp_path / "bad.json"
    bad.write_text('[{"layer": 0, "expert": 1, "text": "fine", "author": "m"}, {"layer": 0}]')
    refused("label", copy, "--file", bad, words=("bad.json", "1.expert"))
    refused("label", copy, "--file", tmp_path / "none.json", words=("none.json", "can't be read"))
    assert (copy / "mxd_labels.json").read_bytes() == before
    (copy / "mxd_labels.json").write_text("{")
    refused("label", copy, words=("mxd_labels.json", "Expected a JSON list"))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
@torch.no_grad()
def test_an_edit_equals_permanent_steering(converted, tmp_path, family):
    orders = [{"layer": 0, "expert": 3, "ablate": True}, {"layer": 2, "expert": 5, "scale": -2.0}]
    folder = edit(converted[family], tmp_path / "edited", orders)
    ids = ids_of(4, 20)
    before, after = load_checkpoint(converted[family]), load_checkpoint(folder)
    with steered(before, orders):
        expected = before(input_ids=ids).logits
    assert torch.allclose(after(input_ids=ids).logits, expected, atol=1e-4)
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, converted[family]))
    changed = {name for name in theirs if not ours[name].equal(theirs[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"experts"}
    for name in changed:
        assert int((ours[name] != theirs[name]).any(-1).sum()) == 1
    again = edit(folder, tmp_path / "again", [{"layer": 0, "expert": 4, "ablate": True}])
    config = json.loads((again / "config.json").read_text())
    assert config["mxd"]["edits"] == [*orders, {"layer": 0, "expert": 4, "ablate": True}]


def test_an_edited_checkpoint_names_its_edits(mxd, copy, tmp_path, text):
    arguments = ("--ablate", "0:3", "--scale", "2:5:0.5", "--steer", "2:7:+3")
    status, out, _ = mxd("edit", copy, *arguments, "--output", tmp_path / "edited")
    assert status == 0
    assert out.strip() == str(tmp_path / "edited")
    card = (tmp_path / "edited" / "README.md").read_text()
    for words in (
        "Expert 3 of layer 0 is ablated permanently.",
        "Expert 5 of layer 2 is scaled by 0.5 permanently.",
        "Expert 7 of layer 2 is steered: its coefficient +3, positions: all.",
        "Not measured since the checkpoint was changed",
    ):
        assert words in card
    assert not (tmp_path / "edited" / "mxd_report.json").exists()
    assert mxd("verify", tmp_path / "edited")[0] == 0
    status, _, err = mxd("edit", copy, *arguments, "--output", tmp_path / "measured", "--data", text, "--tokens", "512")
    assert status == 0, err
    report = json.loads((tmp_path / "measured" / "mxd_report.json").read_text())
    assert report["edits"][0] == {"layer": 0, "expert": 3, "ablate": True}
    figures = json.loads(mxd("eval", tmp_path / "measured", "--data", text, "--tokens", "512", "--json")[1])
    assert report["fidelity"] == figures["fidelity"]
    assert "Rise in cross-entropy" in (tmp_path / "measured" / "README.md").read_text()


def test_impossible_edits_are_refused(copy, tmp_path, refused):
    out = tmp_path / "out"
    refused("edit", copy, "--output", out, words=("nothing to change", "--ablate L:E"))
    refused("edit", copy, "--ablate", "0:99", "--output", out, words=("experts 0 to 23", "99"))
    refused("edit", copy, "--ablate", "0", "--output", out, words=("--ablate 0", "LAYER:EXPERT"))
    refused("edit", copy, "--scale", "0:1:much", "--output", out, words=("--scale 0:1:much", "LAYER:EXPERT:FACTOR"))
    refused("edit", copy, "--scale", "0:1", "--output", out, words=("--scale 0:1", "LAYER:EXPERT:FACTOR"))
    refused("edit", copy, "--ablate", "0:1", "--output", copy / "inside", words=("lies inside the checkpoint",))
    refused("edit", copy, "--ablate", "0:1", "--output", copy, words=("exists already",))
    assert not out.exists()
    with pytest.raises(InputError, match="expected ablate or scale"):
        edit(copy, out, [{"layer": 0, "expert": 1, "add": 3.0}])


def test_compare_shows_settings_and_figures_side_by_side(mxd, converted, models, text, tmp_path, refused):
    other = tmp_path / "other"
    convert(small_recipe(models["llama"], text, other, layers=[0], layer={"kind": "transcoder"}), quiet=True)
    found = json.loads(mxd("compare", converted["llama"], other, "--json")[1])
    assert found["same_base"]
    assert found["same_eval_text"]
    assert found["settings"]["layer.kind"] == ["mxd", "transcoder"]
    assert found["settings"]["layers"] == [[0, 2], [0]]
    assert "train.lr" not in found["settings"]
    reports = [json.loads((folder / "mxd_report.json").read_text()) for folder in (converted["llama"], other)]
    assert found["whole"]["delta_ce"] == [report["fidelity"]["delta_ce"] for report in reports]
    assert found["layers"]["0"]["gate_share"][1] == pytest.approx(1.0)
    assert found["layers"]["2"]["fvu"] == [reports[0]["fidelity"]["layers"]["2"]["fvu"], None]
    status, out, _ = mxd("compare", converted["llama"], other)
    assert status == 0
    assert "layer 0 gate_share" in out
    status, out, _ = mxd("compare", converted["llama"], converted["gpt2"])
    assert "the base model differs" in out
    (other / "mxd_report.json").unlink()
    refused("compare", converted["llama"], other, words=("other", "mxd_report.json"))
    refused("compare", converted["llama"], tmp_path / "none", words=("none", "no such folder"))

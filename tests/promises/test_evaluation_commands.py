"""eval, compare and sweep report standard errors, pair documents, and say what is noise."""

import json
import math
import shutil

import pytest
from PIL import Image
from small_runs import small_recipe

from mxd_convert import InputError, compare, convert, edit, evaluate, record
from mxd_convert.report.difference import behind_best, difference
from mxd_convert.report.frontier import write_frontier
from mxd_convert.report.schema import parse_report


def report_of(folder):
    return json.loads((folder / "mxd_report.json").read_text())


@pytest.fixture(scope="module")
def other(models, text, tmp_path_factory):
    """A conversion with another seed, evaluated on the same held-out text as `converted`."""
    output = tmp_path_factory.mktemp("runs") / "other"
    return convert(small_recipe(models["llama"], text, output, layers=[0, 2], train={"seed": 1}), quiet=True).output


def test_the_difference_of_two_checkpoints_is_paired_over_documents(converted, other):
    one, two = report_of(converted["llama"]), report_of(other)
    found = compare(converted["llama"], other)["differences"]["delta_ce"]
    assert found["value"] == pytest.approx(two["fidelity"]["delta_ce"] - one["fidelity"]["delta_ce"])
    assert found["paired"]
    first, second = (report["fidelity"]["by_document"] for report in (one, two))
    tokens = first["tokens"]
    gaps = [b - a for a, b in zip(first["ce_converted"], second["ce_converted"], strict=True)]
    mean = sum(n * gap for n, gap in zip(tokens, gaps, strict=True)) / sum(tokens)
    squares = sum((n * (gap - mean)) ** 2 for n, gap in zip(tokens, gaps, strict=True))
    count = len(tokens)
    assert found["standard_error"] == pytest.approx(math.sqrt(count / (count - 1) * squares) / sum(tokens), rel=1e-3)
    unpaired = math.hypot(one["fidelity"]["delta_ce_se"], two["fidelity"]["delta_ce_se"])
    assert found["standard_error"] < unpaired
    assert found["within_noise"] == (abs(found["value"]) < 2 * found["standard_error"])


def test_reports_of_different_texts_are_not_paired(converted, other, tmp_path):
    content = report_of(other)
    content["data"]["eval"]["fingerprint"] = "another"
    reports = [parse_report(one, tmp_path) for one in (report_of(converted["llama"]), content)]
    found = difference(*reports, "delta_ce")
    assert not found.paired
    assert found.standard_error == pytest.approx(math.hypot(*(report.fidelity.delta_ce_se for report in reports)))


def test_reports_without_documents_have_a_difference_without_error(converted, other, tmp_path):
    contents = [report_of(converted["llama"]), report_of(other)]
    for content in contents:
        content["fidelity"] = {
            key: value for key, value in content["fidelity"].items() if not key.endswith("_se") and key != "by_document"
        }
    found = difference(*(parse_report(content, tmp_path) for content in contents), "kl")
    assert (found.standard_error, found.within_noise, found.paired) == (None, None, False)


def test_a_difference_of_zero_is_noise_and_the_best_run_is_not_behind(converted, tmp_path):
    report = parse_report(report_of(converted["llama"]), tmp_path)
    found = difference(report, report, "delta_ce")
    assert (found.value, found.standard_error) == (0.0, 0.0)
    row = {"delta_ce": report.fidelity.delta_ce, "delta_ce_se": report.fidelity.delta_ce_se}
    rows = {"a": row, "b": {**row, "delta_ce": row["delta_ce"] + 1.0}, "c": {"error": "the loss is not finite"}}
    found = behind_best(rows, {"a": report, "b": report})
    assert found["a"] == {"behind_best": 0.0, "behind_best_se": 0.0, "within_noise_of_best": True}
    assert found["b"] == {"behind_best": 1.0, "behind_best_se": 0.0, "within_noise_of_best": False}
    assert "c" not in found
    assert behind_best(rows, {})["b"]["behind_best_se"] == pytest.approx(math.sqrt(2) * row["delta_ce_se"])


def test_compare_prints_errors_and_draws_the_shares(mxd, converted, other, tmp_path):
    status, out, err = mxd("compare", converted["llama"], other, "--plot", tmp_path / "shares.png")
    assert status == 0, err
    assert "±" in out
    assert "The difference in delta_ce is " in out
    assert "paired over the same documents" in out
    assert "layer 0 hidden_share" in out
    with Image.open(tmp_path / "shares.png") as picture:
        assert min(picture.size) > 400


def test_a_quick_evaluation_leaves_out_what_takes_longer(mxd, converted, text):
    status, out, err = mxd("eval", converted["llama"], "--data", text, "--tokens", 500, "--quick", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["cost"]["evaluation"]["full_passes"] == 2
    assert {"ce_zero_ablation", "compounding"}.isdisjoint(found["fidelity"])
    assert found["reliance"]["layers"]["0"]["hidden_share"] >= 0
    status, out, _ = mxd("eval", converted["llama"], "--data", text, "--tokens", 500, "--quick")
    assert status == 0
    assert "all zeroed" not in out
    assert "hidden" in out
    assert "verdict: " in out


def earlier(folder):
    """Turn a report into one of an earlier version: one-sided figures and their verdict."""
    content = report_of(folder)
    for layer in content["reliance"]["layers"].values():
        for name in ("hidden_share", "product_share", "expert_share"):
            del layer[name]
    content["reliance"] |= {"verdict": "experts carry the layer", "sentence": "experts carry the layer: at least 0.92"}
    (folder / "mxd_report.json").write_text(json.dumps(content))
    return content


def test_an_earlier_report_keeps_its_verdict_until_an_evaluation_is_recorded(converted, text, tmp_path, mxd):
    folder = shutil.copytree(converted["llama"], tmp_path / "copy")
    before = earlier(folder)
    assert compare(folder, folder)["verdicts"] == ["experts carry the layer: at least 0.92"] * 2
    figures = evaluate(folder, text, tokens=512, quiet=True)  # the whole text: not the held-out part of it
    record(folder, figures)
    after = report_of(folder)
    assert after["reliance"]["verdict"] == figures["reliance"]["verdict"] != before["reliance"]["verdict"]
    assert after["reliance"]["data"]["fingerprint"] == figures["data"]["fingerprint"]
    assert after["fidelity"]["delta_ce"] == before["fidelity"]["delta_ce"]
    [entry] = after["elsewhere"]
    assert entry["verdict"] == figures["reliance"]["verdict"]
    card = (folder / "README.md").read_text()
    assert figures["reliance"]["sentence"].split(":")[0] in card
    assert "hidden share" in card


def test_a_report_with_two_sided_figures_keeps_those_of_its_held_out_text(converted, text, tmp_path):
    folder = shutil.copytree(converted["llama"], tmp_path / "copy")
    before = report_of(folder)
    record(folder, evaluate(folder, text, tokens=512, quiet=True))
    after = report_of(folder)
    assert after["reliance"] == before["reliance"]
    assert len(after["elsewhere"]) == 1
    own = {"data": {**before["data"]["eval"]}, "fidelity": before["fidelity"], "reliance": before["reliance"]}
    with pytest.raises(InputError, match="has the figures already"):
        record(folder, own)


def test_a_quick_evaluation_is_not_recorded(mxd, converted, text, tmp_path):
    folder = shutil.copytree(converted["llama"], tmp_path / "copy")
    before = (folder / "mxd_report.json").read_bytes()
    status, out, err = mxd("eval", folder, "--data", text, "--tokens", 500, "--quick", "--record")
    assert (status, out) == (2, "")
    assert "Remove --quick." in err
    assert (folder / "mxd_report.json").read_bytes() == before


def test_an_edited_checkpoint_keeps_the_cost_of_its_training(converted, text, tmp_path):
    cost = report_of(converted["llama"])["cost"]
    folder = edit(converted["llama"], tmp_path / "edited", [{"layer": 0, "expert": 1, "ablate": True}], data=text, tokens=512)
    edited = report_of(folder)["cost"]
    assert {**edited, "evaluation": None} == {**cost, "evaluation": None}
    assert edited["evaluation"]["full_passes"] > 4


def test_a_sweep_without_finite_figures_has_a_table_and_no_plots(tmp_path):
    row = {"kind": "mxd", "k": 4, "seed": 0, "ce_base": 3.0, "delta_ce": None, "ce_zero_ablation": 5.0, "gate_share": None}
    write_frontier(tmp_path, [row])
    assert not list(tmp_path.glob("*.png"))
    good = {**row, "delta_ce": 0.2, "gate_share": 0.9, "hidden_share": None}
    write_frontier(tmp_path, [row, good])
    assert {path.name for path in tmp_path.glob("*.png")} == {"frontier.png", "shares.png"}


@pytest.mark.parametrize("value", [10**400, -(10**400), float("inf")])
def test_a_figure_of_any_size_in_a_report_is_no_crash(mxd, converted, tmp_path, value):
    folder = shutil.copytree(converted["llama"], tmp_path / "copy")
    content = report_of(folder)
    content["fidelity"] |= {"delta_ce": value, "delta_ce_se": -1.0}
    (folder / "mxd_report.json").write_text(json.dumps(content))
    status, out, err = mxd("compare", converted["llama"], folder, "--plot", tmp_path / "shares.png")
    assert status in (0, 2)
    assert "Traceback" not in err
    if status == 0:
        assert "difference in delta_ce is" not in out


def test_the_card_says_in_plain_words_what_was_trained(converted):
    card = (converted["llama"] / "README.md").read_text()
    report = report_of(converted["llama"])
    words = {
        "mixture of decoders": "These layers are mixtures of decoders.",
        "transcoder in all but name": "These layers are transcoders in all but name.",
        "dense layer in all but name": "These layers are dense layers in all but name.",
        "experts not shown to matter": "The experts are not shown to matter.",
        "mixed": "These layers are mixed.",
    }[report["reliance"]["verdict"]]
    assert card.index(words) < card.index("## Use")
    assert f"{report['fidelity']['delta_ce']:+.3f} ± {report['fidelity']['delta_ce_se']:.3f}" in card
    assert "Jacobian error" in card

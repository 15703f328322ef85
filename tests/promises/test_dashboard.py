"""The dashboard is one folder, safe and reproducible, and shows the statistics of the experts."""

import json
import re

import pytest
import torch
from folders import NASTY, data_of, experts_of
from observations import firings_by_loop
from random_layers import gpt2_with_layers
from small_runs import blocks_of, documents, small_recipe

import mxd_convert
from mxd_convert import InputError, convert, load_checkpoint
from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.commands.dashboard import write_dashboard
from mxd_convert.dashboard import pages
from mxd_convert.dashboard.tokens import token_texts
from mxd_convert.evaluation.experts import firings


def test_a_dashboard_holds_the_statistics_of_every_expert(converted, text, tmp_path, monkeypatch):
    """Its pages equal explicit loops; a second run and other ranges give the same bytes; it is replaced in place."""
    monkeypatch.setattr(pages, "SHARD", 16)
    output = tmp_path / "board"
    written = mxd_convert.make_dashboard(converted["llama"], text, output, tokens=1600, quiet=True)
    assert {path.name for path in output.iterdir()} == {"index.html", "expert.html", "assets", "data"}
    summary, tokens = data_of(output, "data/summary"), data_of(output, "data/tokens")
    assert [layer["layer"] for layer in summary["layers"]] == [0, 2]
    model, tokenizer = load_checkpoint(converted["llama"], dtype="float32"), load_tokenizer(str(converted["llama"]))
    blocks = blocks_of(text, tokenizer, tmp_path / "text")
    expected = firings_by_loop(model, 2, blocks, mask="bos")
    about, experts, rows = summary["layers"][1], experts_of(output, 2), data_of(output, "data/2/index")
    assert len(experts) == 24
    assert about["tokens"] == summary["data"]["tokens"] == blocks.counted(slice(None), "bos").sum()
    rates = {n: len(fired) / about["tokens"] for n, fired in expected.items()}
    assert about["dead"] == 24 - len(rates)
    assert about["always_on"] == sum(rate > 0.5 for rate in rates.values())
    assert about["active"] == pytest.approx(sum(rates.values()), rel=1e-3)
    assert sum(about["density"]["experts"]) == len(rates)
    assert written["layers"]["2"] == {"experts": 24, "dead": about["dead"], "rare": 0, "always_on": about["always_on"]}
    flat = [number for shard in sorted((output / "data").glob("text-*.js")) for number in data_of(output, f"data/{shard.stem}")]
    assert [tokens["ids"][number] for number in flat] == blocks.ids.reshape(-1).tolist()
    alive = sorted(expected)
    for n, expert in enumerate(experts):
        assert expert["count"] == rows["count"][n] == len(expected.get(n, []))
        assert expert["beside"] == [max((m for m in alive if m < n), default=-1), min((m for m in alive if m > n), default=-1)]
        assert expert["rank"] == mxd_convert.expert_rank(model.mxd_layers()[2], n)
        cosine = torch.cosine_similarity(model.mxd_layers()[2].experts, model.mxd_layers()[2].experts[n : n + 1])
        cosine[n] = -2
        best = cosine.topk(8)
        assert [row[1] for row in expert["like"]] == pytest.approx(
            [value for value in best.values.tolist() if value > 0], abs=2e-3
        )
        if n not in expected:
            assert "top" not in expert
            assert rows["top"][n] is rows["up"][n] is None
            continue
        position, value = max(expected[n], key=lambda pair: pair[1])
        assert expert["top"][0][0] == position
        assert expert["largest"] == pytest.approx(value, rel=1e-3)
        assert dict(zip(*[iter(expert["top"][0][1])] * 2, strict=True))[0] == expert["largest"]
        start = position // 32 * 32
        assert rows["top"][n] == [
            "".join(tokens["texts"][number] for number in flat[max(start, position - 10) : position]),
            tokens["texts"][flat[position]],
            "".join(tokens["texts"][number] for number in flat[position + 1 : min(start + 32, position + 4)]),
        ]
        assert [row[0] for row in expert["up"]] == rows["up"][n]
        assert len(expert["bands"]) == min(5, expert["count"])
    before = {path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    monkeypatch.setattr(pages, "_PAIRS", 50)
    monkeypatch.setattr(firings, "_PIECE", 77)
    mxd_convert.make_dashboard(converted["llama"], text, output, tokens=1600, quiet=True)
    assert before == {path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["board", "text"]


def test_every_kind_of_layer_has_its_pages(models, text, tmp_path):
    """One model has several kinds; a layer without experts is named, and latents have no rank."""
    entries = {0: ("random_gate", {}), 1: ("dense_twin", {}), 2: ("skip_transcoder", {"sparsity": "l1"})}
    model, tokenizer = gpt2_with_layers(models, entries), load_tokenizer(str(models["gpt2"]))
    blocks = blocks_of(text, tokenizer, tmp_path / "text")
    write_dashboard(tmp_path / "board", model, tokenizer, blocks, "mixed", quiet=True)
    summary = data_of(tmp_path / "board", "data/summary")
    assert [layer["kind"] for layer in summary["layers"]] == ["random_gate", "skip_transcoder"]
    assert [(layer["layer"], layer["kind"]) for layer in summary["without"]] == [(1, "dense_twin")]
    for layer, ranked in ((0, True), (2, False)):
        experts = experts_of(tmp_path / "board", layer)
        assert all(("rank" in expert) == ranked for expert in experts)
        assert any(expert["count"] for expert in experts)
    write_dashboard(tmp_path / "board", model, tokenizer, blocks, "mixed", layers=[2], quiet=True)
    assert [layer["layer"] for layer in data_of(tmp_path / "board", "data/summary")["layers"]] == [2]
    for alone in ({1: ("dense_twin", {})}, {0: ("mxd", {}), 1: ("dense_twin", {})}):
        with pytest.raises(InputError, match=r"no experts to show"):
            write_dashboard(tmp_path / "none", gpt2_with_layers(models, alone), tokenizer, blocks, "none", layers=[1], quiet=True)
    assert not (tmp_path / "none").exists()


def test_text_can_not_inject_markup_into_a_dashboard(copy, tmp_path):
    """No file holds text that could end a script, and the pages restore it."""
    nasty = tmp_path / "nasty.jsonl"
    nasty.write_text("".join(json.dumps({"text": f"{NASTY[i % 3]} {document}"}) + "\n" for i, document in enumerate(documents())))
    mxd_convert.add_labels(copy, [{"layer": 2, "expert": 3, "text": NASTY[1], "author": NASTY[2]}])
    mxd_convert.make_dashboard(copy, nasty, tmp_path / "board", tokens=1600, quiet=True)
    for path in (tmp_path / "board" / "data").rglob("*.js"):
        content = path.read_bytes()
        assert b"<" not in content
        assert content.isascii()
    [label] = data_of(tmp_path / "board", "data/summary")["labels"]
    assert (label["text"], label["author"]) == (NASTY[1], NASTY[2])
    tokens = data_of(tmp_path / "board", "data/tokens")
    shown = "".join(tokens["texts"][number] for number in data_of(tmp_path / "board", "data/text-0"))
    assert NASTY[0] in shown
    assert NASTY[1] in shown
    for page in ("index.html", "expert.html"):
        assert "connect-src" not in (tmp_path / "board" / page).read_text()
        assert "default-src 'none'" in (tmp_path / "board" / page).read_text()
    scripts = list((tmp_path / "board" / "assets").glob("*.js"))
    assert scripts
    for script in scripts:
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http:", "https:"):
            assert way not in script.read_text().replace("http://www.w3.org/2000/svg", ""), (script, way)


def test_token_texts_equal_the_decoded_text(models):
    tokenizer = load_tokenizer(str(models["gpt2"]))
    ids = tokenizer("a value is\n  3 \u20ac \u00e9", add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts).startswith("a value is\n  3 ")
    assert [text for text in texts if text.startswith("<")], "a euro sign in parts"
    assert all(re.fullmatch(r"<[0-9A-F]{2}( [0-9A-F]{2})*>", text) for text in texts if text.startswith("<"))
    assert bytes.fromhex("".join(text.strip("<>") for text in texts if text.startswith("<"))).decode() in (
        "\u20ac",
        "\u20ac\u00e9",
    )


def test_bad_dashboard_arguments_are_refused(refused, mxd, converted, copy, models, text, tmp_path):
    folder, board = converted["llama"], tmp_path / "board"
    refused("dashboard", tmp_path / "nowhere", "--data", text, "--output", board, words=("nowhere", "no such folder"))
    refused(
        "dashboard", models["llama"], "--data", text, "--output", board, words=("'llama' model", "not of one with MxD layers")
    )
    refused("dashboard", folder, "--data", tmp_path / "none.txt", "--output", board, words=("none.txt", "no such file"))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    refused("dashboard", folder, "--data", empty, "--output", board, words=("empty.txt", "the text is empty"))
    refused("dashboard", folder, "--data", text, "--output", board, "--text-field", "body", words=("body", "its fields are text"))
    refused("dashboard", folder, "--data", text, "--output", board, "--tokens", 5, words=("--tokens 5", "block of 32"))
    refused("dashboard", folder, "--data", text, "--output", board, "--layers", "1", words=("layer 1 is not converted", "0, 2"))
    refused("dashboard", folder, "--data", text, "--output", board, "--layers", "x", words=("--layers", "'x'"))
    refused("dashboard", folder, "--data", text, "--output", folder, words=("exists already", "not a dashboard"))
    refused("dashboard", folder, "--data", text, "--output", text, words=("exists already",))
    refused("dashboard", folder, "--data", text, "--output", "/", words=("/", "another folder"))
    (copy / "mxd_labels.json").write_text("{")
    refused("dashboard", copy, "--data", text, "--output", board, words=("mxd_labels.json",))
    assert not board.exists()
    arguments = ("dashboard", folder, "--data", text, "--output", board, "--tokens", 640)
    status, out, _ = mxd(*arguments, "--layers", "2", "--json")
    assert (status, list(json.loads(out)["layers"])) == (0, ["2"])
    (board / "notes.txt").write_text("mine")
    refused(*arguments, words=("exists already",))
    (board / "notes.txt").unlink()
    status, out, err = mxd(*arguments)
    assert (status, out.strip()) == (0, str(board / "index.html"))
    assert "layer 2: 24 experts" in err


def test_a_text_without_counted_tokens_is_refused(models, tmp_path):
    """A text with excluded positions only is an error, not a division by zero."""
    tokenizer = load_tokenizer(str(models["gpt2"]))
    (tmp_path / "one.txt").write_text("\n\n".join("a" for _ in range(200)))
    blocks = blocks_of(tmp_path / "one.txt", tokenizer, tmp_path / "text", tokens=2, context=1)
    with pytest.raises(InputError, match="only BOS tokens"):
        write_dashboard(tmp_path / "board", gpt2_with_layers(models, {0: ("mxd", {})}), tokenizer, blocks, "x", quiet=True)


def test_a_run_writes_its_dashboard(models, text, tmp_path, monkeypatch, capsys, recipe, refused):
    """The dashboard of the held-out text is in the finished folder; if it fails, the training is kept."""
    settings = small_recipe(models["llama"], text, tmp_path / "out", layers=[1], output={"dashboard": True})
    with monkeypatch.context() as broken:
        broken.setattr("mxd_convert.commands.run.write_dashboard", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(InputError, match="out of memory"):
            convert(settings, quiet=True)
    assert list((tmp_path / "out.partial" / "state").rglob("step-*.json"))
    result = convert(settings)
    assert "training 100%" not in capsys.readouterr().err, "it was trained again"
    summary = data_of(result.output / "dashboard", "data/summary")
    assert summary["checkpoint"] == "out"
    assert summary["data"]["fingerprint"] == result.report["data"]["eval"]["fingerprint"]
    assert summary["data"]["tokens"] <= result.report["data"]["eval"]["tokens"]
    assert summary["layers"][0]["active"] == pytest.approx(result.report["fidelity"]["layers"]["1"]["l0"], rel=0.2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    convert(settings)
    assert "has no dashboard" not in capsys.readouterr().err
    without = small_recipe(models["llama"], text, tmp_path / "bare", layers=[1])
    convert(without, quiet=True)
    convert(without, overrides={"output.dashboard": True})
    assert "has no dashboard. `mxd-convert dashboard" in capsys.readouterr().err
    refused("plan", recipe(output={"dashboard": True}, layer={"kind": "dense_twin"}), words=("output.dashboard", "no experts"))

"""The dashboard says of every expert what it does: figures, contexts and effects against explicit loops; one folder, safe, the same each time."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import documents, small_recipe
from test_kinds import KINDS

import mxd_convert
from mxd_convert import InputError, convert, load_checkpoint, logit_effect
from mxd_convert.base import load_base, load_tokenizer
from mxd_convert.data import prepare_eval
from mxd_convert.evaluation import expert_examples, expert_statistics, firings
from mxd_convert.evaluation.decomposition import Unembedding, layer_inputs, take_apart
from mxd_convert.evaluation.expert_effects import EffectsOfLayer, weights
from mxd_convert.evaluation.expert_examples import AFTER, BANDS, BEFORE, BINS, EACH, TOP, examples, figures
from mxd_convert.evaluation.expert_statistics import SAMPLES, collect
from mxd_convert.layers import Shape, new_layer
from mxd_convert.recipe import Base, EvalText
from mxd_convert.report.dashboard import pages, write_dashboard
from mxd_convert.report.dashboard.tokens import token_texts
from mxd_convert.surgery import convert as put_layers


def blocks_of(text: Path, tokenizer, folder: Path, tokens: int = 1600, context: int = 32):
    folder.mkdir(exist_ok=True)
    return prepare_eval(EvalText(path=str(text), tokens=tokens), context, tokenizer, folder)


def with_layers(models, entries: dict[int, tuple[str, dict]]):
    """The tiny GPT-2 with untrained layers of given kinds, whose rows are random."""
    base = load_base(Base(model=str(models["gpt2"])))
    layers = {}
    for index, (kind, settings) in entries.items():
        torch.manual_seed(index)
        hidden = 0 if "coder" in kind else 48
        experts = (0, 0) if kind == "dense_twin" else (40, 4)
        shape = Shape(kind, 32, hidden, 32, *experts, activation="gelu_new", **{"skip": kind == "skip_transcoder", **settings})
        layers[index] = new_layer(shape)
        with torch.no_grad():
            for parameter in layers[index].parameters():
                parameter.normal_().mul_(0.3)
            if kind != "dense_twin":
                layers[index].gate.bias[16:32] = -1e3  # a whole range that never fires
    return put_layers(base, layers)


def data_of(folder: Path, name: str):
    """What a data file hands to the page."""
    match = re.fullmatch(rf'MXD\.give\("{name}",(.*)\);\n', (folder / f"{name}.js").read_text(encoding="ascii"))
    return json.loads(match[1])


def experts_of(folder: Path, layer: int) -> list[dict]:
    number = len(list((folder / "data" / str(layer)).glob("experts-*.js")))
    return [expert for shard in range(number) for expert in data_of(folder, f"data/{layer}/experts-{shard}")]


@torch.no_grad()
def loop(model, index: int, blocks, mask_bos: bool) -> dict[int, list[tuple[int, float]]]:
    """Of every expert that fires, (position, coefficient), token by token."""
    layer, found = model.mxd_layers()[index], {}
    for block in range(len(blocks)):
        ids = blocks.take(slice(block, block + 1))
        with layer_inputs(model, [index]) as seen:
            model(input_ids=ids)
        parts, counted = take_apart(layer, seen[index]), blocks.counted(ids, mask_bos)
        for place in range(blocks.context):
            if counted[0, place]:
                for n, value in zip(parts.experts[0, place].tolist(), parts.values[0, place].tolist(), strict=True):
                    if value > 0:
                        found.setdefault(n, []).append((block * blocks.context + place, value))
    return found


ALL_KINDS = [(kind, {}) for kind in KINDS if kind != "dense_twin"] + [
    ("mxd", {"sparsity": "l1"}),
    ("transcoder", {"sparsity": "l1"}),
]


@pytest.mark.parametrize(("kind", "settings"), ALL_KINDS, ids=str)
@pytest.mark.parametrize("mask_bos", [True, False])
def test_figures_and_contexts_equal_an_explicit_loop(models, text, tmp_path, monkeypatch, kind, settings, mask_bos):
    """Over several batches, pieces and ranges of experts."""
    monkeypatch.setattr(expert_statistics, "_GATES", 40 * 32 * 7)
    monkeypatch.setattr(firings, "_PIECE", 1000)
    model, tokenizer = with_layers(models, {1: (kind, settings)}), load_tokenizer(str(models["gpt2"]))
    blocks = blocks_of(text, tokenizer, tmp_path / "text")
    record = collect(model, blocks, tmp_path / "records", mask_bos=mask_bos, quiet=True)[1]
    expected = loop(model, 1, blocks, mask_bos)
    assert record.tokens == blocks.counted(blocks.take(slice(None)), mask_bos).sum()
    assert 0 < len(expected) <= 24
    ranges = list(record.firings.ranges(16, 3000))
    assert [first for first, _ in ranges] == [0, *(last for _, last in ranges[:-1])]
    assert len(ranges) >= 3
    assert ranges[-1][1] == 40
    for first, last in ranges:
        pairs = record.firings.read(first, last)
        of, shown = figures(pairs), examples(pairs, blocks)
        for n in range(first, last):
            check_figures(of, n - first, expected.get(n, []))
            check_contexts(shown, n - first, expected.get(n, []), blocks)


def check_figures(of, place: int, fired: list[tuple[int, float]]) -> None:
    values = np.array([value for _, value in fired])
    assert of.count[place] == len(values) == of.histogram[place].sum()
    if len(values) == 0:
        assert of.mean[place] == of.largest[place] == of.p99[place] == 0
        return
    assert of.mean[place] == pytest.approx(values.mean(), rel=1e-4)
    assert of.largest[place] == pytest.approx(values.max(), rel=1e-4)
    assert of.p99[place] == pytest.approx(np.quantile(values, 0.99), rel=1e-4)
    expected = np.histogram(values, bins=BINS, range=(0, values.max()))[0]
    assert np.abs(of.histogram[place] - expected).sum() <= 2  # a value at a bin's very edge


def check_contexts(shown, place: int, fired: list[tuple[int, float]], blocks) -> None:
    value_at, context = dict(fired), blocks.context
    ids = blocks.ids.reshape(-1)
    top, seen_blocks, seen_texts = [], set(), set()
    for position, _ in sorted(fired, key=lambda pair: -pair[1]):
        block, start = position // context, max(position // context * context, position - 7)
        recent = tuple(ids[start : position + 1].tolist())
        if block in seen_blocks:
            continue
        seen_blocks.add(block)
        if recent not in seen_texts:
            top.append(position)
        seen_texts.add(recent)
    found = [position for position in shown.top[place].tolist() if position >= 0]
    assert [value_at[position] for position in found] == pytest.approx([value_at[position] for position in top[:TOP]], rel=1e-4)
    ranked = sorted(value_at.values())
    for band in range(BANDS):
        rows = [position for position in shown.bands[place, band].tolist() if position >= 0]
        low, high = -(-band * len(ranked) // BANDS), -(-(band + 1) * len(ranked) // BANDS)
        assert len(rows) == len(set(rows)) == min(EACH, high - low)
        if rows:
            assert shown.bounds[place, band].tolist() == pytest.approx([ranked[low], ranked[high - 1]], rel=1e-4)
        for position in rows:
            assert ranked[low] * 0.9999 <= value_at[position] <= ranked[high - 1] * 1.0001
    for positions, heat in ((shown.top[place], shown.top_heat[place]), (shown.bands[place], shown.bands_heat[place])):
        for position, row in zip(positions.ravel().tolist(), heat.reshape(-1, BEFORE + 1 + AFTER).tolist(), strict=True):
            for offset, value in enumerate(row, -BEFORE):
                at = position + offset
                there = position >= 0 and at // context == position // context
                assert value == pytest.approx(value_at.get(at, 0.0) if there else 0.0, rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_what_it_promotes_is_logit_effect(converted, text, tmp_path, family):
    """Mean and spread of every expert; the spread of those that fire often is of a sample."""
    model, tokenizer = load_checkpoint(converted[family], dtype="float32"), load_tokenizer(str(converted[family]))
    blocks = blocks_of(text, tokenizer, tmp_path / "text", tokens=320)
    records = collect(model, blocks, tmp_path / "records", mask_bos=False, quiet=True)
    assert set(records) == {0, 2}
    whole = blocks.take(slice(None))
    exact = 0
    for index, record in records.items():
        up, down = EffectsOfLayer(record, Unembedding(model), 2048).of(4, 20)
        for n in range(4, 20):
            effect = logit_effect(model, index, n, whole)
            assert record.firings.count_N[n] == effect.tokens
            if effect.tokens == 0:
                continue
            scale = effect.mean.abs().max().item()
            for found, signed in ((up, effect.mean), (down, -effect.mean)):
                ids = found.tokens[n - 4].tolist()
                assert np.abs(found.mean[n - 4] - effect.mean[ids].numpy()).max() < 1e-4 * scale
                assert signed[ids].tolist() == pytest.approx(signed.topk(10).values.tolist(), abs=1e-4 * scale)
                if 1 < effect.tokens <= SAMPLES:
                    exact += 1
                    assert np.abs(found.spread[n - 4] - effect.spread[ids].numpy()).max() < 0.02 * scale
                else:
                    assert (found.spread[n - 4] < 8 * effect.spread[ids].numpy() + 0.02 * scale).all()
    assert exact


@torch.no_grad()
def test_samples_are_firings_drawn_whatever_the_batches(models, text, tmp_path, monkeypatch):
    """Each kept vector is a_n u s of a token where the expert fires; larger batches keep the same ones."""
    model, tokenizer = with_layers(models, {1: ("mxd", {})}), load_tokenizer(str(models["gpt2"]))
    layer, blocks = model.mxd_layers()[1], blocks_of(text, tokenizer, tmp_path / "text")
    other = collect(model, blocks, tmp_path / "other", quiet=True)[1]
    monkeypatch.setattr(expert_statistics, "_GATES", 40 * 32 * 3)
    one = collect(model, blocks, tmp_path / "one", quiet=True)[1]
    assert np.array_equal(np.sort(one._keys_NS), np.sort(other._keys_NS))
    ids = blocks.take(slice(None))
    with layer_inputs(model, [1]) as seen, Unembedding(model).scales() as scales:
        model(input_ids=ids)
    counted = blocks.counted(ids, mask_bos=True)
    parts, scaled = take_apart(layer, seen[1][counted]), layer.linear(seen[1][counted]) * scales[0][counted].unsqueeze(-1)
    for n in range(40):
        fires = (parts.experts == n) & (parts.values > 0)
        expected = (parts.values * fires).sum(-1, keepdim=True)[fires.any(-1)] * scaled[fires.any(-1)]
        drawn = int(one.drawn_N[n])
        assert drawn == min(SAMPLES, len(expected))
        if drawn == 0:
            continue
        distance = torch.cdist(one.samples_NSO[n, :drawn].float(), expected)
        assert (distance.min(-1).values < 0.01 * expected.norm(dim=-1).max()).all()
        assert torch.allclose(one.written_NO[n], expected.sum(0), atol=1e-3 * expected.abs().sum(0).max().item())


def test_ranks_and_norms_of_the_weights(models):
    model = with_layers(models, {1: ("mxd", {}), 2: ("transcoder", {})})
    layer = model.mxd_layers()[1]
    with torch.no_grad():
        layer.experts[3, :5] = 0
        layer.experts[4] = 0
    found = weights(layer)
    for n in (2, 3, 4):
        assert found.rank[n] == mxd_convert.expert_rank(layer, n)
        assert found.norm[n] == pytest.approx(layer.expert_weight(n).norm().item(), rel=1e-5, abs=1e-9)
    with torch.no_grad():
        layer.decoder.weight[:, 20:] = 0  # no longer of full rank
    assert weights(layer).rank[[2, 3, 4]].tolist() == [mxd_convert.expert_rank(layer, n) for n in (2, 3, 4)] == [20, 20, 0]
    assert weights(model.mxd_layers()[2]) is None


def test_a_dashboard_in_full(converted, text, tmp_path, monkeypatch):
    """Its pages against the functions above; the same bytes again, and in other ranges; replaced in place."""
    monkeypatch.setattr(pages, "SHARD", 16)
    output = tmp_path / "board"
    written = mxd_convert.dashboard(converted["llama"], text, output, tokens=1600, quiet=True)
    assert {path.name for path in output.iterdir()} == {"index.html", "expert.html", "assets", "data"}
    summary, tokens = data_of(output, "data/summary"), data_of(output, "data/tokens")
    assert [layer["layer"] for layer in summary["layers"]] == [0, 2]
    model, tokenizer = load_checkpoint(converted["llama"], dtype="float32"), load_tokenizer(str(converted["llama"]))
    blocks = blocks_of(text, tokenizer, tmp_path / "text")
    expected = loop(model, 2, blocks, mask_bos=True)
    about, experts, rows = summary["layers"][1], experts_of(output, 2), data_of(output, "data/2/index")
    assert len(experts) == 24
    assert about["tokens"] == summary["data"]["tokens"] == blocks.counted(blocks.take(slice(None)), True).sum()
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
    mxd_convert.dashboard(converted["llama"], text, output, tokens=1600, quiet=True)
    assert before == {path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["board", "text"]


def test_every_kind_has_its_pages(models, text, tmp_path):
    """Side by side in one model; a layer without experts is named, and experts without matrices have no rank."""
    entries = {0: ("random_gate", {}), 1: ("dense_twin", {}), 2: ("skip_transcoder", {"sparsity": "l1"})}
    model, tokenizer = with_layers(models, entries), load_tokenizer(str(models["gpt2"]))
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
            write_dashboard(tmp_path / "none", with_layers(models, alone), tokenizer, blocks, "none", layers=[1], quiet=True)
    assert not (tmp_path / "none").exists()


NASTY = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "<!-- ]]> & \" ' \\ \u2028 \u2029 \u202e &lt;b&gt; <b>bold</b>",
)


def test_nothing_in_the_text_gets_out_of_it(copy, tmp_path):
    """What could end a script is in no file, and comes back as it was."""
    nasty = tmp_path / "nasty.jsonl"
    nasty.write_text("".join(json.dumps({"text": f"{NASTY[i % 3]} {document}"}) + "\n" for i, document in enumerate(documents())))
    mxd_convert.add_labels(copy, [{"layer": 2, "expert": 3, "text": NASTY[1], "author": NASTY[2]}])
    mxd_convert.dashboard(copy, nasty, tmp_path / "board", tokens=1600, quiet=True)
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
    for script in (tmp_path / "board" / "assets").glob("*.js"):
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http:", "https:"):
            assert way not in script.read_text().replace("http://www.w3.org/2000/svg", ""), (script, way)


def test_tokens_read_as_they_do_in_a_text(models):
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


def test_bad_input(refused, mxd, converted, copy, models, text, tmp_path):
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


def test_only_begins_of_sequences(models, tmp_path):
    """A text of nothing but what is left out: said so, not divided by."""
    tokenizer = load_tokenizer(str(models["gpt2"]))
    (tmp_path / "one.txt").write_text("\n\n".join("a" for _ in range(200)))
    blocks = blocks_of(tmp_path / "one.txt", tokenizer, tmp_path / "text", tokens=2, context=1)
    with pytest.raises(InputError, match="nothing in it but BOS"):
        write_dashboard(tmp_path / "board", with_layers(models, {0: ("mxd", {})}), tokenizer, blocks, "x", quiet=True)


def test_a_run_writes_it(models, text, tmp_path, monkeypatch, capsys, recipe, refused):
    """In the finished folder, of the held-out text; where it fails the training is kept, and without it the run still ends."""
    settings = small_recipe(models["llama"], text, tmp_path / "out", layers=[1], output={"dashboard": True})
    with monkeypatch.context() as broken:
        broken.setattr("mxd_convert.pipeline.write_dashboard", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
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
    assert "it has no dashboard" not in capsys.readouterr().err
    without = small_recipe(models["llama"], text, tmp_path / "bare", layers=[1])
    convert(without, quiet=True)
    convert(without, overrides={"output.dashboard": True})
    assert "it has no dashboard; `mxd-convert dashboard" in capsys.readouterr().err
    refused("plan", recipe(output={"dashboard": True}, layer={"kind": "dense_twin"}), words=("output.dashboard", "no experts"))


def test_hashes_are_even():
    """The draw of examples rests on it: bits of neighbouring numbers are fair."""
    bits = np.unpackbits(firings.mixed(np.arange(4096), seed=3).view(np.uint8)).reshape(4096, 64).mean(0)
    assert np.abs(bits - 0.5).max() < 0.05
    assert expert_examples.rank_within(np.array([2, 2, 5, 5, 5, 0])).tolist() == [0, 1, 0, 1, 2, 0]

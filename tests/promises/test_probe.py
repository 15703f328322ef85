"""Probes find a planted expert, choose on the training part alone, and score at chance on random labels."""

import csv
import json
import re
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from project import QUICKSTART
from small_runs import small_recipe

import mxd_convert
from mxd_convert.base_model import swap
from mxd_convert.base_model.capture import recording
from mxd_convert.base_model.families import find_sites
from mxd_convert.base_model.load import load_base, load_tokenizer
from mxd_convert.checkpoint.read import load_checkpoint
from mxd_convert.data.labelled import read_labelled
from mxd_convert.errors import InputError
from mxd_convert.evaluation.probes import fit as probing
from mxd_convert.evaluation.probes.pooling import coefficients_of, encode_documents, pool, random_coefficients
from mxd_convert.layers import MxD
from mxd_convert.layers.trainable import trainable_class
from mxd_convert.recipe.schema import Base

WORDS = ["the", "value", "of", "this", "class", "is", "not", "in", "a", "list", "when", "name", "type", "string", "object"]
PLANTED = (0, 7)  # layer, expert
COLUMNS = [
    *("class", "family", "layer", "unit", "train_documents", "test_documents", "test_in_class", "candidates", "cv_f1"),
    *("f1", "f1_low", "f1_high", "balanced_accuracy", "balanced_accuracy_low", "balanced_accuracy_high", "chance"),
]


def documents(count: int) -> tuple[list[str], list[str]]:
    """Return texts of random words and their classes; every second text has a word that marks its class."""
    rng = np.random.default_rng(0)
    texts, labels = [], []
    for number in range(count):
        words = list(rng.choice(WORDS, rng.integers(4, 14)))
        if number % 2:
            words[rng.integers(1, len(words))] = "return"
        texts.append(" ".join(words))
        labels.append("returns" if number % 2 else "other")
    return texts, labels


def write_labelled(path, texts, labels, **fields):
    names = {"text": "text", "label": "label", **fields}
    rows = ({names["text"]: text, names["label"]: label} for text, label in zip(texts, labels, strict=True))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("labelled") / "labelled.jsonl", *documents(140))


@torch.no_grad()
def plant(base, layers, tokenizer) -> None:
    """Make one expert of a layer fire on the word of the class alone, by a least-squares gate."""
    sites = find_sites(base, base.config, [PLANTED[0]])
    inputs, hits = [], []
    [target] = tokenizer(" return", add_special_tokens=False)["input_ids"]
    with recording(base, sites) as seen:
        for text in documents(140)[0]:
            ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
            base(input_ids=ids)
            inputs.append(seen[PLANTED[0]].inputs[0])
            hits.append((ids[0] == target).float())
    x, y = torch.cat(inputs), torch.cat(hits)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y[:, None], driver="gelsd").solution[:, 0]
    layers[PLANTED[0]].gate.weight[PLANTED[1]] = 1e3 * solution[:-1]
    layers[PLANTED[0]].gate.bias[PLANTED[1]] = 1e3 * (solution[-1] - 0.6)


def save_planted(models, folder, sparsity="topk"):
    base, tokenizer = load_base(Base(model=str(models["llama"]))), load_tokenizer(str(QUICKSTART))
    torch.manual_seed(0)
    sites = find_sites(base, base.config, [0, 2])
    layers = {site.index: MxD(site.d_in, site.d_hidden, site.d_out, 24, 4, site.activation, site.glu, sparsity) for site in sites}
    plant(base, layers, tokenizer)
    swap.insert_layers(base, layers).save_pretrained(folder)  # their decoders are zero: below the planted layer nothing is random
    tokenizer.save_pretrained(folder)
    (folder / "mxd_local.json").write_text(json.dumps({"base": str(models["llama"])}))
    return folder


@pytest.fixture(scope="module")
def planted(models, tmp_path_factory):
    return save_planted(models, tmp_path_factory.mktemp("planted") / "planted")


@pytest.fixture(scope="module")
def found(planted, labelled):
    return mxd_convert.probe(planted, labelled, quiet=True)


def by_family(content, label):
    return {row["family"]: row for row in content["results"] if row["class"] == label}


# --- from a checkpoint on disk -------------------------------------------------------------------------------------------------


def test_a_planted_expert_is_found(found):
    row = by_family(found, "returns")["expert"]
    assert (row["layer"], row["unit"]) == PLANTED
    assert row["f1"] > 0.95
    assert row["f1_low"] <= row["f1"] <= row["f1_high"] <= 1
    assert (row["train_documents"], row["test_documents"], row["test_in_class"]) == (98, 42, 21)
    best = next(unit for unit in found["top_experts"] if unit["class"] == "returns")
    assert (best["rank"], best["layer"], best["unit"]) == (1, *PLANTED)
    assert best["mean_in_class"] > 10 * best["mean_elsewhere"]
    assert best["active_in_class"] > 0.95
    assert by_family(found, "returns")["random gate"]["f1"] < row["f1"]


def test_shuffled_labels_find_nothing(planted, found):
    """With the same features, scores are near chance, and intervals contain chance as often as they promise."""
    model = load_checkpoint(planted, dtype="float32")
    texts, labels = documents(140)
    encoded, _ = encode_documents(texts, load_tokenizer(str(planted)), 128, 2048)
    sources = {index: coefficients_of(layer) for index, layer in model.mxd_layers().items()}
    layers = pool(model, sources, encoded, torch.device("cpu"))
    figures = []
    for seed in range(8):
        shuffled = np.random.default_rng(seed).permutation(np.asarray(labels) == "returns").astype(int)
        split = probing.split_documents(shuffled, seed)
        _, (_, predicted) = probing.probe_units(layers, shuffled, split, 2)
        figures.append(probing.scores(shuffled[split.test] == 1, predicted, seed))
    assert np.mean([row["balanced_accuracy"] for row in figures]) == pytest.approx(0.5, abs=0.07)
    assert np.mean([row["f1"] for row in figures]) < found["results"][0]["chance"]
    assert sum(row["balanced_accuracy_low"] <= 0.5 <= row["balanced_accuracy_high"] for row in figures) >= 7


def test_the_folder_holds_all_results(found, planted, labelled):
    folder = planted.parent / "planted-probe-labelled"
    assert found["output"] == str(folder)
    assert {path.name for path in folder.iterdir()} == {"probe.json", "probe.csv", "top_experts.csv", "probe.png"}
    assert (folder / "probe.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "probe.json").read_text()
    assert str(planted.parent) not in text
    assert str(labelled.parent) not in text
    content = json.loads(text)
    assert {**content, "output": str(folder)} == found
    with (folder / "probe.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert [(row["class"], row["family"]) for row in rows] == [
        (label, family) for label in ("other", "returns") for family in ("expert", "neuron", "random gate", "all experts")
    ]
    assert float(rows[0]["f1"]) == pytest.approx(found["results"][0]["f1"], abs=1e-6)
    with (folder / "top_experts.csv").open() as file:
        top = list(csv.DictReader(file))
    assert [row["rank"] for row in top if row["class"] == "other"] == [str(rank) for rank in range(1, 11)]
    assert content["families"]["neuron"]["units"] == 2 * 48
    assert content["families"]["expert"]["units"] == content["families"]["random gate"]["units"] == 48
    assert content["data"]["classes"]["other"] == {"available": 70, "train": 49, "test": 21}
    assert content["versions"]["scikit-learn"]


def test_a_second_probe_gives_the_same_and_replaces_only_its_own_folder(found, planted, labelled, mxd, refused, tmp_path):
    status, out, err = mxd("probe", planted, "--data", labelled, "--json")
    assert status == 0, err
    again = json.loads(out)
    assert {**again, "cost": None} == {**found, "cost": None}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "probe.json").write_text("{}")
    refused("probe", planted, "--data", labelled, "--output", tmp_path / "mine", words=("mine", "exists already"))
    assert not list(planted.parent.glob(".*"))


def test_dense_coefficients_are_probed(models, labelled, tmp_path, mxd):
    folder = save_planted(models, tmp_path / "l1", sparsity="l1")
    model = load_checkpoint(folder, dtype="float32")
    layer = model.mxd_layers()[0]
    encoded, _ = encode_documents(documents(10)[0], load_tokenizer(str(folder)), 20, 2048)
    sources = {"expert": coefficients_of(layer), "random": random_coefficients(layer, 0)}
    pooled = pool(model, sources, encoded, torch.device("cpu"))
    for rows, ids, weight in encoded.batches(1000):
        seen = []
        handle = layer.register_forward_hook(lambda module, arguments, output, seen=seen: seen.append(arguments[0]))
        model(input_ids=ids)
        handle.remove()
        expected = (layer.encode(seen[0]) * weight.unsqueeze(-1)).sum(1)
        np.testing.assert_allclose(pooled["expert"][rows], expected.numpy(), rtol=1e-4, atol=1e-5)
    x, control = torch.randn(5, 7, layer.d_in), random_coefficients(layer, 0).coefficients
    random = control(x, None)
    possible = ((x @ control.weight_NI.T) > 0).sum(-1)
    assert ((random > 0).sum(-1) == torch.minimum((layer.encode(x) > 0).sum(-1), possible)).all()
    assert pooled["expert"].shape == pooled["random"].shape == (10, 24)
    status, out, err = mxd("probe", folder, "--data", labelled, "--layers", 0, "--output", tmp_path / "out")
    assert status == 0, err
    assert f"{PLANTED[0]}:{PLANTED[1]}" in out


def test_further_checkpoints_are_compared(models, text, planted, labelled, tmp_path, mxd):
    others = []
    for kind in ("transcoder", "random_gate"):
        settings = {"layer": {"kind": kind}, "layers": [2], "data": {"tokens": 512}}
        others.append(tmp_path / kind)
        mxd_convert.convert(small_recipe(models["llama"], text, others[-1], **settings), quiet=True)
    content = mxd_convert.probe(others[0], labelled, compare=[others[1], others[0]], output=tmp_path / "out", quiet=True)
    assert list(content["families"]) == ["latent", "neuron", "random gate, trained layer", "transcoder", "all latents"]
    assert content["checkpoint"]["kind"] == "transcoder"
    assert content["families"]["neuron"]["layers"] == [2]
    status, _, err = mxd("probe", others[0], "--data", labelled, "--compare", planted, "--output", tmp_path / "no")
    assert status == 2
    assert "another base model" in err


def test_labels_are_data_in_every_output(planted, tmp_path, mxd):
    texts, _ = documents(60)
    names = ["../../escape", "=1+1", "[red]$\\frac{$ \n[/red]"]
    data = write_labelled(tmp_path / "odd name;.jsonl", texts, [names[number % 3] for number in range(60)])
    shutil.copytree(planted, tmp_path / "model")
    status, out, err = mxd("probe", tmp_path / "model", "--data", data)
    assert status == 0, err
    assert "[red]$\\frac{$ [/red]" in out
    assert "=1+1" in out
    folder = tmp_path / "model-probe-odd_name"
    assert {path.name for path in tmp_path.iterdir()} == {"model", data.name, folder.name}
    assert len(list(folder.iterdir())) == 4
    with (folder / "probe.csv").open(newline="") as file:
        assert {row["class"] for row in csv.DictReader(file)} == {names[0], "'=1+1", names[2]}  # no spreadsheet runs it


# --- documents and bad input ---------------------------------------------------------------------------------------------------


def test_the_sample_of_documents_depends_on_content_and_seed(tmp_path):
    texts, labels = documents(60)
    texts += ["twice", "twice", "both", "both", "  "]
    labels += ["other", "other", "other", "returns", "other"]
    one = read_labelled(str(write_labelled(tmp_path / "a.jsonl", texts, labels)), "text", "label", 20, 0)
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = write_labelled(tmp_path / "b.jsonl", [texts[i] for i in order], [labels[i] for i in order])
    assert read_labelled(str(shuffled), "text", "label", 20, 0) == one
    assert read_labelled(str(shuffled), "text", "label", 20, 1).texts != one.texts
    assert one.available == {"other": 33, "returns": 31}
    everything = read_labelled(str(shuffled), "text", "label", 99, 0)
    assert (everything.empty, everything.ambiguous) == (1, 2)
    assert everything.texts.count("twice") == 1
    assert "both" not in everything.texts
    assert len(one.texts) <= 40
    table = pyarrow.table({"body": texts, "kind": [int(label == "other") for label in labels]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    columns = read_labelled(str(tmp_path / "c.parquet"), "body", "kind", 99, 0)
    assert columns.texts == everything.texts
    assert set(columns.labels) == {"0", "1"}


def labelled_rows(path, rows):
    """Write labelled rows to a .jsonl or .parquet file; return its path."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_whole_numbers_are_classes_and_empty_texts_are_left_out(tmp_path, name):
    rows = [{"text": "a", "label": 3.0}, {"text": "b", "label": 4.0}, {"text": "", "label": None}, {"text": " ", "label": 3.0}]
    sample = read_labelled(labelled_rows(tmp_path / name, rows), "text", "label", 20, 0)
    assert dict(zip(sample.texts, sample.labels, strict=True)) == {"a": "3", "b": "4"}
    assert sample.empty == 2
    whole = labelled_rows(tmp_path / name, [{"text": "a", "label": 3}])
    assert read_labelled(whole, "text", "label", 20, 0).labels == ["3"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"label": 0.25}, "row 2: no label in the field 'label': it holds the number 0.25. A label is text or a whole number"),
        ({"label": float("nan")}, "it holds NaN"),
        ({"label": float("inf")}, "it holds the number inf"),
        ({"label": None}, "it holds null"),
        ({"label": True}, "it holds true"),
        ({"label": ["x"]}, "it holds a list that begins with text"),
        ({"label": " "}, "it holds empty text"),
        (
            {"text": [{"role": "user", "content": "x"}]},
            "no text in the field 'text': it holds a list of messages (role, content)",
        ),
    ],
    ids=str,
)
def test_labels_and_texts_of_another_type_are_refused_with_their_content(tmp_path, name, row, words):
    first = {"text": row["text"], "label": "x"} if "text" in row else {"text": "", "label": None}  # a column has one type
    rows = [first, {"text": "b", "label": "x", **row}]
    with pytest.raises(InputError, match=re.escape(words.replace("row", "line" if name == "a.jsonl" else "row"))):
        read_labelled(labelled_rows(tmp_path / name, rows), "text", "label", 20, 0)


def test_bad_input_is_refused_and_nothing_written(refused, planted, models, converted, labelled, tmp_path):
    texts, labels = documents(40)

    def data(name, labels=labels, texts=texts, **fields):
        return write_labelled(tmp_path / name, texts, labels, **fields)

    refused("probe", planted, "--data", tmp_path / "none.jsonl", words=("none.jsonl", "no such file"))
    refused("probe", planted, "--data", data("f.jsonl", text="body"), words=("'text'", "its fields are body", "--text-field"))
    refused(
        "probe", planted, "--data", data("g.jsonl", label="kind"), words=("'label'", "its fields are text, kind", "--label-field")
    )
    refused("probe", planted, "--data", data("h.jsonl", labels=[None] * 40), words=("h.jsonl, line 1", "no label"))
    refused("probe", planted, "--data", data("i.jsonl", labels=["one"] * 40), words=("one class", "'one'", "at least two"))
    refused("probe", planted, "--data", data("j.jsonl", labels=["few"] * 9 + ["many"] * 31), words=("'few'", "9 documents", "10"))
    refused("probe", planted, "--data", data("k.jsonl", texts=[" \n"] * 40), words=("k.jsonl", "no document with text"))
    refused(
        "probe", planted, "--data", data("l.jsonl"), "--label-field", "text", words=("class", "--data l.jsonl", "1 document with")
    )
    (tmp_path / "m.txt").write_text("no labels")
    refused("probe", planted, "--data", tmp_path / "m.txt", words=("m.txt", "no labels"))
    (tmp_path / "n.jsonl").write_text("{")
    refused("probe", planted, "--data", tmp_path / "n.jsonl", words=("n.jsonl, line 1", "not valid JSON"))
    refused("probe", planted, "--data", labelled, "--layers", "1", words=("layer 1 is not converted", "0, 2"))
    refused("probe", planted, "--data", labelled, "--layers", "x", words=("--layers", "'x'"))
    refused("probe", planted, "--data", labelled, "--documents", 9, words=("--documents 9", "10"))
    refused("probe", planted, "--data", labelled, "--tokens", 129, words=("--tokens 129", "128"))
    refused("probe", planted, "--data", labelled, "--seed", -1, words=("--seed -1",))
    refused("probe", planted, "--data", labelled, "--base", tmp_path / "nowhere", words=("nowhere",))
    refused("probe", planted, "--data", labelled, "--compare", converted["gpt2"], words=("gpt2", "another base"))
    refused("probe", planted, "--data", labelled, "--output", labelled, words=("labelled.jsonl", "exists already"))
    refused("probe", planted, "--data", labelled, "--output", labelled / "below", words=("below", "can't be written"))
    refused("probe", models["llama"], "--data", labelled, words=("not of one with MxD layers",))
    refused("probe", tmp_path / "nowhere", "--data", labelled, words=("nowhere", "no such folder"))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert not list(planted.parent.glob("*-probe-[f-n]"))


def test_a_checkpoint_without_experts_is_refused(refused, models, labelled, tmp_path):
    base = load_base(Base(model=str(models["llama"])))
    [site] = find_sites(base, base.config, [1])
    folder = tmp_path / "twin"
    swap.insert_layers(base, {1: trainable_class("dense_twin")(site.d_in, 8, site.d_out)}).save_pretrained(folder)
    load_tokenizer(str(QUICKSTART)).save_pretrained(folder)
    refused("probe", folder, "--data", labelled, words=("twin", "dense_twin", "no experts"))
    assert [path.name for path in tmp_path.iterdir()] == ["twin"]


def test_ag_news_is_probed_with_a_real_model(shared, tmp_path):
    base = load_base(Base(model=str(shared / "models" / "stories260K")))
    torch.manual_seed(0)
    sites = find_sites(base, base.config, [1, 3])
    layers = {site.index: MxD(site.d_in, site.d_hidden, site.d_out, 200, 8, site.activation, site.glu) for site in sites}
    swap.insert_layers(base, layers).save_pretrained(tmp_path / "model")
    load_tokenizer(str(shared / "models" / "stories260K")).save_pretrained(tmp_path / "model")
    content = mxd_convert.probe(
        tmp_path / "model",
        shared / "data" / "ag_news_test.jsonl.gz",
        base=str(shared / "models" / "stories260K"),
        documents=60,
        tokens=32,
        quiet=True,
    )
    assert list(content["data"]["classes"]) == ["Business", "Sci/Tech", "Sports", "World"]
    assert content["data"]["classes"]["World"] == {"available": 1900, "train": 42, "test": 18}
    assert content["output"] == str(tmp_path / "model-probe-ag_news_test")
    assert all(0.2 < value < 0.8 for value in content["mean_f1"].values())

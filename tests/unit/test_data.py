"""Text becomes blocks: formats, separators, fingerprints, held-out documents, repetition."""

import gzip
import hashlib
import json
import sys
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from project import QUICKSTART
from small_runs import documents

from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.data import blocks as data
from mxd_convert.data.blocks import block_order, prepare, separators
from mxd_convert.data.documents import is_held_out, read_documents
from mxd_convert.errors import InputError
from mxd_convert.recipe.texts import Data, EvalText, Text


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(QUICKSTART))


def write(path, texts, field="text"):
    if path.name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({field: texts}), path)
        return path
    content = "\n\n".join(texts) if ".txt" in path.name else "".join(json.dumps({field: text}) + "\n" for text in texts)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_every_local_format_gives_the_same_documents(tmp_path, name):
    path = write(tmp_path / name, ["one\nline two", "  \n", "two", "three"])
    assert list(read_documents(Text(path=str(path)))) == ["one\nline two", "two", "three"]


def test_folders_and_globs_are_read(tmp_path):
    for name in ("b.txt", "a.jsonl"):
        write(tmp_path / name, [f"from {name}"])
    (tmp_path / "notes.md").write_text("not text of ours")
    assert list(read_documents(Text(path=str(tmp_path)))) == ["from a.jsonl", "from b.txt"]
    assert list(read_documents(Text(path=str(tmp_path / "*.txt")))) == ["from b.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("a.md", "text", "unknown kind"),
        ("a.jsonl", '{"text": "a"}\n{"text"\n', "line 2: not valid JSON"),
        ("a.jsonl", '{"body": "a"}\n', "its fields are body"),
        ("a.jsonl", '{"text": 3}\n', "no text in the field 'text'"),
        ("a.parquet", "not parquet", "not a readable parquet"),
        ("a.txt.gz", "not gzip", "can't be read"),
    ],
)
def test_unreadable_text_is_a_one_line_error(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        list(read_documents(Text(path=str(path))))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_datasets_of_the_hub_are_streamed(tmp_path, tokenizer, monkeypatch):
    """The stream is that of `datasets`; only its source is replaced, because tests run offline."""
    import datasets

    taken = []

    def rows():
        for text in documents(500):
            taken.append(text)
            yield {"text": text}

    def load_dataset(path, name, split, streaming):
        assert (path, name, split, streaming) == ("someone/texts", None, "train", True)
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(data, "MIN_TOKENS", 1)
    settings = Data(train=Text(path="someone/texts"), eval=EvalText(tokens=512), context=32, tokens=2048)
    train, held_out = prepare(settings, tokenizer, tmp_path)
    assert train.info.path == "someone/texts"
    assert len(train) >= 2048 // 32
    assert len(held_out) >= 512 // 32
    assert len(taken) < 500, "more was read than was needed"


def test_a_missing_dataset_is_a_one_line_error(monkeypatch):
    module = types.SimpleNamespace(load_dataset=lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no route\nto host")))
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(InputError, match=r"someone/texts \(split train\): neither a local path nor a dataset .*no route$"):
        list(read_documents(Text(path="someone/texts")))


def test_held_out_documents_are_never_trained_on(tmp_path, tokenizer):
    texts = documents(80) + documents(10)  # duplicates too
    path = write(tmp_path / "a.jsonl", texts)
    train, held_out = prepare(Data(train=Text(path=str(path)), context=16, tokens=100_000), tokenizer, tmp_path / "w")

    def contents(blocks):
        return tokenizer.decode(blocks.take(slice(None)).flatten()).split("<|endoftext|>")[
            1:-1
        ]  # the last block may be truncated

    ours, theirs = contents(train), contents(held_out)
    assert len(ours) > 50
    assert len(theirs) > 2
    assert not set(ours) & set(theirs)
    assert all(is_held_out(text) for text in theirs)
    assert not any(is_held_out(text) for text in ours)
    assert train.info.documents + held_out.info.documents == len(texts)


def test_training_documents_that_are_in_the_evaluation_text_are_dropped(tmp_path, tokenizer):
    texts = documents(40)
    train_path, eval_path = write(tmp_path / "t.jsonl", texts), write(tmp_path / "e.txt", [*texts[:7], "another one " * 20])
    settings = Data(train=Text(path=str(train_path)), eval=EvalText(path=str(eval_path)), context=16, tokens=100_000)
    train, held_out = prepare(settings, tokenizer, tmp_path / "w")
    assert (train.info.documents, train.info.dropped_overlap, held_out.info.documents) == (33, 7, 8)
    same = Data(train=Text(path=str(train_path)), eval=EvalText(path=str(train_path)), context=16)
    with pytest.raises(InputError, match="all of its 40 documents are in the evaluation text"):
        prepare(same, tokenizer, tmp_path / "w2")


@pytest.mark.parametrize(
    ("texts", "message"),
    [(["\n \n"], "empty"), (["a single document " * 50], "a single document"), (["a", "b"], "less than one block of 16")],
)
def test_unusable_text_is_refused(tmp_path, tokenizer, texts, message):
    path = write(tmp_path / "a.txt", texts)
    with pytest.raises(InputError, match=message):
        prepare(Data(train=Text(path=str(path)), context=16), tokenizer, tmp_path / "w")


def test_two_documents_split_into_one_for_training_and_one_held_out(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", ["a first document " * 20_000, "and a second one " * 20])
    train, held_out = prepare(Data(train=Text(path=str(path)), context=16), tokenizer, tmp_path / "w")
    assert train.info.documents == held_out.info.documents == 1


def test_a_fingerprint_depends_on_the_documents_alone(tmp_path, tokenizer):
    texts = documents(30)
    prints = set()
    for name in ("a.jsonl", "a.jsonl.gz", "b.parquet"):
        settings = Data(train=Text(path=str(write(tmp_path / name, texts))), context=16, tokens=10**6)
        train, _ = prepare(settings, tokenizer, tmp_path / f"w-{name}")
        prints.add(train.info.fingerprint)
    expected = hashlib.sha256()
    for text in texts:
        if not is_held_out(text):
            expected.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    assert prints == {expected.hexdigest()}


def test_documents_are_joined_as_the_tokenizer_requires(tokenizer, shared):
    assert separators(tokenizer).before == [tokenizer.bos_token_id]  # adds nothing by itself, but has a BOS
    stories = load_tokenizer(str(shared / "models" / "stories260K"))  # adds BOS by itself
    assert (separators(stories).before, separators(stories).after, separators(stories).bos) == ([1], [], 1)


def test_blocks_are_slices_of_the_joined_documents(tmp_path, tokenizer):
    texts = documents(30)
    path = write(tmp_path / "a.jsonl", texts)
    train, _ = prepare(Data(train=Text(path=str(path)), context=16, tokens=10**6), tokenizer, tmp_path / "w")
    stream = [i for text in texts if not is_held_out(text) for i in [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]]
    expected = torch.tensor(stream[: len(stream) // 16 * 16]).view(-1, 16)
    assert train.take(slice(None)).equal(expected)


def test_repeated_text_is_shuffled_again():
    whole = block_order(10, 0, 35, seed=1)
    epochs = [whole[:10], whole[10:20], whole[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    pieces = np.concatenate([block_order(10, start, 7, seed=1) for start in range(0, 35, 7)])
    assert (pieces == whole).all(), "the order must not depend on where one starts"
    assert not (block_order(10, 0, 10, seed=2) == epochs[0]).all()


def test_bos_and_the_first_position_are_excluded(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", documents(30))
    train, _ = prepare(Data(train=Text(path=str(path)), context=16, tokens=10**6), tokenizer, tmp_path / "w")
    ids = train.take(slice(None))
    counted = train.counted(slice(None), mask="bos")
    assert not counted[:, 0].any()
    assert not counted[ids == tokenizer.bos_token_id].any()
    assert counted[:, 1:][ids[:, 1:] != tokenizer.bos_token_id].all()
    assert train.counted(slice(None), mask="none").all()


def test_a_short_run_draws_its_blocks_from_the_whole_text(tmp_path, tokenizer, monkeypatch):
    """Otherwise it would see only the first few documents."""
    texts = documents(200)
    settings = Data(train=Text(path=str(write(tmp_path / "a.jsonl", texts))), context=16, tokens=320)
    train, _ = prepare(settings, tokenizer, tmp_path / "w")
    assert train.info.documents == sum(not is_held_out(text) for text in texts)
    taken = block_order(len(train), 0, 320 // 16, seed=0)
    assert max(taken) > len(train) / 2
    monkeypatch.setattr(data, "MIN_TOKENS", 1000)  # no more text is read than that, or than the run needs
    for tokens, read in ((320, 1000), (2000, 2000)):
        train, _ = prepare(settings.model_copy(update={"tokens": tokens}), tokenizer, tmp_path / f"w-{tokens}")
        assert len(train) == -(-read // 16)


def test_tokenised_text_is_reused(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "a.jsonl", documents(30))
    settings = Data(train=Text(path=str(path)), context=16, tokens=10**6)
    first, _ = prepare(settings, tokenizer, tmp_path / "w")
    monkeypatch.setattr(data, "read_documents", lambda source: pytest.fail("read again"))
    again, _ = prepare(settings, tokenizer, tmp_path / "w")
    assert again.take(slice(None)).equal(first.take(slice(None)))
    assert again.info == first.info

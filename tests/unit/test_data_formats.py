"""Every format is read alike, hidden files are skipped, and hostile text is a one-line error."""

import gzip
import json
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from mxd_convert.data import documents as reading
from mxd_convert.data import fields
from mxd_convert.data.documents import read_documents
from mxd_convert.errors import InputError
from mxd_convert.recipe.load import load_recipe
from mxd_convert.recipe.schema import Recipe
from mxd_convert.recipe.texts import EvalText, Text

FORMATS = ["a.jsonl", "a.jsonl.gz", "a.parquet", "hub"]
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


@pytest.fixture(params=FORMATS)
def source(request, tmp_path, monkeypatch):
    """Return a function that writes rows as a text, in each format."""

    def make(rows):
        if request.param == "hub":
            stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
            monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
            return Text(path="someone/texts")
        path = tmp_path / request.param
        if request.param == "a.parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            content = "".join(json.dumps(row) + "\n" for row in rows).encode()
            path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        return Text(path=str(path))

    return make


def skipping(text):
    return text.model_copy(update={"missing": "skip"})


def read(source):
    return list(read_documents(source))


# --- rows ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [{"text": None, "id": 2}, {"id": 2}], ids=["null", "absent"])
@pytest.mark.parametrize("first", [False, True])
def test_a_row_without_text_is_refused(source, row, first):
    rows = [row, {"text": "one", "id": 1}] if first else [{"text": "one", "id": 1}, row]
    with pytest.raises(
        InputError, match=r"no text in the field 'text': (it holds null|a row lacks it).*missing: skip|no field 'text'"
    ):
        read(source(rows))


def test_rows_without_text_are_skipped_and_counted_on_request(source):
    rows = [{"text": "one", "id": 1}, {"text": None, "id": 2}, {"id": 3}, {"text": "two", "id": 4}, {"text": "three", "id": 5}]
    notes = []
    assert list(read_documents(skipping(source(rows)), notes.append)) == ["one", "two", "three"]
    assert [line.partition(": ")[2] for line in notes] == ["2 of 5 rows have no text in the field 'text' and are left out"]
    notes.clear()
    stopped = read_documents(skipping(source(rows)), notes.append)
    assert [next(stopped), next(stopped)] == ["one", "two"]
    stopped.close()
    assert "2 of 4 rows" in notes[0]


def test_a_missing_field_is_named(source, monkeypatch):
    monkeypatch.setattr(fields, "MAX_MISSING", 20)
    rows = [{"body": "a", "id": 1}] * 15
    for length in (1, 3):  # a long text is not read to its end
        with pytest.raises(InputError, match=r"no field 'text'; its fields are body, id. Name the field with data.train.text"):
            read(source(rows * length))
    with pytest.raises(InputError, match=r"no text in the field 'text': it is null in all rows, 15"):
        read(skipping(source([{"text": None, "body": "a"}] * 15)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (CHAT, "a chat, but the tokenizer has no chat template"),
        ([{"from": "human", "value": "hello"}], r"a list of messages \(from, value\)\. Write each message as"),
        ([{"a": 1}], r"a list of mappings \(a\)"),
        (["a"], "a list that begins with text"),
        ({"body": "a", "id": 1}, "a mapping with the keys body, id"),
        (3, "a number"),
        (True, "true"),
        (b"text", "bytes"),
    ],
    ids=str,
)
def test_a_field_of_another_type_is_refused_with_its_content(source, request, content, words):
    if isinstance(content, bytes) and ".jsonl" in request.node.name:
        pytest.skip("JSON has none")
    holds = words if content is CHAT else f"no text in the field 'text': it holds {words}"
    with pytest.raises(InputError, match=rf", (line|row) 1: {holds}") as error:
        read(source([{"text": content}]))
    assert content is CHAT or "data.train.text" in str(error.value)
    assert "\n" not in str(error.value)


def test_names_from_data_fit_on_one_line(source):
    with pytest.raises(InputError) as error:
        read(source([{f"a\n\x1b[31m{number}" + "x" * 500: "" for number in range(1000)}]))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 2000
    assert "and 988 more" in str(error.value)


def test_long_documents_are_read_in_parts(source, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_DOCUMENT", 10)
    parts = ["0123456789", "abcdefghij", "k"]
    assert read(source([{"text": "".join(parts)}, {"text": "short"}])) == [*parts, "short"]
    for text, documents in (("".join(parts) + "\n\nshort\n", [*parts, "short"]), ("0123\n5678\nabc\n", ["0123\n5678\n", "abc"])):
        (tmp_path / "a.txt").write_text(text)
        assert read(Text(path=str(tmp_path / "a.txt"))) == documents


# --- files ---------------------------------------------------------------------------------------------------------------------


def test_hidden_files_are_skipped(tmp_path):
    folder = tmp_path / ".hidden" / "text"
    for name in ("a.txt", "deep/b.txt", "._a.txt", ".git/c.txt", "deep/.ipynb_checkpoints/b.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for path in (folder, folder / "**" / "*.txt", folder / "**"):
        assert read(Text(path=str(path))) == ["a.txt", "deep/b.txt"]
    assert read(Text(path=str(folder / "._a.txt"))) == ["._a.txt"]  # asked for by its name


def test_links_are_followed_and_every_file_is_read_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("b")
    (tmp_path / "c.txt").write_text("c")
    folder = tmp_path / "text"
    folder.mkdir()
    for link, target in (("deep", "../elsewhere"), ("again", "../elsewhere"), ("c.txt", "../c.txt"), ("loop", ".")):
        (folder / link).symlink_to(target)
    for path in (folder, folder / "**" / "*.txt"):
        assert read(Text(path=str(path))) == ["b", "c"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(InputError, match=r"closed: can't be read \(Permission denied\)"):
        read(Text(path=str(tmp_path)))


def test_an_invalid_path_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"can't be read \(File name too long\)"):
        read(Text(path=str(tmp_path / ("x" * 300 + ".txt"))))


def damaged_parquet():
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 100] * 1000}), sink)
    return sink.getvalue().to_pybytes()[:-50]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\xff\xfea\0", "not UTF-8"),
        ("a.jsonl", b'{"text": "\xe4"}\n', "not UTF-8"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1: nested too deeply"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b", "n": ' + b"9" * 5000 + b"}\n", "line 2: a number has too many digits"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "' + b"b" * 2000 + b'"}\n', "line 2: more than 1,000 characters"),
        ("a.jsonl", b'["a"]\n', "line 1: holds a list that begins with text; expected a mapping with the field 'text'"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-20], "can't be read"),
        ("a.parquet", damaged_parquet(), "not a readable parquet file"),
    ],
)
def test_hostile_text_is_a_one_line_error(tmp_path, monkeypatch, name, content, words):
    if words.endswith("characters"):
        monkeypatch.setattr(reading, "MAX_LINE", 1000)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        read(Text(path=str(tmp_path / name)))
    assert str(tmp_path / name) in str(error.value)
    assert str(error.value).isprintable()


def test_running_out_of_memory_is_not_blamed_on_the_text(source, monkeypatch):
    def fail(*_, **__):
        raise pyarrow.ArrowMemoryError("malloc of size 9 failed")

    text = source([{"text": "a"}])
    for module, name in ((json, "loads"), (pyarrow.parquet, "ParquetFile"), (datasets, "load_dataset")):
        monkeypatch.setattr(module, name, fail)
    with pytest.raises(MemoryError):
        read(text)


# --- datasets of the Hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """Write a dataset with two configurations and no default; return its name."""
    monkeypatch.chdir(tmp_path)
    for part in ("first", "second"):
        (tmp_path / "sets" / part).mkdir(parents=True)
        (tmp_path / "sets" / part / "train.jsonl").write_text(json.dumps({"text": part}) + "\n")
    entries = [{"config_name": f"{part}-one", "data_files": f"{part}/train.jsonl"} for part in ("first", "second")]
    (tmp_path / "sets" / "README.md").write_text(f"---\n{json.dumps({'configs': entries})}\n---\n")
    return "sets"


def test_a_dataset_configuration_is_chosen_by_its_key(configured):
    assert read(Text(path=configured, config="second-one")) == ["second"]
    with pytest.raises(
        InputError, match=r"^data: sets has several conf.*\. Set data.train.config to one of first-one, second-one\.$"
    ):
        read(Text(path=configured))
    with pytest.raises(
        InputError, match=r"^data.eval.config: sets has no configuration 'third'.*one of first-one, second-one\.$"
    ):
        read(EvalText(path=configured, config="third"))


@pytest.mark.parametrize("part", ["train", "eval"])
def test_local_text_refuses_a_configuration(tmp_path, part):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match=rf"data.{part}.config: 'x' is given, but .*a.txt is local"):
        load_recipe({"base": {"model": "gpt2"}, "data": {part: {"path": str(tmp_path / "a.txt"), "config": "x"}}})
    with pytest.raises(InputError, match=r"data\.eval\.config: 'x' is given, but no dataset is named"):
        load_recipe({"base": {"model": "gpt2"}, "data": {"eval": {"config": "x"}}})


def test_recipes_without_a_configuration_keep_their_fingerprint():
    """Checkpoints hold fingerprints that are older than the key."""
    data = {"eval": {"path": "someone/texts", "split": "test"}}
    recipe = Recipe.model_validate({"base": {"model": "gpt2"}, "data": data})
    assert recipe.fingerprint() == recipe.published_sha256() == "b6b65028eeb23bc65cf924d90381ea7bc16affb84278201968f958432ccd6dad"
    data["eval"]["config"] = "one"
    assert Recipe.model_validate({"base": {"model": "gpt2"}, "data": data}).fingerprint() != recipe.fingerprint()


def test_errors_of_the_hub_show_no_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "not-hf-like-7f3a")
    secrets = ("hf_abcDEF123", "me:pass", "deadbeef", "not-hf-like-7f3a", "opaque99")
    line = (
        "401 for url https://me:pass@hub.example/api/x.parquet?Signature=deadbeef&token=hf_abcDEF123"
        " (headers: authorization: Bearer opaque99, not-hf-like-7f3a)\nRequest ID"
    )

    def fail(*_, **__):
        raise OSError(line)

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError) as error:
        read(Text(path="someone/texts"))
    assert not [secret for secret in secrets if secret in str(error.value)]
    assert "401 for url https://...@hub.example/api/x.parquet?..." in str(error.value)
    assert "\n" not in str(error.value)

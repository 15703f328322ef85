"""The promise: chats are rendered with the tokenizer's template, several texts are mixed by weight, and a mask says what counts."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from project import QUICKSTART
from small_runs import documents, small_recipe
from transformers import AddedToken

import mxd_convert
from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.checkpoint.texts import recorded_data
from mxd_convert.data.blocks import TOKEN_KINDS, prepare, prepare_eval
from mxd_convert.data.chats import rendered
from mxd_convert.data.documents import read_documents
from mxd_convert.errors import InputError
from mxd_convert.recipe.load import load_recipe
from mxd_convert.recipe.texts import Data, EvalText, Text

TEMPLATE = (
    "{% for message in messages %}<|endoftext|>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|endoftext|>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    found = load_tokenizer(str(QUICKSTART))
    found.chat_template = TEMPLATE
    return found


def chat(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"What is value {number}?"},
        {"role": "assistant", "content": f"The value is {number * 7}."},
        {"role": "user", "content": "And the next?"},
        {"role": "assistant", "content": f"The next is {number * 7 + 7}, as index {number} says."},
    ]


def written(path, rows) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return written(tmp_path_factory.mktemp("chats") / "chats.jsonl", [{"messages": chat(number)} for number in range(80)])


def test_a_chat_is_rendered_by_the_template_without_separators(tokenizer, chats, tmp_path):
    text = EvalText(path=chats, text="messages", tokens=400)
    blocks = prepare_eval(text, 16, tokenizer, tmp_path)
    ids = blocks.take(slice(None)).flatten().tolist()
    whole = "".join(tokenizer.apply_chat_template(chat(number), tokenize=False) for number in range(80))
    assert ids == tokenizer(whole)["input_ids"][: len(ids)]


def test_parquet_and_jsonl_give_the_same_chats(tokenizer, chats, tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"messages": [chat(number) for number in range(80)]}), tmp_path / "chats.parquet")
    one, other = (
        list(read_documents(Text(path=str(path), text="messages"), tokenizer=tokenizer))
        for path in (chats, tmp_path / "chats.parquet")
    )
    assert one == other
    assert [document.prompts for document in one] == [document.prompts for document in other]


def test_the_prompt_is_all_but_the_replies(tokenizer):
    document = rendered(chat(3), tokenizer, "row 1")
    prompt = "".join(document[start:end] for start, end in document.prompts)
    assert prompt == (
        "<|endoftext|>user: What is value 3?\n<|endoftext|>assistant: <|endoftext|>user: And the next?\n<|endoftext|>assistant: "
    )


def test_a_template_that_changes_earlier_turns_still_gives_the_replies(tokenizer):
    """Some templates remove the reasoning of all replies but the last."""
    odd = load_tokenizer(str(QUICKSTART))
    odd.chat_template = "{{ messages | length }} messages: " + TEMPLATE
    document = rendered(chat(3), odd, "row 1")
    spans = [0, *(edge for span in document.prompts for edge in span), len(document)]
    replies = [document[end:start] for end, start in zip(spans[2::2], spans[3::2], strict=False)]
    assert [reply for reply in replies if reply] == ["The value is 21.", "The next is 28, as index 3 says."]


@pytest.mark.parametrize("mask", ["none", "bos", "special", "prompt"])
def test_a_mask_leaves_out_what_it_names(tokenizer, chats, tmp_path, mask):
    blocks = prepare_eval(EvalText(path=chats, text="messages", tokens=400), 16, tokenizer, tmp_path)
    rows = np.asarray([3, 0, 7])
    counted, ids = blocks.counted(rows, mask), blocks.take(rows)
    if mask == "none":
        assert counted.all()
        return
    assert not counted[:, 0].any()
    assert not counted[ids == tokenizer.bos_token_id].any()
    if mask == "prompt":
        words = [tokenizer.decode(ids[row][counted[row]]) for row in range(3)]
        assert all("What" not in text and "user" not in text for text in words)
        assert any("value is" in text for text in words)
    else:
        assert counted[:, 1:][ids[:, 1:] != tokenizer.bos_token_id].all()
    kinds = blocks.kinds(rows)
    assert (kinds[:, 0] == TOKEN_KINDS.index("first")).all()
    assert torch.equal(kinds[:, 1:] == TOKEN_KINDS.index("bos"), ids[:, 1:] == tokenizer.bos_token_id)


def test_special_tokens_are_also_those_that_only_the_template_writes(chats, tmp_path):
    """Such as Llama 3's <|start_header_id|>, which no list of the tokenizer names."""
    tokenizer = load_tokenizer(str(QUICKSTART))
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    tokenizer.chat_template = TEMPLATE.replace("<|endoftext|>{{", "<|endoftext|><|turn|>{{")
    blocks = prepare_eval(EvalText(path=chats, text="messages", tokens=400), 16, tokenizer, tmp_path)
    inside = slice(1, None)  # of a block
    turns = (blocks.take(slice(None)) == tokenizer.convert_tokens_to_ids("<|turn|>"))[:, inside]
    counted = {mask: blocks.counted(slice(None), mask)[:, inside] for mask in ("none", "bos", "special")}
    assert turns.any()
    assert counted["bos"][turns].all()
    assert not counted["special"][turns].any()
    assert torch.equal(counted["special"] | turns, counted["bos"])
    assert torch.equal(blocks.kinds(slice(None))[:, inside] == TOKEN_KINDS.index("special"), turns)


def test_training_on_many_passes_over_a_text_warns_once(tokenizer, tmp_path):
    path = written(tmp_path / "a.jsonl", [{"text": document} for document in documents(30)])
    data, said = Data(train={"path": path}, context=16, tokens=10**6), []
    for _ in range(2):
        train, _ = prepare(data, tokenizer, tmp_path / "w", said.append)
    [line] = [line for line in said if line.startswith("warning:")]
    assert f"{10**6 / train.info.tokens:.0f} passes over the text, which has {train.info.tokens:,}" in line


def test_without_a_mask_figures_still_leave_out_first_positions(models, text, tmp_path):
    report = mxd_convert.convert(
        small_recipe(models["llama"], text, tmp_path / "out", layers=[1], train={"mask": "none"}), quiet=True
    ).report
    layer = report["fidelity"]["layers"]["1"]
    assert report["data"]["masked"].startswith("BOS tokens and the first position of each block left out")
    assert layer["fvu"] != layer["fvu_with_bos"]
    counted = report["fidelity"]["token_kinds"]["text"]["tokens"]
    assert counted < report["fidelity"]["tokens"]


def test_texts_without_chats_have_no_prompts(tokenizer, tmp_path):
    path = written(tmp_path / "a.jsonl", [{"text": document} for document in documents(30)])
    blocks = prepare_eval(EvalText(path=path, tokens=400), 16, tokenizer, tmp_path)
    assert blocks.prompts is None
    assert torch.equal(blocks.counted(slice(None), "prompt"), blocks.counted(slice(None), "bos"))


def test_chats_and_texts_in_one_file_of_tokens_keep_their_prompts(tokenizer, chats, tmp_path):
    plain = written(tmp_path / "a.jsonl", [{"text": document} for document in documents(30)])
    sources = [{"path": plain}, {"path": chats, "text": "messages"}]
    data = Data(train={"sources": sources}, context=16, tokens=10**6)
    train, _ = prepare(data, tokenizer, tmp_path / "w")
    assert train.prompts.shape == train.ids.shape
    text = tokenizer.decode(train.take(slice(None))[torch.from_numpy(train.prompts == 1)])
    assert "What is value" in text
    assert "returned when index" not in text
    again, _ = prepare(data, tokenizer, tmp_path / "w")  # read from the folder
    assert (again.prompts == train.prompts).all()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{"content": "hello"}]}, ("message 1 of the chat", "'role' is missing")),
        ({"messages": [{"role": "user", "content": ["hello"]}]}, ("'content' holds a list",)),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, ("chat template fails (roles must alternate)",)),
    ],
)
def test_bad_chats_are_refused_with_their_row(tmp_path, row, words):
    failing = load_tokenizer(str(QUICKSTART))
    failing.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = written(tmp_path / "chats.jsonl", [row])
    with pytest.raises(InputError) as error:
        list(read_documents(Text(path=path, text="messages"), tokenizer=failing))
    assert f"{path}, line 1" in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("messages", "template", "words"),
    [
        ([{"content": "hello"}], TEMPLATE, ("line 1", "'role' is missing")),
        (chat(1), "{{ raise_exception('no') }}", ("line 1", "chat template fails (no)")),
    ],
)
def test_a_run_refuses_bad_chats_in_one_line(models, recipe, refused, tmp_path, messages, template, words):
    base = shutil.copytree(models["gpt2"], tmp_path / "base")
    (base / "chat_template.jinja").write_text(template)
    path = written(tmp_path / "chats.jsonl", [{"messages": messages}])
    recipe = recipe(base={"model": str(base)}, data={"train": {"path": path, "text": "messages"}})
    assert len(refused("run", recipe, words=(path, *words)).strip().splitlines()) == 1


def test_a_chat_without_a_template_is_refused(tmp_path):
    path = written(tmp_path / "chats.jsonl", [{"messages": chat(1)}])
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        list(read_documents(Text(path=path, text="messages"), tokenizer=load_tokenizer(str(QUICKSTART))))


def test_sources_are_mixed_in_proportion_to_their_weights(tmp_path):
    paths = [
        written(tmp_path / f"{name}.jsonl", [{"text": f"{name} {number:03} " + "x" * length} for number in range(400)])
        for name, length in (("a", 40), ("b", 95))
    ]
    text = Text(sources=[{"path": paths[0], "weight": 3.0}, {"path": paths[1], "weight": 1.0}])
    notes = []
    read = list(read_documents(text, notes.append))
    sizes = {name: sum(len(document) for document in read if document.startswith(name)) for name in "ab"}
    assert sizes["a"] / sizes["b"] == pytest.approx(3.0, rel=0.02)
    assert sizes["a"] == 400 * 46  # all of the source that ends first
    assert "a.jsonl has ended" in notes[0]
    everything = list(read_documents(Text(sources=[{"path": path} for path in paths])))
    assert len(everything) == 800


def test_a_list_is_short_for_sources_and_a_path_replaces_it(tmp_path):
    recipe = {"base": {"model": str(QUICKSTART)}, "data": {"train": [{"path": "./a.jsonl"}, {"path": "b.txt", "text": "t"}]}}
    loaded = load_recipe(recipe)
    assert [source.path.rpartition("/")[2] for _, source in loaded.data.train.entries()] == ["a.jsonl", "b.txt"]
    assert load_recipe(recipe, {"data.train.path": "c.txt"}).data.train.sources is None
    assert load_recipe(loaded, {"data.train": [{"path": "d.txt"}]}).data.train.sources[0].path.endswith("d.txt")


def test_sources_are_lists_or_sections_and_an_override_replaces_them():
    data = {
        "train": [{"path": "a.txt"}],
        "eval": {"sources": [{"path": "b.txt", "weight": 2.0}, {"path": "c.txt", "weight": 1.0}], "tokens": 640},
    }
    recipe = {"base": {"model": str(QUICKSTART)}, "data": data}
    found = load_recipe(recipe).data
    assert [source.weight for _, source in found.eval.entries()] == [2.0, 1.0]
    assert found.eval.tokens == 640
    listed = load_recipe({**recipe, "data": {"eval": data["eval"]["sources"]}}).data
    assert list(listed.eval.entries()) == list(found.eval.entries())
    replaced = load_recipe(recipe, {"data.eval.path": "d.txt", "data.train.path": "e.txt"}).data
    assert [Path(source.path).name for text in (replaced.train, replaced.eval) for _, source in text.entries()] == [
        "e.txt",
        "d.txt",
    ]


def test_evaluation_sources_are_mixed_by_weight(tokenizer, tmp_path):
    rows = {name: [{"text": f"{name}{number} " * 20} for number in range(200)] for name in "ab"}
    sources = [
        {"path": written(tmp_path / f"{name}.jsonl", rows[name]), "weight": weight} for name, weight in (("a", 3), ("b", 1))
    ]
    blocks = prepare_eval(EvalText(sources=sources, tokens=4000), 16, tokenizer, tmp_path)
    text = tokenizer.decode(blocks.take(slice(None)).flatten())
    assert text.count("a") / text.count("b") == pytest.approx(3, rel=0.2)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ([], "data.train.sources: the list is empty"),
        ([{"path": "a.txt", "weight": 1.0}, {"path": "b.txt"}], "source 1 has no weight"),
        ({"path": "a.txt", "sources": [{"path": "b.txt"}]}, "and sources too"),
        ([{"path": "a.txt", "wieght": 1.0}], "did you mean 'weight'"),
        ([{"weight": 1.0}], "data.train.sources.0.path: missing"),
        ({"path": "a.txt", "config": "c"}, "data.train.config: 'c' is given"),
    ],
)
def test_bad_sources_are_refused_by_key(train, words):
    with pytest.raises(InputError) as error:
        load_recipe({"base": {"model": str(QUICKSTART)}, "data": {"train": train}})
    assert words in str(error.value)


def test_a_conversion_from_several_sources_says_so_and_is_reproducible(models, text, chats, tmp_path):
    other = written(
        tmp_path / "other.jsonl.gz", [{"text": f"Other {number}. " + document} for number, document in enumerate(documents(30))]
    )
    data = {"train": {"sources": [{"path": str(text)}, {"path": other}]}, "eval": {"sources": [{"path": other}], "tokens": 256}}
    recipe = small_recipe(models["llama"], text, tmp_path / "out", layers=[1], train={"mask": "special", "joint": 0.4})
    recipe["data"] = {**data, "context": 32, "tokens": 2048}
    result = mxd_convert.convert(recipe, quiet=True)
    assert result.report["data"]["train"]["path"] == "text.jsonl + other.jsonl.gz"
    assert result.report["data"]["masked"].startswith("special tokens and the first position")
    assert result.report["local"] == [
        "base.model",
        "data.train.sources.0.path",
        "data.train.sources.1.path",
        "data.eval.sources.0.path",
    ]
    kinds = result.report["fidelity"]["token_kinds"]
    assert set(kinds) == {"text", "bos", "first"}
    assert sum(entry["tokens"] for entry in kinds.values()) == result.report["fidelity"]["tokens"]
    layer = result.report["fidelity"]["layers"]["1"]["token_kinds"]
    assert layer["text"]["norm"] == 1.0
    assert all(entry["relative_squared_error"] > 0 for entry in layer.values())
    assert mxd_convert.verify_provenance(tmp_path / "out").ok
    published = (tmp_path / "out" / "recipe.yaml").read_text() + (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in published


def test_the_texts_of_a_checkpoint_are_found_on_this_machine(tmp_path):
    """The recipe in a checkpoint has names only. The paths are in a file that stays on the machine."""
    a, b = (written(tmp_path / f"{name}.jsonl", [{"text": document} for document in documents(30)]) for name in "ab")
    settings = {"train": {"sources": [{"path": "a.jsonl"}, {"path": "b.jsonl"}]}, "eval": {"path": None}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"data": settings}))
    with pytest.raises(InputError, match="the paths of the texts are not recorded on this machine"):
        recorded_data(tmp_path)
    (tmp_path / "mxd_local.json").write_text(json.dumps({"data": {"train": [a, b]}}))
    data = recorded_data(tmp_path)
    assert [source.path for _, source in data.train.entries()] == [a, b]
    assert not data.eval.is_given
    (tmp_path / "mxd_local.json").write_text(json.dumps({"data": {"train": [a]}}))
    with pytest.raises(InputError, match=r"recipe.yaml: its texts can't be read"):
        recorded_data(tmp_path)
    settings["train"] = {"path": "a.jsonl"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"data": settings}))
    (tmp_path / "mxd_local.json").write_text(json.dumps({"data": {"train": a}}))  # before version 0.2
    assert recorded_data(tmp_path).train.path == a

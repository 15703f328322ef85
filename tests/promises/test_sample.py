"""The promise: a base model writes its own training text, in batches, resumable to the byte."""

import json
import shutil
from unittest import mock

import pytest
import torch
from project import QUICKSTART
from transformers import AutoModelForCausalLM, AutoTokenizer

import mxd_convert
from mxd_convert.data.blocks import prepare_eval
from mxd_convert.recipe.texts import EvalText

PROMPTS = ["def f(x):", "The value is", "import", "Return the", "class A:"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n\n")
    return path


def sampled(output, prompts, **options):
    settings = {"tokens": 300, "max_new_tokens": 12, "batch": 4, "quiet": True, **options}
    return mxd_convert.sample(str(QUICKSTART), output, prompts=prompts, **settings)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_prompt_is_continued_in_turn_until_there_are_enough_tokens(prompts, tmp_path):
    found = sampled(tmp_path / "text.jsonl", prompts)
    made = rows(tmp_path / "text.jsonl")
    assert found.documents == len(made)
    assert 300 <= found.tokens == sum(row["tokens"] for row in made) < 300 + 4 * 12
    for number, row in enumerate(made):
        assert row["text"].startswith(PROMPTS[number % len(PROMPTS)])
    assert len({row["text"] for row in made}) > 0.9 * len(made)
    assert not list(tmp_path.glob("*.partial*"))


def test_the_text_is_drawn_from_the_models_own_distribution(tmp_path):
    """The mean surprise of sampled tokens is the mean entropy of the distributions that they come from."""
    path = tmp_path / "text.jsonl"
    sampled(path, None, tokens=2500, max_new_tokens=25, batch=50)
    tokenizer, model = AutoTokenizer.from_pretrained(QUICKSTART), AutoModelForCausalLM.from_pretrained(QUICKSTART).float().eval()
    surprise, entropy = [], []
    for row in rows(path):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(row["text"], add_special_tokens=False)["input_ids"]]])
        if ids.shape[1] != row["tokens"] + 1 or row["tokens"] < 2:  # its text is tokenised in another way, or it ended early
            continue
        with torch.no_grad():
            logs = model(ids).logits[0, :-1].log_softmax(-1)
        surprise += (-logs.gather(-1, ids[0, 1:, None])).flatten().tolist()
        entropy += (-(logs.exp() * logs).sum(-1)).tolist()
    assert len(surprise) > 500
    assert sum(surprise) / len(surprise) == pytest.approx(sum(entropy) / len(entropy), rel=0.06)


def test_an_interrupted_sample_resumes_to_the_same_bytes(prompts, tmp_path, monkeypatch):
    sampled(tmp_path / "whole.jsonl", prompts)
    from mxd_convert.commands import sample as command

    continued, calls = command._continued, []

    def cut(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return continued(*arguments)

    monkeypatch.setattr(command, "_continued", cut)
    with pytest.raises(KeyboardInterrupt):
        sampled(tmp_path / "cut.jsonl", prompts)
    assert not (tmp_path / "cut.jsonl").exists()
    partial = tmp_path / "cut.jsonl.partial"
    partial.write_bytes(partial.read_bytes()[:-30])  # cut off within a line
    sampled(tmp_path / "cut.jsonl", prompts)
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_an_unfinished_sample_of_other_settings_is_not_resumed(prompts, tmp_path, refused, monkeypatch):
    from mxd_convert.commands import sample as command

    with monkeypatch.context() as patch:
        batch = [{"text": "a", "tokens": 1}] * 4
        patch.setattr(command, "_continued", mock.Mock(side_effect=[batch, KeyboardInterrupt]))
        with pytest.raises(KeyboardInterrupt):
            sampled(tmp_path / "text.jsonl", prompts)
    command_line = ("sample", QUICKSTART, "--prompts", prompts, "--output", tmp_path / "text.jsonl", "--tokens", 50)
    refused(*command_line, words=("unfinished sample with another tokens (300)", "--fresh"))


def test_an_instruct_model_replies_to_messages(prompts, tmp_path):
    """The output is a chat that the same model's conversion trains on."""
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(QUICKSTART).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART)
    tokenizer.chat_template = (
        "{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}# assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    mxd_convert.sample(str(folder), tmp_path / "chats.jsonl", 200, prompts, max_new_tokens=12, batch=4, quiet=True)
    made = rows(tmp_path / "chats.jsonl")
    assert [message["role"] for message in made[0]["messages"]] == ["user", "assistant"]
    assert made[0]["messages"][0]["content"] == PROMPTS[0]
    blocks = prepare_eval(EvalText(path=str(tmp_path / "chats.jsonl"), text="messages", tokens=100), 10, tokenizer, tmp_path)
    assert "# assistant" in tokenizer.decode(blocks.take(slice(None)).flatten())
    plain = mxd_convert.sample(
        str(folder), tmp_path / "plain.jsonl", 50, prompts, max_new_tokens=12, batch=4, chat=False, quiet=True
    )
    assert "text" in rows(plain.output)[0]


def test_bad_input_is_refused_in_one_line(prompts, tmp_path, refused):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "rows.jsonl").write_text('{"question": "why"}\n')
    (tmp_path / "there.jsonl").write_text("")
    good = {"--prompts": prompts, "--output": tmp_path / "text.jsonl", "--tokens": 50}
    for change, words in (
        ({"--prompts": tmp_path / "missing.txt"}, ("--prompts", "no such file")),
        ({"--prompts": tmp_path / "empty.txt"}, ("has no prompts",)),
        ({"--prompts": tmp_path / "rows.jsonl"}, ("no field 'text'", "question")),
        ({"--tokens": 0}, ("--tokens 0",)),
        ({"--temperature": 0}, ("--temperature 0", "above 0")),
        ({"--output": tmp_path / "text.txt"}, (".jsonl",)),
        ({"--device": "gpu0"}, ("--device gpu0", "Try cpu or cuda")),
        ({"--device": "meta"}, ("--device meta", "can't be used")),
        ({"--output": tmp_path / "there.jsonl"}, ("exists already", "--fresh")),
    ):
        options = [part for pair in {**good, **change}.items() for part in pair]
        refused("sample", QUICKSTART, *options, words=words)
    refused("sample", tmp_path / "nothing", *[part for pair in good.items() for part in pair], words=("no such folder",))


def test_a_chat_template_that_fails_is_refused_in_one_line(prompts, tmp_path, refused):
    base = shutil.copytree(QUICKSTART, tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    command_line = ("sample", base, "--prompts", prompts, "--output", tmp_path / "chats.jsonl", "--tokens", 50)
    said = refused(*command_line, words=("chat template fails (no)",))
    assert len(said.strip().splitlines()) == 1
    assert not list(tmp_path.glob("chats*"))


def test_a_low_temperature_draws_likelier_tokens(prompts, tmp_path):
    surprise = {}
    tokenizer, model = AutoTokenizer.from_pretrained(QUICKSTART), AutoModelForCausalLM.from_pretrained(QUICKSTART).float().eval()
    for temperature in (0.3, 1.0):
        sampled(tmp_path / f"{temperature}.jsonl", prompts, temperature=temperature)
        losses = []
        for row in rows(tmp_path / f"{temperature}.jsonl"):
            ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
            with torch.no_grad():
                losses.append(model(ids, labels=ids).loss.item())
        surprise[temperature] = sum(losses) / len(losses)
    assert surprise[0.3] < surprise[1.0] - 0.2

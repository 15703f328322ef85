"""Exports of real models continue prompts as PyTorch does, in the programs that people run them with.

`make clients` installs each program in a folder of its own. The test of a missing program is skipped.
"""

import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
import urllib.parse
from pathlib import Path
from unittest import mock

import browser
import pytest
from onnx_exports import PARITY
from project import ROOT
from transformers import AutoTokenizer

from mxd_convert.checkpoint.read import load_checkpoint
from mxd_convert.commands.export_onnx import export_onnx
from mxd_convert.onnx import OnnxModel, parity

CLIENTS = ROOT / ".clients"
PROMPTS = {
    "quickstart": ["If the argument is", "The file", "Return a new"],
    "stories260k": ["Once upon a time", "The dog was", "Lily and Ben"],
}
WHOLE = ["stories260k"]  # compared with PyTorch on the default amount of text


@pytest.fixture(scope="session")
def readied():
    """Store the results of `ready`, since tests may not be run model by model."""
    return {}


@pytest.fixture(params=PROMPTS)
def ready(request, readied, tmp_path_factory):
    """Return (exported folder, prompts, their continuations by PyTorch, the report of the export)."""
    name = request.param
    if name not in readied:
        readied[name] = make_ready(name, request, tmp_path_factory)
    return readied[name]


def make_ready(name, request, tmp_path_factory):
    checkpoint = request.getfixturevalue("quick" if name == "quickstart" else "stories").output
    folder = tmp_path_factory.mktemp("ready") / name
    with mock.patch.multiple(parity, **PARITY) if name in WHOLE else contextlib.nullcontext():
        done = export_onnx(
            checkpoint, folder, ["fp32", "fp16"], "int8", expert_outputs=True, steering=True, tokens=4096, quiet=True
        )
    assert done.failures == []
    model, tokenizer = load_checkpoint(checkpoint, dtype="float32"), AutoTokenizer.from_pretrained(checkpoint)
    texts = []
    for prompt in PROMPTS[name]:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return folder, PROMPTS[name], texts, done.report


def client(name: str) -> Path:
    folder = CLIENTS / name
    if not (folder / "installed").is_file():
        pytest.skip(f"`make clients` installs {name}, which is missing")
    return folder


def said(command, **environment) -> list[str]:
    """Return the lines that a program prints, each a JSON string."""
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('"')]


@pytest.mark.parametrize("ready", WHOLE, indirect=True)
def test_figures_of_a_real_model_meet_the_promise(ready):
    """The promise covers greedy text, logits and experts."""
    _, _, _, report = ready
    found = report["graphs"]["fp32"]["parity"]
    assert found["greedy"]["equal"] == found["greedy"]["prompts"] == 20
    assert found["greedy"]["new_tokens"] == 64
    assert found["largest_difference"] <= 1e-4
    assert found["expert_flips"] <= 0.001 * found["tokens"]  # a tie that falls the other way changes the rest of the text
    assert found["expert_overlap"] >= 0.999
    assert found["lengths"][-1] == 200
    assert report["graphs"]["int8"]["parity"]["delta_ce"] <= 0.02


def test_onnxruntime_continues_prompts_without_torch(ready):
    folder, prompts, texts, _ = ready
    python = client("genai") / "bin" / "python"
    absent = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False)
    assert absent.returncode != 0
    assert said([python, ROOT / "examples" / "onnx" / "without_torch.py", folder, *prompts]) == texts


def test_onnxruntime_genai_continues_prompts(ready):
    folder, prompts, texts, _ = ready
    python = client("genai") / "bin" / "python"
    assert said([python, ROOT / "examples" / "onnx" / "genai.py", folder, *prompts]) == texts


def test_optimum_onnx_continues_prompts(ready):
    folder, prompts, texts, _ = ready
    python = client("optimum") / "bin" / "python"
    assert said([python, ROOT / "examples" / "onnx" / "optimum_onnx.py", folder, *prompts]) == texts


def test_transformers_js_continues_prompts(ready, tmp_path):
    folder, prompts, texts, _ = ready
    if shutil.which("node") is None:
        pytest.skip("there is no node")
    (tmp_path / "node_modules").symlink_to(client("node") / "node_modules")
    script = shutil.copy(ROOT / "examples" / "onnx" / "transformers_js.mjs", tmp_path)
    assert said(["node", script, folder, *prompts]) == texts
    for dtype, theirs in (("fp16", "fp16"), ("int8", "q8")):  # another build of onnxruntime, which may round differently
        model = OnnxModel.from_pretrained(folder, dtype=dtype)
        ours = [model.generate(prompt, 40) for prompt in prompts]
        assert sum(a == b for a, b in zip(said(["node", script, folder, *prompts], DTYPE=theirs), ours, strict=True)) >= 2


def test_transformers_js_continues_prompts_in_a_browser(ready, tmp_path):
    """examples/onnx/browser.html gives the same greedy text in a real browser, with local files only."""
    folder, prompts, texts, _ = ready
    modules = client("node") / "node_modules"
    if browser.program() is None:
        pytest.skip(f"needs a browser: none of {', '.join(browser.NAMES)} is installed")
    shutil.copy(ROOT / "examples" / "onnx" / "browser.html", tmp_path)
    (tmp_path / "model").symlink_to(folder)
    (tmp_path / "node_modules").symlink_to(modules)
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, browser.Browser() as page:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            for prompt, text in list(zip(prompts, texts, strict=True))[:2]:
                given = urllib.parse.urlencode({"model": "model", "models": ".", "prompt": prompt})
                address = f"http://127.0.0.1:{server.server_port}/"
                page.open(f"{address}browser.html?{given}", "document.documentElement.dataset.ready === 'yes'")
                assert page.texts("#text") == [text]
            assert all(request.startswith((address, "blob:", "data:", "about:")) for request in page.requests), page.requests
        finally:
            server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

"""The dashboard of one layer of GPT-2's shape with random weights: memory, time, size, and how long its pages take to open.

    python benchmarks/dashboard.py [--experts 21504] [--tokens 65536] [--keep FOLDER]

Memory is the peak resident size of a process of its own, files that it maps included. The browser (Debian's chromium) opens the pages from
disk; times are from the navigation until all of the page is there. Without a browser that part is left out.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from mxd_convert.base_model.swap import insert_layers
from mxd_convert.layers import LayerSpec, new_layer
from runs import ROOT, environment

sys.path.insert(0, str(ROOT / "tests" / "support"))
import browser

TEXT = ROOT / "examples" / "python-docs.jsonl.gz"


@dataclass(frozen=True)
class Written:
    seconds: float
    peak_bytes: int
    files: int
    disk_bytes: int


def checkpoint(folder: Path, width: int = 768, experts: int = 21_504, k: int = 32, vocabulary: int = 50_257) -> Path:
    """A random model of two layers, the upper one converted without training; the quickstart's tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "quickstart-lm")
    config = GPT2Config(
        vocab_size=vocabulary, bos_token_id=None, eos_token_id=None, n_embd=width, n_layer=2, n_head=12, n_positions=256
    )
    layer = new_layer(LayerSpec("mxd", width, 4 * width, width, experts, k, activation="gelu_new"))
    torch.nn.init.normal_(layer.decoder.weight, std=0.02)
    insert_layers(GPT2LMHeadModel(config), {1: layer}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(folder: Path, output: Path, tokens: int) -> Written:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "mxd_convert.cli", "dashboard", str(folder), "--data", str(TEXT), "--output", str(output)]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--tokens", str(tokens)], env=environment(), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(os.waitstatus_to_exitcode(status))
    sizes = [path.stat().st_size for path in output.rglob("*") if path.is_file()]
    return Written(time.perf_counter() - start, usage.ru_maxrss * 1024, len(sizes), sum(sizes))


def opens(output: Path, page: str, times: int = 5) -> list[float]:
    """Milliseconds until a page is ready, each time in a new browser."""
    found = []
    for _ in range(times):
        with browser.Browser() as window:
            found.append(window.open(f"{output.as_uri()}/{page}"))
            if window.errors:
                raise SystemExit("\n".join(window.errors))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=21_504)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--keep", type=Path, help="where to leave the dashboard")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = (arguments.keep or Path(folder) / "dashboard").absolute()
        written = write(checkpoint(Path(folder) / "model", experts=arguments.experts), output, arguments.tokens)
        print("| experts | tokens | peak GiB | seconds | files | MiB on disk |\n|---|---|---|---|---|---|")
        print(
            f"| {arguments.experts:,} | {arguments.tokens:,} | {written.peak_bytes / 2**30:.2f} | {written.seconds:.0f} ", end=""
        )
        print(f"| {written.files} | {written.disk_bytes / 2**20:.0f} |\n")
        if browser.program() is None:
            print("no browser is installed: the opening of the pages is not timed")
            return
        print("| page | ms to open: median | most |\n|---|---|---|")
        for page in ("index.html", f"expert.html#1:{arguments.experts // 2}"):
            found = opens(output, page)
            print(f"| {page.split('#')[0]} | {statistics.median(found):.0f} | {max(found):.0f} |")


if __name__ == "__main__":
    main()

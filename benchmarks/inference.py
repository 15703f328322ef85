"""Decoding and prefill, and the memory they take: the base model, the MxD in PyTorch, with the published dense branch, and in onnxruntime.

    python benchmarks/inference.py [--shape gpt2] [--rounds 5] [--threads 2]

Every variant lives in a process of its own, which reports its own peak memory; the processes take turns, one round each, so that all are
timed under the same conditions. One sequence. The limit of decoding is the time to read the bytes that a token's arithmetic needs,
at the bandwidth of a copy (bytes read and written) that is measured in the same rounds. Weights are random: speed
does not depend on them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROMPT, STEPS, PREFILL, LONG_PREFILL = 16, 24, 256, 1024
VARIANTS = {
    "base": "base model, PyTorch",
    "dense": "MxD, PyTorch, published dense branch",
    "mxd": "MxD, PyTorch",
    "fp32": "MxD, onnxruntime fp32",
    "fp16": "MxD, onnxruntime fp16",
    "int8": "MxD, onnxruntime int8",
}
RATIOS = (
    ("dense", "mxd", "MxD in PyTorch over the published dense branch"),
    ("mxd", "fp32", "onnxruntime fp32 over our PyTorch"),
    ("fp32", "int8", "int8 over fp32 in onnxruntime"),
    ("base", "mxd", "our PyTorch over the base model"),
)


@dataclass(frozen=True)
class Shape:
    """A base model and what its MLPs become."""

    experts: int
    k: int
    prompt: int  # tokens of the long prefill, within the model's positions


SHAPES = {"gpt2": Shape(21_490, 32, LONG_PREFILL - STEPS), "stories260k": Shape(1780, 32, 480), "tiny": Shape(64, 4, 96)}


def make(name: str, folder: Path) -> dict[str, int]:
    """Writes base model, converted checkpoint and its graphs into `folder`; returns the bytes that decoding a token has to read."""
    import onnx_ir as ir
    import transformers

    from mxd_convert.base_model.swap import insert_layers
    from mxd_convert.checkpoint.read import load_checkpoint
    from mxd_convert.onnx.graph import build_graph, without_experts
    from mxd_convert.onnx.quantize import as_products, quantize
    from mxd_convert.onnx.runtime import METADATA

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    shape, base = SHAPES[name], _base(name)
    base.save_pretrained(folder / "base")
    layers = {index: _layer(base, index, shape) for index in range(base.config.num_hidden_layers)}
    converted = insert_layers(base, layers)
    converted.save_pretrained(folder / "mxd")
    sizes = _bytes(base, converted)
    described = json.dumps({str(index): layer.entry() for index, layer in layers.items()})  # as export-onnx does
    del base, layers, converted
    (folder / "onnx").mkdir()
    for dtype in ("float32", "float16"):
        graph = without_experts(build_graph(load_checkpoint(folder / "mxd", dtype=dtype), 20, steering=False))
        graph.metadata_props[METADATA] = described
        short = {"float32": "fp32", "float16": "fp16"}[dtype]
        ir.save(graph, folder / "onnx" / f"{short}.onnx", external_data=f"{short}.onnx_data")
        if dtype == "float32":
            as_products(graph)
            ir.save(graph, folder / "products.onnx", external_data="products.onnx_data")
        del graph
    quantize(folder / "products.onnx", folder / "onnx" / "int8.onnx", "int8.onnx_data")
    for file in folder.glob("products.onnx*"):
        file.unlink()
    return sizes


def _base(name: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    from runs import (
        SHARED,
    )  # not at the top, since it imports torch, and a worker's memory is to be without what it does not need

    torch.manual_seed(0)
    if name == "stories260k":
        if not SHARED.is_dir():
            raise SystemExit("stories260k: its model is in the shared folder, which is not here; MXD_SHARED names it")
        return AutoModelForCausalLM.from_pretrained(SHARED / "models" / "stories260K", dtype=torch.float32)
    tiny = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": 300}
    return AutoModelForCausalLM.from_config(GPT2Config(**(tiny if name == "tiny" else {})))


def _layer(base: Any, index: int, shape: Shape) -> Any:
    import torch

    from mxd_convert.base_model.families import find_sites
    from mxd_convert.layers import MxD

    [site] = find_sites(base, base.config, [index])
    layer = MxD(site.d_in, site.d_hidden, site.d_out, shape.experts, shape.k, activation=site.activation, glu=site.glu)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return layer


def _bytes(base: Any, converted: Any) -> dict[str, int]:
    """Bytes a token has to read, by variant: of matrices all, of embeddings and experts the rows that are used, if only these are."""
    tied = base.get_output_embeddings().weight.data_ptr() == base.get_input_embeddings().weight.data_ptr()

    def count(model: Any) -> int:
        rows_only = {"wpe.weight"} if tied else {"wpe.weight", "wte.weight", "embed_tokens.weight"}
        total = 0
        for name, parameter in model.named_parameters():
            if any(name.endswith(ending) for ending in rows_only):
                total += parameter.shape[1]
            else:
                total += parameter.numel()
        return total

    whole = count(converted)
    experts = sum(layer.experts.numel() for layer in converted.mxd_layers().values())
    rows = sum(layer.k * layer.d_out for layer in converted.mxd_layers().values())
    sparse = whole - experts + rows
    matrices = sparse - rows
    return {
        "base": 4 * count(base),
        "dense": 4 * whole,
        "mxd": 4 * sparse,
        "fp32": 4 * sparse,
        "fp16": 2 * sparse,
        "int8": matrices + matrices // 32 * 4 + 4 * rows,  # 8 bits, a scale of 32 bits for every 32
    }


# --- a variant, in a process of its own -----------------------------------------------------------------------------------------------


def worker(kind: str, folder: Path, prompt: int, threads: int) -> None:
    """Answers each line on stdin with a line of figures."""
    decode = _torch(kind, folder, threads) if kind in ("base", "dense", "mxd") else _onnxruntime(kind, folder, threads)
    print("ready", flush=True)
    for line in sys.stdin:
        wanted = line.strip()
        if wanted == "decode":
            times = decode(PROMPT, STEPS)
            answer = {"ms": statistics.median(times[1:]) * 1e3}
        elif wanted == "prefill":
            answer = {"ms": decode(PREFILL if prompt > PREFILL else prompt, 0)[0] * 1e3}
        elif wanted == "long":
            answer = {"ms": decode(prompt, 0)[0] * 1e3}
        else:
            answer = {"peak": _peak()}
        print(json.dumps(answer), flush=True)


def _peak() -> int:
    """Peak resident size of this process, bytes."""
    with Path("/proc/self/status").open() as status:
        return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def _torch(kind: str, folder: Path, threads: int) -> Callable[[int, int], list[float]]:
    import torch
    from transformers import AutoModelForCausalLM

    from mxd_convert.modeling import layers_mxd  # importing the package lets transformers know the checkpoint

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder / ("base" if kind == "base" else "mxd")).eval()
    if kind == "dense":

        def scattered(values: Any, indices: Any, rows: Any) -> Any:
            return torch.zeros(*values.shape[:-1], rows.shape[0]).scatter_(-1, indices, values) @ rows

        layers_mxd.weighted_rows = scattered

    @torch.no_grad()
    def decode(prompt: int, steps: int) -> list[float]:
        ids, cache, times = torch.arange(prompt)[None] % model.config.vocab_size, None, []
        for _ in range(steps + 1):
            start = time.perf_counter()
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - start)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
        return times

    return decode


def _onnxruntime(kind: str, folder: Path, threads: int) -> Callable[[int, int], list[float]]:
    sys.modules["torch"] = sys.modules["transformers"] = None  # its memory without what it does not need
    from mxd_convert.onnx.runtime import OnnxModel

    model = OnnxModel.from_graph(folder / "onnx" / f"{kind}.onnx", folder / "base", threads)
    vocabulary = model.config["vocab_size"]

    def decode(prompt: int, steps: int) -> list[float]:
        ids, cache, times = np.arange(prompt)[None] % vocabulary, model.empty_cache(1), []
        for _ in range(steps + 1):
            start = time.perf_counter()
            logits = model.step(ids, cache).logits
            times.append(time.perf_counter() - start)
            ids = logits[:, -1:].argmax(-1)
        return times

    return decode


class Process:
    """One variant, waiting for its turn."""

    def __init__(self, kind: str, folder: Path, shape: Shape, threads: int) -> None:
        command = [sys.executable, __file__, "--worker", kind, "--folder", str(folder), "--prompt", str(shape.prompt)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
        self.words = folder / f"{kind}.txt"
        self.process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words.open("w"),
            text=True,
            env=environment,
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit(f"{kind}: its process did not start\n{self.words.read_text()}")

    def ask(self, what: str) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def bandwidth(threads: int) -> float:
    """Bytes per second that a copy reads and writes, of arrays that no cache holds."""
    import torch

    torch.set_num_threads(threads)
    source = torch.arange(2**26, dtype=torch.float32)  # 256 MB
    target = torch.empty_like(source).fill_(1.0)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def measure(name: str, folder: Path, rounds: int, threads: int) -> dict[str, Any]:
    """{"bytes", "bandwidth": [...], "decode" / "prefill" / "long": {variant: [ms per round]}, "peak": {variant: bytes}}."""
    sizes = make(name, folder)
    found: dict[str, Any] = {"bytes": sizes, "bandwidth": [], "peak": {}}
    running = {}
    try:
        for kind in VARIANTS:
            running[kind] = Process(kind, folder, SHAPES[name], threads)
        _rounds(found, running, rounds, threads)
    finally:
        for process in running.values():
            process.end()
    return found


def _rounds(found: dict[str, Any], running: dict[str, Process], rounds: int, threads: int) -> None:
    for what in ("decode", "prefill", "long"):
        found[what] = {kind: [] for kind in VARIANTS}
        for number in range(rounds + 1 if what == "decode" else max(rounds // 2, 1) + 1):
            if what == "decode":
                found["bandwidth"].append(bandwidth(threads))
            for kind, process in running.items():
                taken = process.ask(what)["ms"]
                if number:  # the first time allocates
                    found[what][kind].append(taken)
                time.sleep(0.3)  # thread pools spin for a while before they sleep
        if what == "decode":
            found["peak"] = {kind: process.ask("peak")["peak"] for kind, process in running.items()}
    found["peak_long"] = {kind: process.ask("peak")["peak"] for kind, process in running.items()}


def show(name: str, found: dict[str, Any]) -> None:
    """The tables of benchmarks/RESULTS.md."""
    speed = statistics.median(found["bandwidth"])
    short = min(PREFILL, SHAPES[name].prompt)
    print(f"Bandwidth of a copy: {speed / 1e9:.1f} GB/s (read and written).\n")
    print(
        f"| | decoding, ms per token | tokens/s | MB that a token must read | share of the limit | prefill of {short}, tokens/s"
        f" | of {SHAPES[name].prompt} | peak MiB, decoding | after the long prefill |\n|---|---|---|---|---|---|---|---|---|"
    )
    for kind, title in VARIANTS.items():
        decode, prefill, long = (statistics.median(found[what][kind]) for what in ("decode", "prefill", "long"))
        limit = found["bytes"][kind] / speed * 1e3
        print(
            f"| {title} | {decode:.2f} | {1e3 / decode:.1f} | {found['bytes'][kind] / 1e6:,.1f} | {limit / decode:.0%}"
            f" | {short / prefill * 1e3:,.0f} | {SHAPES[name].prompt / long * 1e3:,.0f}"
            f" | {found['peak'][kind] / 2**20:,.0f} | {found['peak_long'][kind] / 2**20:,.0f} |"
        )
    print("\n| ratio of decoding speeds | medians (of single rounds) | ratio of bytes |\n|---|---|---|")
    for slow, fast, title in RATIOS:
        rounds = sorted(a / b for a, b in zip(found["decode"][slow], found["decode"][fast], strict=True))
        ratio = statistics.median(found["decode"][slow]) / statistics.median(found["decode"][fast])
        print(
            f"| {title} | {ratio:.2f} ({rounds[0]:.2f} to {rounds[-1]:.2f}) | {found['bytes'][slow] / found['bytes'][fast]:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    for name in ("--worker", "--folder", "--prompt"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, Path(arguments.folder), int(arguments.prompt), arguments.threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        show(arguments.shape, measure(arguments.shape, Path(folder), arguments.rounds, arguments.threads))


if __name__ == "__main__":
    main()

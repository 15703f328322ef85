"""`export-onnx`: builds the graphs, compares them with the checkpoint, and only then gives the folder its name."""

import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from mxd_convert.base import quiet as without_noise
from mxd_convert.checkpoint import check_new, file_sha256, load_checkpoint, new_folder, read_config, recorded_base, weight_files
from mxd_convert.data import Blocks
from mxd_convert.errors import InputError, is_disk_full, is_out_of_memory, memory_guard
from mxd_convert.evaluation.progress import progress
from mxd_convert.labels import LABELS
from mxd_convert.onnx import parity
from mxd_convert.onnx.card import write_card
from mxd_convert.onnx.folder import base_type, write_config, write_genai_config, write_tokenizer
from mxd_convert.onnx.graph import build_graph, without_experts
from mxd_convert.onnx.quantize import BLOCK, as_products, quantize
from mxd_convert.onnx.runtime import FOLDER, GRAPHS, METADATA, OnnxModel
from mxd_convert.onnx.text import opened, source_of

REPORT = "onnx_report.json"
OPSET, OLDEST, NEWEST = 20, 18, 23  # 18: what PyTorch's exporter is written in
INLINE = 2**30  # bytes of weights that may lie in the graph's own file, of which protobuf takes 2 GiB
_TORCH = {"fp32": "float32", "fp16": "float16"}


@dataclass(frozen=True)
class Export:
    """output: the folder, None where a graph is out of tolerance. report: the content of onnx_report.json. failures: what is out, a line each."""

    output: Path | None
    report: dict[str, Any]
    failures: list[str]


def export_onnx(
    checkpoint: str | Path,
    output: str | Path,
    dtypes: Sequence[str] = ("fp32",),
    quantized: str | None = None,
    opset: int = OPSET,
    expert_outputs: bool = False,
    steering: bool = False,
    data: str | Path | None = None,
    tokens: int = 8192,
    text_field: str = "text",
    quiet: bool = False,
) -> Export:
    """Writes a folder that onnxruntime, onnxruntime-genai, optimum-onnx and transformers.js run.

    dtypes: fp32, fp16 or both, a graph each. quantized: "int8" adds one with weights in 8 bits. expert_outputs: graphs tell the active
    experts and their coefficients. steering: they take (layer, expert, amount). data: text to compare on, with `tokens` of it for the
    cross-entropy; None: the checkpoint's held-out text where it is at hand, else one that ships here.
    Raises InputError. Nothing is written at `output` where a graph does not do what the checkpoint does.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    config = read_config(checkpoint)
    _check(checkpoint, config, dtypes, quantized, opset)
    check_new(output, checkpoint)
    _check_space(checkpoint, output, dtypes, quantized)
    wanted = [*dtypes, *([quantized] if quantized else [])]
    job = _Job(checkpoint, wanted, opset, expert_outputs, steering, quiet)
    try:
        with (
            opened(checkpoint, source := source_of(checkpoint, data, text_field), tokens, config.vocab_size) as blocks,
            memory_guard("out of memory while exporting; free some, or export fewer kinds of graph at a time"),
            _explained_disk(output),
            new_folder(output, checkpoint) as folder,
        ):
            job.write(folder)
            job.compare(folder, blocks)
            about = {
                "path": blocks.info.path,
                "fingerprint": blocks.info.fingerprint,
                "tokens": len(blocks) * blocks.context,
                "held_out": True if source.held_out else None,
            }
            report = job.report(folder, about)
            (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            write_card(checkpoint, folder, report)
            if job.failures:
                raise _OutOfTolerance
    except _OutOfTolerance:
        return Export(None, report, job.failures)
    return Export(output, report, [])


class _OutOfTolerance(Exception):
    """Ends an export whose folder is not to stay."""


class _Job:
    """One export: its graphs, written and compared one after the other."""

    def __init__(
        self, checkpoint: Path, dtypes: list[str], opset: int, expert_outputs: bool, steering: bool, quiet: bool
    ) -> None:
        self.checkpoint, self.dtypes, self.opset, self.quiet = checkpoint, dtypes, opset, quiet
        self.expert_outputs, self.steering = expert_outputs, steering
        self.figures: dict[str, dict[str, Any]] = {}
        self.failures: list[str] = []
        self.names: dict[str, list[str]] = {}
        self.with_data: list[str] = []

    def say(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def write(self, folder: Path) -> None:
        place = folder / FOLDER
        place.mkdir()
        for dtype in self.dtypes:
            if dtype in _TORCH:
                self.say(f"exporting in {dtype}")
                self._build(place, dtype)
            else:
                self.say(f"quantising to {dtype}")
                self._quantise(place)
            self._finish(place, dtype)
        with without_noise():
            model = load_checkpoint(self.checkpoint)
            write_config(model, folder, self.dtypes, self.with_data)
            write_tokenizer(self.checkpoint, folder)
            graph = ir.load(place / GRAPHS[self.dtypes[0]]).graph
            write_genai_config(model, graph, folder, self.dtypes[0])
        self.names = {
            "inputs": [str(value.name) for value in graph.inputs],
            "outputs": [str(value.name) for value in graph.outputs],
        }
        if (self.checkpoint / LABELS).is_file():
            shutil.copyfile(self.checkpoint / LABELS, folder / LABELS)

    def _graph(self, dtype: str) -> ir.Model:
        model = load_checkpoint(self.checkpoint, dtype=_TORCH[dtype])
        layers = model.config.mxd["layers"]
        try:
            built = build_graph(model, self.opset, self.steering)
        except Exception as error:  # PyTorch's exporter has many; what users can do about any of them is the same
            if is_out_of_memory(error) or is_disk_full(error):
                raise
            kind = base_type(model.config).model_type
            reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
            raise InputError(f"{self.checkpoint}: a {kind} model can't be exported to ONNX: {reason.strip()[:200]}") from error
        built.metadata_props[METADATA] = json.dumps(layers)
        return built

    def _build(self, place: Path, dtype: str) -> None:
        ir.save(self._graph(dtype), place / _full(dtype), external_data=f"{GRAPHS[dtype]}_data")

    def _quantise(self, place: Path) -> None:
        """The int8 graph, from one in float32 in which every product with a weight is a MatMul."""
        source, full = place / "products.onnx", place / _full("fp32")
        graph = ir.load(full) if full.is_file() else self._graph("fp32")
        as_products(graph)
        ir.save(graph, source, external_data="products.onnx_data")
        del graph
        quantize(source, place / _full("int8"), f"{GRAPHS['int8']}_data")
        for file in (source, place / "products.onnx_data"):
            file.unlink()

    def _finish(self, place: Path, dtype: str) -> None:
        """The graph as it is published, beside the full one, which tells the experts: one file where the weights are small."""
        graph, data = ir.load(place / _full(dtype)), place / f"{GRAPHS[dtype]}_data"
        if not self.expert_outputs:
            graph = without_experts(graph)
        if data.stat().st_size <= INLINE:
            ir.external_data.load_to_model(graph)
        else:
            self.with_data.append(dtype)
        ir.save(graph, place / GRAPHS[dtype])
        onnx.checker.check_model(place / GRAPHS[dtype])

    def compare(self, folder: Path, blocks: Blocks) -> None:
        place = folder / FOLDER
        model = load_checkpoint(self.checkpoint, dtype="float32")
        reference = parity.Reference(model)
        room = min(int(getattr(model.config, "max_position_embeddings", 4096)), max(parity.LENGTHS) + max(parity.PASTS))
        stream = blocks.ids.reshape(-1)
        full = {dtype: OnnxModel.from_graph(place / _full(dtype), folder) for dtype in self.dtypes}
        parts = len(self.dtypes) * (len(parity.cases(room)) + parity.PROMPTS)
        with progress(parts, self.quiet, "comparing", "comparing with PyTorch on real text") as advance:
            entropies = parity.cross_entropies(reference, full, blocks)
            for dtype in self.dtypes:
                found = parity.compare(reference, full[dtype], stream, room, advance)
                found |= {"ce": entropies[dtype], "ce_checkpoint": entropies[""], "delta_ce": entropies[dtype] - entropies[""]}
                bound = max(parity.TOLERANCES["fp32"]["largest_difference"], parity.RELATIVE * found["largest_logit"])
                published = OnnxModel.from_graph(place / GRAPHS[dtype], folder)
                found["greedy"] = parity.compare_greedy(reference, published, full[dtype], blocks, room, bound, advance)
                if self.steering and reference.layers:
                    found["steering"] = parity.compare_steering(reference, full[dtype], stream, room)
                del published
                self.figures[dtype] = found
                self.failures += parity.failures(dtype, found)
        del full
        for dtype in self.dtypes:
            (place / _full(dtype)).unlink()
            if dtype not in self.with_data:
                (place / f"{GRAPHS[dtype]}_data").unlink()

    def report(self, folder: Path, data: dict[str, Any]) -> dict[str, Any]:
        graphs = {}
        for dtype in self.dtypes:
            files = [file for file in sorted((folder / FOLDER).iterdir()) if file.name.startswith(GRAPHS[dtype])]
            graphs[dtype] = {
                "file": f"{FOLDER}/{GRAPHS[dtype]}",
                "bytes": sum(file.stat().st_size for file in files),
                "sha256": {f"{FOLDER}/{file.name}": file_sha256(file) for file in files},
                **({"quantised": f"weights of every product, 8 bits, blocks of {BLOCK}"} if dtype == "int8" else {}),
                "parity": self.figures[dtype],
                "tolerance": parity.TOLERANCES[dtype],
                "passed": not any(line.startswith(f"{dtype}:") for line in self.failures),
            }
        config = read_config(self.checkpoint)
        packages = ("mxd-convert", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")
        return {
            "checkpoint": self.checkpoint.resolve().name,
            "base": {key: recorded_base(config).get(key) for key in ("model", "revision", "sha256", "local")},
            "model_type": base_type(config).model_type,
            "opset": self.opset,
            "expert_outputs": self.expert_outputs,
            "steering": self.steering,
            **self.names,
            "graphs": graphs,
            "data": data,
            "versions": {name: importlib.metadata.version(name) for name in packages},
        }


def _full(dtype: str) -> str:
    return f"full_{dtype}.onnx"


def _check(checkpoint: Path, config: Any, dtypes: Sequence[str], quantized: str | None, opset: int) -> None:
    """Raises InputError for what can't be asked for."""
    for dtype in dtypes:
        if dtype not in _TORCH:
            raise InputError(f"--dtype {dtype}: give fp32, fp16, or both as fp32,fp16 (8 bits: --quantize int8)")
    if not dtypes or len(set(dtypes)) < len(dtypes):
        raise InputError(f"--dtype {','.join(dtypes)}: give fp32, fp16, or both as fp32,fp16")
    if quantized not in (None, "int8"):
        raise InputError(f"--quantize {quantized}: int8 is what there is")
    if not OLDEST <= opset <= NEWEST:
        problem = "too old" if opset < OLDEST else "newer than what runtimes read"
        raise InputError(f"--opset {opset}: {problem}; give {OLDEST} to {NEWEST}, {OPSET} where in doubt")
    for order in config.mxd.get("steering", []):
        if order["positions"] != "all":
            raise InputError(
                f"{checkpoint}: its steering preset of expert {order['expert']} of layer {order['layer']} acts on the {order['positions']} only,"
                " which a graph can't tell; take it out of config.json (mxd.steering), and steer with --steering"
            )


def _check_space(checkpoint: Path, output: Path, dtypes: Sequence[str], quantized: str | None) -> None:
    """Raises InputError where the disk has not the room for what is written, the intermediate graphs included."""
    count = sum(file.stat().st_size for file in weight_files(checkpoint)) / _bytes_a_weight(checkpoint)
    needed = sum({"fp32": 4, "fp16": 2}[dtype] for dtype in dtypes) * count * (2 if 4 * count <= INLINE else 1)
    needed += 10 * count if quantized else 0
    place = output.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"{output}: the export writes about {needed / 2**30:.1f} GiB and the disk has {free / 2**30:.1f} GiB left;"
            " free some, or choose another folder"
        )


def _bytes_a_weight(checkpoint: Path) -> int:
    return 4 if str(getattr(read_config(checkpoint), "dtype", "float32")).endswith("float32") else 2


@contextmanager
def _explained_disk(output: Path) -> Iterator[None]:
    """onnxruntime and protobuf have words of their own for a full disk."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        if is_disk_full(error) or error.errno is None:
            raise
        raise InputError(f"{output}: can't be written ({os.strerror(error.errno)}); choose another folder") from None

"""`export-onnx`: build the graphs, compare them with the checkpoint, then rename the folder to its final name."""

import importlib.metadata
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from mxd_convert.base_model.checks import quiet as without_noise
from mxd_convert.checkpoint.labels import LABELS
from mxd_convert.checkpoint.read import (
    check_finite,
    check_new,
    load_checkpoint,
    new_folder,
    not_finite,
    read_config,
    read_report,
    recorded_base,
    tensor_shapes,
)
from mxd_convert.data.blocks import Blocks
from mxd_convert.errors import InputError, first_line, is_disk_full, is_out_of_memory, memory_guard
from mxd_convert.evaluation.progress import progress
from mxd_convert.files import check_free_space, file_sha256, finite, write_json
from mxd_convert.onnx import parity
from mxd_convert.onnx.card import write_card
from mxd_convert.onnx.folder import base_type, write_config, write_genai_config, write_tokenizer
from mxd_convert.onnx.graph import build_graph, without_experts
from mxd_convert.onnx.quantize import BLOCK, as_products, quantize
from mxd_convert.onnx.runtime import FOLDER, GRAPHS, METADATA, OnnxModel
from mxd_convert.onnx.text import opened
from mxd_convert.onnx.validation import end_tokens

REPORT = "onnx_report.json"
OPSET, OLDEST, NEWEST = 20, 18, 23  # default, oldest and newest opset; PyTorch's exporter is written in opset 18
INLINE = 2**30  # largest size of weights, in bytes, kept inside the graph's file, which protobuf limits to 2 GiB
_NO_MEMORY = "out of memory while exporting. Free some memory, or export one --dtype at a time, without --quantize."
_TORCH = {"fp32": "float32", "fp16": "float16"}


@dataclass(frozen=True)
class Export:
    """Result of an export.

    Attributes:
        output: The folder written, or None if a graph is out of tolerance.
        report: The content of onnx_report.json.
        failures: One line for each tolerance exceeded.
    """

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
    """Export a checkpoint to ONNX, for onnxruntime, onnxruntime-genai, optimum-onnx and transformers.js.

    Every graph is compared with the checkpoint first. If one is out of tolerance, `output` isn't written.

    Args:
        checkpoint: Folder of the converted checkpoint.
        output: Folder to write, new or empty.
        dtypes: Precisions, one graph each: "fp32", "fp16" or both.
        quantized: "int8" adds a graph with 8-bit weights.
        opset: ONNX opset version, from 18 to 23.
        expert_outputs: Add each layer's active experts and their coefficients to the outputs.
        steering: Add (layer, expert, amount) to the inputs.
        data: Text to compare on. None: the checkpoint's held-out text if available, else a bundled text.
        tokens: Maximum number of tokens for the cross-entropy.
        text_field: Field with the text of each document.
        quiet: Print no progress.

    Raises:
        InputError: The checkpoint can't be exported, or an option, the text or the output folder can't be used.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    config = read_config(checkpoint)
    _check(checkpoint, config, dtypes, quantized, opset)
    conversion = read_report(checkpoint)
    check_new(output, checkpoint)
    _check_space(checkpoint, output, dtypes, quantized)
    wanted = [*dtypes, *([quantized] if quantized else [])]
    job = _Job(checkpoint, wanted, opset, expert_outputs, steering, quiet)
    try:
        with (
            memory_guard(_NO_MEMORY),
            _explained(output),
            opened(checkpoint, output, data, tokens, text_field, config.get_text_config().vocab_size) as (blocks, held_out),
            new_folder(output, checkpoint) as folder,
        ):
            job.write(folder)
            job.compare(folder, blocks)
            about = {
                "path": blocks.info.path,
                "fingerprint": blocks.info.fingerprint,
                "tokens": len(blocks) * blocks.context,
                "held_out": held_out,
            }
            report = job.report(folder, about)
            if job.failures:
                raise _OutOfTolerance
            write_json(folder / REPORT, report)
            write_card(folder, report, conversion)
    except _OutOfTolerance:
        return Export(None, report, job.failures)
    return Export(output, report, [])


class _OutOfTolerance(Exception):
    """Signal that discards the folder of an export out of tolerance."""


class _Job:
    """One export, whose graphs are written and compared one at a time."""

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
        """Print a line of progress on stderr, unless quiet."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def write(self, folder: Path) -> None:
        """Write all graphs, and the config, tokenizer and labels."""
        graphs = folder / FOLDER
        graphs.mkdir()
        for dtype in self.dtypes:
            if dtype in _TORCH:
                self.say(f"exporting in {dtype}")
                self._build(graphs, dtype)
            else:
                self.say(f"quantising to {dtype}")
                self._quantise(graphs)
            self._publish(graphs, dtype)
        with without_noise():
            model = load_checkpoint(self.checkpoint)
            write_config(model, folder, self.dtypes, self.with_data)
            write_tokenizer(self.checkpoint, folder)
            graph = ir.load(graphs / GRAPHS[self.dtypes[0]]).graph
            write_genai_config(model, graph, folder, self.dtypes[0])
        self.names = {
            "inputs": [str(value.name) for value in graph.inputs],
            "outputs": [str(value.name) for value in graph.outputs],
        }
        if (self.checkpoint / LABELS).is_file():
            shutil.copyfile(self.checkpoint / LABELS, folder / LABELS)

    def _graph(self, dtype: str) -> ir.Model:
        model = load_checkpoint(self.checkpoint, dtype=_TORCH[dtype])
        self._check_finite(model, dtype)
        layers = model.config.mxd["layers"]
        try:
            built = build_graph(model, self.opset, self.steering)
        except Exception as error:  # PyTorch's exporter raises many types; all of them are reported as InputError
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if is_out_of_memory(cause) or is_disk_full(cause):
                raise cause from None
            kind = base_type(model.config).model_type
            reason = first_line(cause, 200)
            raise InputError(f"{self.checkpoint}: PyTorch can't export this {kind} model to ONNX: {reason}") from error
        built.metadata_props[METADATA] = json.dumps(layers)
        return built

    def _check_finite(self, model: Any, dtype: str) -> None:
        """Raise InputError if a tensor isn't finite, in the checkpoint or in half precision only."""
        if (name := not_finite(model)) is not None:
            check_finite(self.checkpoint, model if dtype == "fp32" else load_checkpoint(self.checkpoint))
            raise InputError(
                f"{self.checkpoint}: the tensor {name} has values beyond 65,504, the limit of fp16. Use --dtype fp32."
            )

    def _build(self, folder: Path, dtype: str) -> None:
        ir.save(self._graph(dtype), folder / _full(dtype), external_data=f"{GRAPHS[dtype]}_data")

    def _quantise(self, folder: Path) -> None:
        """Write the int8 graph, quantised from a float32 graph in which every product with a weight is a MatMul."""
        source, full = folder / "products.onnx", folder / _full("fp32")
        graph = ir.load(full) if full.is_file() else self._graph("fp32")
        as_products(graph)
        ir.save(graph, source, external_data="products.onnx_data")
        del graph
        quantize(source, folder / _full("int8"), f"{GRAPHS['int8']}_data")
        for file in (source, folder / "products.onnx_data"):
            file.unlink()

    def _publish(self, folder: Path, dtype: str) -> None:
        """Write the published graph next to the full one, which also outputs the experts.

        Weights of up to INLINE bytes stay in the graph's file.
        """
        graph, data = ir.load(folder / _full(dtype)), folder / f"{GRAPHS[dtype]}_data"
        if not self.expert_outputs:
            graph = without_experts(graph)
        if data.stat().st_size <= INLINE:
            ir.external_data.load_to_model(graph)
        else:
            self.with_data.append(dtype)
        ir.save(graph, folder / GRAPHS[dtype])
        onnx.checker.check_model(folder / GRAPHS[dtype])

    def compare(self, folder: Path, blocks: Blocks) -> None:
        """Compare the graphs with the checkpoint, one precision at a time to save memory, and record figures and failures."""
        model = load_checkpoint(self.checkpoint, dtype="float32")
        reference = parity.Reference(model)
        most = max(parity.LENGTHS) + max(parity.PASTS)
        room = min(getattr(model.config.get_text_config(), "max_position_embeddings", None) or most, most)
        vocabulary = model.config.get_text_config().vocab_size
        steps = len(self.dtypes) * (len(parity.cases(room)) + parity.PROMPTS)
        with progress(steps, self.quiet, "comparing", "comparing with PyTorch on real text") as advance:
            expected = parity.cross_entropy(lambda ids: reference.run(ids, np.ones_like(ids))[0], blocks, vocabulary)
            for dtype in self.dtypes:
                self.figures[dtype] = self._compare(folder, dtype, reference, blocks, room, expected, advance)
                self.failures += parity.failures(dtype, self.figures[dtype])

    def _compare(
        self,
        folder: Path,
        dtype: str,
        reference: parity.Reference,
        blocks: Blocks,
        room: int,
        expected: float,
        advance: Callable[..., None],
    ) -> dict[str, Any]:
        """Return the figures of one graph, and delete the files needed for the comparison only.

        expected: PyTorch's cross-entropy, in nats per token.
        """
        graphs, stream = folder / FOLDER, blocks.ids.reshape(-1)
        full = OnnxModel.from_graph(graphs / _full(dtype), folder)
        found = parity.compare(reference, full, stream, room, advance)
        vocabulary = reference.model.config.get_text_config().vocab_size
        entropy = parity.cross_entropy(lambda ids: full.step(ids, full.empty_cache(len(ids))).logits, blocks, vocabulary)
        found |= {"ce": entropy, "ce_checkpoint": expected, "delta_ce": entropy - expected}
        if self.steering and reference.layers:
            found["steering"] = parity.compare_steering(reference, full, stream, room)
        bound = parity.bounds("fp32", found["largest_logit"])["largest_difference"]
        published = OnnxModel.from_graph(graphs / GRAPHS[dtype], folder)
        found["greedy"] = parity.compare_greedy(reference, published, full, blocks, room, bound, advance)
        (graphs / _full(dtype)).unlink()
        if dtype not in self.with_data:
            (graphs / f"{GRAPHS[dtype]}_data").unlink()
        return found

    def report(self, folder: Path, data: dict[str, Any]) -> dict[str, Any]:
        """Return the content of onnx_report.json. data: facts about the text compared on."""
        graphs = {}
        for dtype in self.dtypes:
            files = [file for file in sorted((folder / FOLDER).iterdir()) if file.name.startswith(GRAPHS[dtype])]
            graphs[dtype] = {
                "file": f"{FOLDER}/{GRAPHS[dtype]}",
                "bytes": sum(file.stat().st_size for file in files),
                "sha256": {f"{FOLDER}/{file.name}": file_sha256(file) for file in files},
                **({"quantised": f"weights of every product, 8 bits, blocks of {BLOCK}"} if dtype == "int8" else {}),
                "parity": finite(self.figures[dtype]),
                "tolerance": parity.bounds(dtype, self.figures[dtype]["largest_logit"]),
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
    """Raise InputError for options or a checkpoint that can't be exported."""
    for dtype in dtypes:
        if dtype not in _TORCH:
            raise InputError(f"--dtype {dtype}: expected fp32, fp16 or fp32,fp16. For 8 bits, use --quantize int8.")
    if not dtypes or len(set(dtypes)) < len(dtypes):
        raise InputError(f"--dtype {','.join(dtypes)}: expected fp32, fp16 or fp32,fp16")
    if quantized not in (None, "int8"):
        raise InputError(f"--quantize {quantized}: expected int8")
    if not OLDEST <= opset <= NEWEST:
        problem = "too old" if opset < OLDEST else "newer than runtimes support"
        raise InputError(f"--opset {opset}: {problem}. Use {OLDEST} to {NEWEST}; the default is {OPSET}.")
    if (kind := _length_dependent(config)) is not None:
        raise InputError(
            f"{checkpoint}: no ONNX export is possible, because its position embedding (rope_type {kind!r}) depends on the length of the text"
        )
    end_tokens(checkpoint, {"eos_token_id": getattr(config, "eos_token_id", None)})
    for order in config.mxd.get("steering", []):
        if order["positions"] != "all":
            raise InputError(
                f"{checkpoint}: its steering preset of expert {order['expert']} of layer {order['layer']} acts on the {order['positions']} only,"
                " which an ONNX graph does not support. Remove it from config.json (mxd.steering), and steer with --steering."
            )


def _length_dependent(config: Any) -> str | None:
    """Return the type of a rotary position embedding that depends on the length of the text, or None for other types."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [entry.get("rope_type") for entry in (rope, *rope.values()) if isinstance(entry, dict)]
    return next((kind for kind in kinds if kind in ("dynamic", "longrope")), None)


def _check_space(checkpoint: Path, output: Path, dtypes: Sequence[str], quantized: str | None) -> None:
    """Raise InputError if the disk has no space for the export, including intermediate graphs."""
    count = sum(map(math.prod, tensor_shapes(checkpoint).values()))
    needed = sum({"fp32": 4, "fp16": 2}[dtype] for dtype in dtypes) * count * (2 if 4 * count <= INLINE else 1)
    needed += 10 * count if quantized else 0
    check_free_space(output.parent, needed, f"{output}: the export", " or choose another folder")


@contextmanager
def _explained(output: Path) -> Iterator[None]:
    """Replace the general messages for a full disk and for used-up memory by those of an export.

    The general ones say that the command resumes, but an export has no saved state.
    """
    try:
        yield
    except InputError as error:
        if error.__cause__ is not None and is_out_of_memory(error.__cause__):
            raise InputError(_NO_MEMORY) from error.__cause__
        if error.__cause__ is not None and is_disk_full(error.__cause__):
            raise InputError(
                f"{output}: no space left on the disk. Free some space, or choose another folder."
            ) from error.__cause__
        raise
    except OSError as error:
        if error.errno is None:
            raise
        raise InputError(f"{error.filename or output}: {os.strerror(error.errno)}. Choose another folder.") from None

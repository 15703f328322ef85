"""Validation of an exported folder, before onnxruntime or our own code uses it. All its files are untrusted.

Doesn't import torch, transformers or onnx, which running a model doesn't need.
"""

import json
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

from mxd_convert.errors import InputError, first_line, is_out_of_memory
from mxd_convert.files import check_links, kind_of, read_mapping

STEERING = {"steering.layers": "tensor(int64)", "steering.experts": "tensor(int64)", "steering.amounts": "tensor(float)"}
_FIX = "Download it or export the model again."
_SIZES = ("vocab_size", "max_position_embeddings", "n_positions")  # keys of config.json that the runtime reads
_CACHE_TYPES = ("tensor(float)", "tensor(float16)")
_MAX_WIDTH = 2**20  # most heads, and most features per head
_MAX_TOKEN = 2**63 - 1  # largest token id
_MAX_FIELDS = 5_000_000  # most protobuf fields in a graph's file, ten times those of the largest models

# --- config, generation settings and tokenizer ------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json. Raises InputError if a size that the runtime reads is not a positive integer."""
    path = folder / "config.json"
    config = read_mapping(path, _FIX)
    for key in _SIZES:
        value = config.get(key)
        if value is not None and not (_is_whole(value) and value >= 1):
            raise InputError(f"{path}: {key} is {_shown(value)}; expected an integer of 1 or more. {_FIX}")
    return config


def end_tokens(folder: Path, config: Mapping[str, Any]) -> set[int]:
    """Return the end tokens from generation_config.json, or else config.json. Raises InputError if they are not token ids.

    An id outside of the vocabulary is accepted, because small models often keep the id of the model they are derived from.
    """
    path, found = folder / "config.json", config.get("eos_token_id")
    generation = folder / "generation_config.json"
    if generation.is_file():
        settings = read_mapping(generation, _FIX)
        if "eos_token_id" in settings:
            path, found = generation, settings["eos_token_id"]
    tokens = found if isinstance(found, list) else [] if found is None else [found]
    for token in tokens:
        if not (_is_whole(token) and 0 <= token <= _MAX_TOKEN):
            raise InputError(f"{path}: eos_token_id is {_shown(found)}; expected a token id, a list of them, or null. {_FIX}")
    return set(tokens)


@contextmanager
def explained_tokenizer(path: Path, what: str) -> Iterator[None]:
    """Turn an error of the package tokenizers into an InputError that names tokenizer.json."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, TypeError):
        raise
    except BaseException as error:  # a panic in its Rust code is not an Exception
        raise InputError(f"{path}: {what} ({first_line(error)}). {_FIX}") from None


# --- the graph, as loaded by onnxruntime ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """Layers, inputs and outputs of a graph.

    Attributes:
        layers: the metadata of each layer, by index.
        inputs: all inputs, by name.
        past: the inputs that are the cache, by name.
        outputs: logits, then the present cache.
        experts: expert outputs, in the graph's order.
        steerable: whether the graph has steering inputs.
    """

    layers: dict[int, dict[str, Any]]
    inputs: dict[str, Any]
    past: dict[str, Any]
    outputs: list[str]
    experts: list[str]
    steerable: bool


def read_names(file: Path, session: Any, key: str) -> Names:
    """Read the layers, inputs and outputs of a session. key: the metadata key with the layers.

    Raises InputError if `export-onnx` can't have written the graph.
    """
    try:
        layers = _read_layers(file, session.get_modelmeta().custom_metadata_map.get(key), key)
        inputs = {entry.name: entry for entry in session.get_inputs()}
        outputs = {entry.name: entry for entry in session.get_outputs()}
        optional = {entry.name: entry for entry in session.get_overridable_initializers() if entry.name in STEERING}
    except UnicodeDecodeError:
        raise _no_export(file, "one of its names is not UTF-8") from None
    past = {name: entry for name, entry in inputs.items() if re.fullmatch(r"past_key_values\.\d{1,6}\.(key|value)", name)}
    experts = {f"experts.{index}.{part}" for index in layers for part in ("values", "indices")}
    experts = {name for name in experts if name in outputs}
    expected: dict[str, tuple[str, ...]] = {
        name: ("tensor(int64)",) for name in ("input_ids", "attention_mask", "position_ids") if name in inputs
    }
    expected |= {"input_ids": ("tensor(int64)",), "attention_mask": ("tensor(int64)",), **dict.fromkeys(past, _CACHE_TYPES)}
    _check_names(file, "input", inputs, expected)
    given: dict[str, tuple[str, ...]] = {"logits": ("tensor(float)",)}
    given |= {name.replace("past_key_values", "present"): (entry.type,) for name, entry in past.items()}
    given |= {name: ("tensor(int64)",) if name.endswith("indices") else _CACHE_TYPES for name in experts}
    _check_names(file, "output", outputs, given)
    if optional:
        _check_names(file, "input", optional, {name: (kind,) for name, kind in STEERING.items()})
    for name, entry in past.items():
        shape = entry.shape
        if len(shape) != 4 or not all(_is_whole(shape[at]) and 1 <= shape[at] <= _MAX_WIDTH for at in (1, 3)):
            raise _no_export(file, f"input {name} has shape {_shown(shape)}; expected (batch, heads, past, width of a head)")
    for name in experts:
        if name.endswith("indices") and name.replace("indices", "values") not in experts:
            raise _no_export(file, f"output {name} has no matching output with values")
    kept = ["logits", *(name for name in outputs if name.startswith("present."))]
    return Names(layers, inputs, past, kept, [name for name in outputs if name in experts], bool(optional))


def _read_layers(file: Path, text: str | None, key: str) -> dict[int, dict[str, Any]]:
    if text is None:
        raise _no_export(file, f"its metadata has no {key!r}")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise _no_export(file, f"its metadata {key!r} is not readable JSON") from None
    if not isinstance(content, dict):
        raise _no_export(file, f"its metadata {key!r} holds {kind_of(content)}; expected a mapping of layers")
    for index, layer in content.items():
        if not re.fullmatch(r"[0-9]{1,6}", index):
            raise _no_export(file, f"its metadata {key!r} has a layer {_shown(index)}; expected a layer index")
        if not isinstance(layer, dict) or not isinstance(layer.get("kind"), str):
            raise _no_export(file, f"its metadata {key!r}: layer {index} is {_shown(layer)}; expected a mapping with its kind")
        for name in ("n_experts", "k"):
            if name in layer and not (_is_whole(layer[name]) and layer[name] >= 1):
                raise _no_export(
                    file,
                    f"its metadata {key!r}: {name} of layer {index} is {_shown(layer[name])}; expected an integer of 1 or more",
                )
    return {int(index): layer for index, layer in content.items()}


def _check_names(file: Path, what: str, found: Mapping[str, Any], expected: Mapping[str, Sequence[str]]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise _no_export(file, f"it has no {what} {name}")
        if name not in expected:
            raise _no_export(file, f"it has an unexpected {what} {_shown(name)}")
        if found[name].type not in expected[name]:
            raise _no_export(file, f"{what} {name} is a {found[name].type}; expected {' or '.join(expected[name])}")


def check_step(file: Path, shape: Sequence[int], arrays: Mapping[str, Any]) -> None:
    """Raise InputError if an output is not of shape (rows, tokens, ...). shape: (rows, tokens) of the token ids."""
    for name, array in arrays.items():
        found = array.shape()
        if len(found) != 3 or tuple(found[:2]) != tuple(shape):
            raise _no_export(file, f"output {name} has shape {_shown(found)} for token ids of shape {_shown(list(shape))}")


def raise_failure(file: Path, error: Exception, problem: str) -> NoReturn:
    """Raise a one-line InputError for an error of onnxruntime. Its classes don't tell out of memory from other errors."""
    if is_out_of_memory(RuntimeError(str(error))) or is_out_of_memory(error) or "BFCArena" in str(error):
        raise InputError(
            f"{file}: out of memory in onnxruntime. Free memory, use a graph in fp16 or int8, or run fewer or shorter texts at a time."
        ) from MemoryError(first_line(error))
    reason = re.split(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", first_line(error, 2000))[-1]
    raise InputError(f"{file}: {problem} ({reason[:200]}). {_FIX}") from None


def _no_export(file: Path, problem: str) -> InputError:
    return InputError(f"{file}: not a graph of `mxd-convert export-onnx`, or a damaged one: {problem}. {_FIX}")


# --- the graph's file -------------------------------------------------------------------------------------------------------------


def check_graph(file: Path, folder: Path) -> None:
    """Raise InputError if a link or an external weight points outside of the folder, or an external weight is incomplete."""
    check_links(folder if file.resolve().is_relative_to(folder.resolve()) else file.parent)
    try:
        for tensor, entries in _external_tensors(file):
            _check_external(file, tensor, entries)
    except _Unreadable as error:
        raise InputError(f"{file}: not a readable ONNX graph ({error}). {_FIX}") from None


def _check_external(file: Path, tensor: str, entries: list[tuple[str, str]]) -> None:
    """Check the location of one tensor's external values. All values of a repeated key are checked: a reader may use any."""
    locations = [value for key, value in entries if key == "location"]
    offset, length = (
        max((_count(file, key, value) for key, value in entries if key == name), default=0) for name in ("offset", "length")
    )
    if not locations:
        raise InputError(f"{file}: tensor {_shown(tensor)} has external values without a location. {_FIX}")
    for location in locations:
        absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor or "\0" in location
        if not location or absolute or ".." in PurePosixPath(location.replace("\\", "/")).parts:
            raise InputError(
                f"{file}: tensor {_shown(tensor)} has its values in {_shown(location)}, outside of the folder. {_FIX}"
            )
        path = file.parent / location
        if not path.is_file():
            raise InputError(f"{path}: missing, but tensor {_shown(tensor)} of {file.name} has its values there. {_FIX}")
        size = path.stat().st_size
        if offset + length > size:
            raise InputError(
                f"{path}: {size:,} bytes, but the values of tensor {_shown(tensor)} of {file.name} end at byte"
                f" {offset + length:,}. {_FIX}"
            )


def _count(file: Path, key: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", value):
        raise InputError(f"{file}: {key} of a tensor's values is {_shown(value)}; expected a number of bytes. {_FIX}")
    return int(value)


class _Unreadable(Exception):
    """The file is not a protobuf message, or is one that no exporter writes."""


# by kind of message: the fields that may contain tensors, and the kind of each; field numbers are those of onnx.proto
_INSIDE = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_TENSOR_NAME, _TENSOR_EXTERNAL = 8, 13


def _external_tensors(file: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield (name, external_data entries) of every tensor with external data in a graph's file. Weights are skipped, not read."""
    if file.stat().st_size == 0:
        raise _Unreadable("empty")
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        reader = _Reader(content)
        waiting = [("model", 0, len(content))]
        while waiting:
            kind, start, end = waiting.pop()
            if kind == "tensor":
                name, entries = "", []
                for number, first, last in reader.fields(start, end):
                    if number == _TENSOR_NAME:
                        name = reader.text(first, last)
                    elif number == _TENSOR_EXTERNAL:
                        entry = {field: reader.text(*where) for field, *where in reader.fields(first, last)}
                        entries.append((entry.get(1, ""), entry.get(2, "")))
                if entries:
                    yield name, entries
                continue
            inside = _INSIDE[kind]
            waiting += [(inside[number], first, last) for number, first, last in reader.fields(start, end) if number in inside]


class _Reader:
    """Reader of protobuf's wire format."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.left = content, _MAX_FIELDS

    def fields(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield (number, start, end) of a message's length-delimited fields. Other fields are skipped."""
        at = start
        while at < end:
            self.left -= 1
            if self.left < 0:
                raise _Unreadable(f"more than {_MAX_FIELDS:,} fields")
            tag, at = self._number(at, end)
            kind, first = tag & 7, at
            if kind == 0:
                _, at = self._number(at, end)
            elif kind == 2:
                length, first = self._number(at, end)
                at = first + length
            elif kind in (1, 5):
                at += 8 if kind == 1 else 4
            else:
                raise _Unreadable(f"a field of wire type {kind}")
            if at > end or tag >= 2**32:
                raise _Unreadable("truncated within a field")
            if kind == 2:
                yield tag >> 3, first, at

    def _number(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                break
            byte = self.content[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
        raise _Unreadable("truncated within a number")

    def text(self, start: int, end: int) -> str:
        """Return a field's content as text."""
        if end - start > 2**16:
            raise _Unreadable("a name of more than 64 KiB")
        return self.content[start:end].decode("utf-8", errors="replace")


# ----------------------------------------------------------------------------------------------------------------------------------


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or a deeply nested list
        return kind_of(value)
    return text if len(text) <= 80 else text[:77] + "..."

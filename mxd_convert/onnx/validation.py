"""What an exported folder holds, checked before onnxruntime or our own code acts on it: every file of it may come from anyone.

Imports neither torch nor transformers nor package onnx, none of which running a model needs.
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
_FIX = "download it or export the model again"
_SIZES = ("vocab_size", "max_position_embeddings", "n_positions")  # of config.json, where the runtime reads them
_CACHE_TYPES = ("tensor(float)", "tensor(float16)")
_MOST_WIDTH = 2**20  # heads, or features of a head
_MOST_TOKEN = 2**63 - 1
_MOST_FIELDS = 5_000_000  # of a graph's file; the graphs of the largest models have a tenth of it

# --- the files beside the graphs --------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json. Raises InputError where a size that the runtime reads is no whole number."""
    path = folder / "config.json"
    config = read_mapping(path, _FIX)
    for key in _SIZES:
        value = config.get(key)
        if value is not None and not (_is_whole(value) and value >= 1):
            raise InputError(f"{path}: {key} is {_shown(value)}; expected a whole number from 1; {_FIX}")
    return config


def end_tokens(folder: Path, config: Mapping[str, Any]) -> set[int]:
    """Return the token ids that end a text: of generation_config.json, else of config.json. Raises InputError.

    An id beyond the vocabulary is accepted: it ends nothing, and small models often keep the one of the model they are shaped after.
    """
    path, found = folder / "config.json", config.get("eos_token_id")
    generation = folder / "generation_config.json"
    if generation.is_file():
        settings = read_mapping(generation, _FIX)
        if "eos_token_id" in settings:
            path, found = generation, settings["eos_token_id"]
    tokens = found if isinstance(found, list) else [] if found is None else [found]
    for token in tokens:
        if not (_is_whole(token) and 0 <= token <= _MOST_TOKEN):
            raise InputError(f"{path}: eos_token_id is {_shown(found)}; expected a token id, a list of them, or null; {_FIX}")
    return set(tokens)


@contextmanager
def explained_tokenizer(path: Path, what: str) -> Iterator[None]:
    """Turn an error of package tokenizers into an InputError that names tokenizer.json."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, TypeError):
        raise
    except BaseException as error:  # a panic of its Rust code is no Exception
        raise InputError(f"{path}: {what} ({first_line(error)}); {_FIX}") from None


# --- the graph, by what onnxruntime says of it ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """layers: by index, what the metadata says of each. past: inputs of the cache by name. experts: outputs, in the graph's order."""

    layers: dict[int, dict[str, Any]]
    inputs: dict[str, Any]
    past: dict[str, Any]
    outputs: list[str]
    experts: list[str]
    steerable: bool


def read_names(file: Path, session: Any, key: str) -> Names:
    """Read a session's layers, inputs and outputs. key: of the metadata. Raises InputError where the graph is none of ours."""
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
        if len(shape) != 4 or not all(_is_whole(shape[at]) and 1 <= shape[at] <= _MOST_WIDTH for at in (1, 3)):
            raise _no_export(file, f"input {name} has shape {_shown(shape)}; expected (batch, heads, past, width of a head)")
    for name in experts:
        if name.endswith("indices") and name.replace("indices", "values") not in experts:
            raise _no_export(file, f"output {name} is without its values")
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
            raise _no_export(file, f"its metadata {key!r} has a layer {_shown(index)}; expected a number")
        if not isinstance(layer, dict) or not isinstance(layer.get("kind"), str):
            raise _no_export(
                file, f"its metadata {key!r} says {_shown(layer)} of layer {index}; expected a mapping with its kind"
            )
        for name in ("n_experts", "k"):
            if name in layer and not (_is_whole(layer[name]) and layer[name] >= 1):
                raise _no_export(
                    file,
                    f"its metadata {key!r}: {name} of layer {index} is {_shown(layer[name])}; expected a whole number from 1",
                )
    return {int(index): layer for index, layer in content.items()}


def _check_names(file: Path, what: str, found: Mapping[str, Any], expected: Mapping[str, Sequence[str]]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise _no_export(file, f"it has no {what} {name}")
        if name not in expected:
            raise _no_export(file, f"it has an {what} {_shown(name)}")
        if found[name].type not in expected[name]:
            raise _no_export(file, f"{what} {name} is a {found[name].type}; expected {' or '.join(expected[name])}")


def check_step(file: Path, shape: Sequence[int], arrays: Mapping[str, Any]) -> None:
    """Raises InputError where the graph has made something of other than (rows, tokens, ...). shape: of the token ids."""
    for name, array in arrays.items():
        found = array.shape()
        if len(found) != 3 or tuple(found[:2]) != tuple(shape):
            raise _no_export(file, f"output {name} has shape {_shown(found)} for token ids of shape {_shown(list(shape))}")


def raise_failure(file: Path, error: Exception, problem: str) -> NoReturn:
    """Raise the one-line InputError for an error of onnxruntime, whose own classes don't tell one from the other."""
    if is_out_of_memory(RuntimeError(str(error))) or is_out_of_memory(error) or "BFCArena" in str(error):
        raise InputError(
            f"{file}: out of memory in onnxruntime; free some, or use a graph in fp16 or int8, or shorter and fewer texts at a time"
        ) from MemoryError(first_line(error))
    reason = re.split(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", first_line(error, 2000))[-1]
    raise InputError(f"{file}: {problem} ({reason[:200]}); {_FIX}") from None


def _no_export(file: Path, problem: str) -> InputError:
    return InputError(f"{file}: not a graph of `mxd-convert export-onnx`, or a damaged one: {problem}; {_FIX}")


# --- the graph's file -------------------------------------------------------------------------------------------------------------


def check_graph(file: Path, folder: Path) -> None:
    """Raises InputError where a link leads out of the folder, or a weight kept outside the graph is not in a whole file beside it."""
    check_links(folder if file.resolve().is_relative_to(folder.resolve()) else file.parent)
    try:
        for tensor, entries in _external_tensors(file):
            _check_external(file, tensor, entries)
    except _Unreadable as error:
        raise InputError(f"{file}: not a readable ONNX graph ({error}); {_FIX}") from None


def _check_external(file: Path, tensor: str, entries: list[tuple[str, str]]) -> None:
    """Checks where one tensor's values are said to be. A key may be there twice, and a reader may take either."""
    locations = [value for key, value in entries if key == "location"]
    start, length = (
        max((_count(file, key, value) for key, value in entries if key == name), default=0) for name in ("offset", "length")
    )
    if not locations:
        raise InputError(f"{file}: tensor {_shown(tensor)} has its values in another file, and names none; {_FIX}")
    for location in locations:
        absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor or "\0" in location
        if not location or absolute or ".." in PurePosixPath(location.replace("\\", "/")).parts:
            raise InputError(
                f"{file}: tensor {_shown(tensor)} has its values in {_shown(location)}, outside of the folder, so it is not loaded; {_FIX}"
            )
        place = file.parent / location
        if not place.is_file():
            raise InputError(f"{place}: missing, and tensor {_shown(tensor)} of {file.name} has its values there; {_FIX}")
        size = place.stat().st_size
        if start + length > size:
            raise InputError(
                f"{place}: {size:,} bytes, and tensor {_shown(tensor)} of {file.name} has its values up to byte {start + length:,}; {_FIX}"
            )


def _count(file: Path, key: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", value):
        raise InputError(f"{file}: {key} of a tensor's values is {_shown(value)}; expected a number of bytes; {_FIX}")
    return int(value)


class _Unreadable(Exception):
    """The file is no message of protobuf, or one that no exporter writes."""


# By kind of message: the fields in which tensors are, and the kind of each. Numbers are those of onnx.proto.
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
    """Yield (name, external_data) of every tensor in a graph's file that has such entries. Weights are passed over, not read."""
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
                        parts = {field: reader.text(*where) for field, *where in reader.fields(first, last)}
                        entries.append((parts.get(1, ""), parts.get(2, "")))
                if entries:
                    yield name, entries
                continue
            inside = _INSIDE[kind]
            waiting += [(inside[number], first, last) for number, first, last in reader.fields(start, end) if number in inside]


class _Reader:
    """Reads protobuf's wire format."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.left = content, _MOST_FIELDS

    def fields(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield (number, start, end) of a message's fields that have a length; the others are passed over."""
        at = start
        while at < end:
            self.left -= 1
            if self.left < 0:
                raise _Unreadable(f"more than {_MOST_FIELDS:,} fields")
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
                raise _Unreadable("it ends within a field")
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
        raise _Unreadable("it ends within a number")

    def text(self, start: int, end: int) -> str:
        if end - start > 2**16:
            raise _Unreadable("a name of more than 64 KiB")
        return self.content[start:end].decode("utf-8", errors="replace")


# ----------------------------------------------------------------------------------------------------------------------------------


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or a deep list
        return kind_of(value)
    return text if len(text) <= 80 else text[:77] + "..."

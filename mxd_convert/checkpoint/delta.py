"""Delta checkpoints: what a conversion changed, without the base's weights. The full checkpoint is rebuilt from one bit for bit.

- `layers.safetensors`: the tensors that the base does not have.
- `full/`: the other files of the checkpoint.
- `mxd_delta.json`: the base's id and hash, the hash of every file, and the headers from which the weight files are rebuilt.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig

from mxd_convert.base_model import swap
from mxd_convert.base_model.checks import WEIGHTS_HELP, load_errors, quiet
from mxd_convert.base_model.load import load_base, model_sha256, stored_tensors
from mxd_convert.checkpoint.read import (
    DELTA,
    REPORT,
    check_folder,
    chosen_base,
    class_of,
    read_config,
    read_report,
)
from mxd_convert.checkpoint.verify import Check, Verification
from mxd_convert.errors import InputError
from mxd_convert.files import file_sha256, read_mapping

LAYERS = "layers.safetensors"
FULL = "full"
FORMAT_VERSION = 1


def is_delta(folder: str | Path) -> bool:
    """Return whether a folder is a delta checkpoint."""
    return (Path(folder) / DELTA).is_file()


def load_delta(folder: str | Path, base: str | None = None, dtype: str = "auto") -> Any:
    """Return the converted model of a delta in evaluation mode, without writing the full checkpoint.

    Args:
        folder: The delta.
        base: The base model, if not the recorded one.
        dtype: A dtype of torch by name, or "auto" for the checkpoint's own.

    Raises:
        InputError: If the folder is not a delta, is damaged, or the base is not available or not the recorded one.
    """
    folder = Path(folder)
    content = read_delta(folder)
    original = base_of_delta(folder, content, base)
    config = read_config(folder / FULL)
    tensors = merged_tensors(folder, content, stored_tensors(original))
    with load_errors("the delta", str(folder)):
        model = swap.model_of_tensors(class_of(folder / FULL, config), config, tensors, original)
    if (folder / FULL / "generation_config.json").is_file():
        with quiet():
            model.generation_config = GenerationConfig.from_pretrained(folder / FULL)
    return model if dtype == "auto" else model.to(getattr(torch, dtype))


def verify_delta(delta: str | Path, base: str | None = None) -> Verification:
    """Return whether the delta's files and the weights rebuilt from it have the recorded hashes.

    The weights are reported as not checked if the base is not available. Raises InputError if `delta` is not a delta or `base` is
    not its base.
    """
    folder = Path(delta)
    content = read_delta(folder)
    weights = {entry["path"]: entry["header"] for entry in content["weights"]}
    others = {path: digest for path, digest in content["files"].items() if path not in weights}
    wrong = [path for path, digest in others.items() if not has_hash(folder / FULL / path, digest)]
    checks = [
        Check("the checkpoint's files have the recorded hashes", not wrong, f"{wrong[0]} differs or is missing" if wrong else "")
    ]
    name = "the rebuilt weights have the recorded hashes"
    try:
        original = base_of_delta(folder, content, base)
    except InputError as error:
        if base is not None:
            raise
        return Verification(folder, [*checks, Check(name, None, str(error))])
    tensors = merged_tensors(folder, content, stored_tensors(original))
    for path, header in weights.items():
        digest = hashlib.sha256()
        for piece in weight_file(header, tensors):
            digest.update(piece)
        same = digest.hexdigest() == content["files"][path]
        checks.append(Check(name, same, "" if same else f"{path} differs"))
    return Verification(folder, checks)


def measured_on_others(delta: Path) -> list[str]:
    """Return the paths of the checkpoint's files that differ from those that its report was measured on."""
    content = read_delta(delta)
    if not (delta / FULL / REPORT).is_file():
        return []
    report = read_report(delta / FULL)
    recorded = (report and report.files) or {}
    return [path for path, digest in recorded.items() if content["files"].get(path) != digest]


# --- reading ---------------------------------------------------------------------------------------------------------------------


def read_delta(folder: Path) -> dict[str, Any]:
    """Return the content of a delta's `mxd_delta.json`. Raises InputError if the folder is not a delta or the file is invalid."""
    check_folder(folder)
    if not is_delta(folder):
        raise InputError(f"{folder}: no {DELTA}, so not a delta. Create one with `mxd-convert delta`.")
    content = read_mapping(folder / DELTA, "Download it again.")
    version = content.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise InputError(
            f"{folder}: a delta of format {version}; this mxd-convert reads format {FORMAT_VERSION}. Upgrade mxd-convert."
        )
    try:
        assert version == FORMAT_VERSION
        _check_form(content)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError, RecursionError):
        raise InputError(f"{folder}: its {DELTA} can't be read. Download it again.") from None
    return content


def _check_form(content: Mapping[str, Any]) -> None:
    """Raise an exception of any kind if untrusted content does not have the form that `mxd-convert delta` writes."""
    assert isinstance(content["base"], dict)
    assert isinstance(content["layers_sha256"], str)
    for entry in content["weights"]:
        assert entry["path"] in content["files"]
        assert isinstance(entry["header"], str)
        header = json.loads(entry["header"])
        for name in header.keys() - {"__metadata__"}:
            start, end = header[name]["data_offsets"]
            assert type(start) is int
            assert type(end) is int
    assert all(path and _inside(path) and isinstance(digest, str) for path, digest in content["files"].items())
    assert all(isinstance(value, str | bool | dict | None) for value in content["base"].values())


def _inside(path: str) -> bool:
    """Return whether an untrusted relative path stays inside its folder."""
    return not Path(path).is_absolute() and ".." not in Path(path).parts


def base_of_delta(folder: Path, content: Mapping[str, Any], base: str | None) -> Any:
    """Return the loaded base model of a delta: `base` if given, else the recorded one. Raises InputError if its hash differs."""
    recorded = content["base"]
    settings = chosen_base(folder, recorded, base)
    original = load_base(settings, dtype="auto")
    if model_sha256(original) != recorded.get("sha256"):
        raise InputError(
            f"{settings.model}: not the base model of this delta (the hash of its tensors differs). Give {recorded.get('model')} with --base."
        )
    return original


def merged_tensors(folder: Path, content: Mapping[str, Any], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the checkpoint's tensors by name: those of the delta, and the base's (`theirs`) for the others."""
    if not has_hash(folder / LAYERS, content["layers_sha256"]):
        raise InputError(f"{folder / LAYERS}: missing or not the recorded file. {WEIGHTS_HELP}")
    try:
        with safe_open(folder / LAYERS, framework="pt") as stored:
            own = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / LAYERS}: can't be read ({error}). {WEIGHTS_HELP}") from None
    names = {name for entry in content["weights"] for name in json.loads(entry["header"]) if name != "__metadata__"}
    for name in sorted(names - own.keys() - theirs.keys()):
        raise InputError(f"{folder}: damaged: neither {LAYERS} nor the base has {name}. Download it again.")
    return {name: own[name] if name in own else theirs[name] for name in names}


def has_hash(path: Path, digest: str) -> bool:
    """Return whether a file exists and has the SHA-256 `digest`."""
    return path.is_file() and file_sha256(path) == digest


# --- writing ---------------------------------------------------------------------------------------------------------------------


def weight_file(header: str, tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    """Yield the bytes of a safetensors file: its header, then its tensors in the order of the header."""
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    text = header.encode()
    yield len(text).to_bytes(8, "little") + text
    for name, _ in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        yield _bytes(tensors[name])


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()

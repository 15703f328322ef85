"""Delta checkpoints: what a conversion changed, without the base's own weights; and the full checkpoint made of it again, to the bit.

`layers.safetensors` holds the tensors that the base does not have, `full/` the other files of the checkpoint, `mxd_delta.json` the base's id
and hash, the hash of every file, and the headers of the weight files, so that they can be written again whatever wrote them first.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from mxd_convert import surgery
from mxd_convert.base import WEIGHTS_HELP, explained, load_base, model_sha256, quiet, untied_tensors
from mxd_convert.checkpoint import (
    DELTA,
    LOCAL,
    REPORT,
    belonging,
    check_folder,
    check_new,
    chosen_base,
    class_of,
    load_checkpoint,
    new_folder,
    original_of,
    read_config,
    read_local,
    read_report,
    recipe_of,
    recorded_base,
    weight_files,
)
from mxd_convert.errors import InputError
from mxd_convert.files import file_sha256, read_mapping, replacing, write_json
from mxd_convert.report import write_card
from mxd_convert.verification import Check, Verification

LAYERS = "layers.safetensors"
FULL = "full"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Delta:
    """A delta that was written. Sizes in bytes, of its folder and of the full checkpoint's; tensors: those that the base does not have."""

    output: Path
    size: int
    full_size: int
    tensors: int

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "output": str(self.output)}


def is_delta(folder: str | Path) -> bool:
    return (Path(folder) / DELTA).is_file()


def delta(checkpoint: str | Path, output: str | Path, base: str | None = None) -> Delta:
    """Writes what a checkpoint has beyond its base. base: the base model, where not the recorded one. Raises InputError."""
    folder, output = Path(checkpoint), Path(output)
    check_new(output, folder)
    config = read_config(folder)
    converted = load_checkpoint(folder)
    theirs = untied_tensors(original_of(folder, converted, base))
    ours = untied_tensors(converted)
    own = {name: tensor.contiguous() for name, tensor in ours.items() if not _same(tensor, theirs.get(name))}
    files = belonging(folder)
    weights = weight_files(folder)
    content = {
        "format_version": FORMAT_VERSION,
        "base": recorded_base(config),
        "layers": config.mxd["layers"],
        "weights": [{"path": file.relative_to(folder).as_posix(), "header": _header(file)} for file in weights],
        "files": {path: file_sha256(folder / path) for path in files},
    }
    with new_folder(output, folder) as work:
        for path in files:
            if folder / path not in weights:
                (work / FULL / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / path, work / FULL / path)
        save_file(own, work / LAYERS, metadata={"format": "pt"})
        content["layers_sha256"] = file_sha256(work / LAYERS)
        write_json(work / DELTA, content)
        if local := read_local(folder).get("base"):
            write_json(work / LOCAL, {"base": local})
        _write_card(folder, work, config)
    return Delta(output, _size(output), sum((folder / path).stat().st_size for path in files), len(own))


def apply(delta: str | Path, output: str | Path, base: str | None = None) -> Path:
    """The full checkpoint of a delta, its files bit for bit those that the delta was made of. Raises InputError where the base is another."""
    folder, output = Path(delta), Path(output)
    check_new(output, folder)
    content = _read(folder)
    tensors = _merged(folder, content, untied_tensors(_base_model(folder, content, base)))
    with new_folder(output, folder) as work:
        weights = {entry["path"]: entry["header"] for entry in content["weights"]}
        for path in content["files"]:
            (work / path).parent.mkdir(parents=True, exist_ok=True)
            if path in weights:
                with replacing(work / path) as temporary, temporary.open("wb") as file:
                    file.writelines(_pieces(weights[path], tensors))
            elif (folder / FULL / path).is_file():
                shutil.copyfile(folder / FULL / path, work / path)
        for path, digest in content["files"].items():
            if not _is(work / path, digest):
                raise InputError(f"{folder}: damaged: {path} does not come out with the recorded hash; download it again")
        if local := read_local(folder).get("base"):
            write_json(work / LOCAL, {"base": local})
    return output


def load_delta(folder: str | Path, base: str | None = None, dtype: str = "auto") -> Any:
    """The converted model of a delta, without writing the full checkpoint anywhere, in evaluation mode. Raises InputError."""
    folder = Path(folder)
    content = _read(folder)
    original = _base_model(folder, content, base)
    config = read_config(folder / FULL)
    tensors = _merged(folder, content, untied_tensors(original))
    with explained("the delta", str(folder)):
        model = surgery.assemble(class_of(folder / FULL, config), config, tensors, original)
    if (folder / FULL / "generation_config.json").is_file():
        with quiet():
            model.generation_config = GenerationConfig.from_pretrained(folder / FULL)
    return model if dtype == "auto" else model.to(getattr(torch, dtype))


def verify_delta(delta: str | Path, base: str | None = None) -> Verification:
    """Whether its files and the weights that come out of it have the recorded hashes; of weights not checked where the base is not at hand.

    Raises InputError where it is no delta, or `base` not its base.
    """
    folder = Path(delta)
    content = _read(folder)
    weights = {entry["path"]: entry["header"] for entry in content["weights"]}
    others = {path: digest for path, digest in content["files"].items() if path not in weights}
    wrong = [path for path, digest in others.items() if not _is(folder / FULL / path, digest)]
    checks = [
        Check("the checkpoint's files have the recorded hashes", not wrong, f"{wrong[0]} differs or is missing" if wrong else "")
    ]
    name = "the checkpoint's weights come out with the recorded hashes"
    try:
        original = _base_model(folder, content, base)
    except InputError as error:
        if base is not None:
            raise
        return Verification(folder, [*checks, Check(name, None, str(error))])
    tensors = _merged(folder, content, untied_tensors(original))
    for path, header in weights.items():
        digest = hashlib.sha256()
        for piece in _pieces(header, tensors):
            digest.update(piece)
        same = digest.hexdigest() == content["files"][path]
        checks.append(Check(name, same, "" if same else f"{path} does not"))
    return Verification(folder, checks)


def measured_on_others(delta: Path) -> list[str]:
    """Files of the checkpoint that are not those that its report's figures were measured on."""
    content = _read(delta)
    if not (delta / FULL / REPORT).is_file():
        return []
    recorded = (read_report(delta / FULL) or {}).get("files") or {}
    return [path for path, digest in recorded.items() if content["files"].get(path) != digest]


# --- reading ---------------------------------------------------------------------------------------------------------------------


def _read(folder: Path) -> dict[str, Any]:
    check_folder(folder)
    if not is_delta(folder):
        raise InputError(f"{folder}: no {DELTA}, so not a delta; `mxd-convert delta` makes those")
    content = read_mapping(folder / DELTA, "download it again")
    version = content.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise InputError(
            f"{folder}: a delta of format {version}, and this mxd-convert knows {FORMAT_VERSION}; upgrade mxd-convert"
        )
    try:
        assert version == FORMAT_VERSION
        _check_form(content)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError, RecursionError):
        raise InputError(f"{folder}: its {DELTA} can't be read; download it again") from None
    return content


def _check_form(content: Mapping[str, Any]) -> None:
    """Raises some error where it is not what `delta` writes: it may come from anywhere."""
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
    """Whether a path from a file that came from elsewhere stays inside the folder."""
    return not Path(path).is_absolute() and ".." not in Path(path).parts


def _base_model(folder: Path, content: Mapping[str, Any], base: str | None) -> Any:
    recorded = content["base"]
    settings = chosen_base(folder, recorded, base)
    original = load_base(settings, dtype="auto")
    if model_sha256(original) != recorded.get("sha256"):
        raise InputError(
            f"{settings.model}: not the model that this delta belongs to (the hash of its tensors differs); give {recorded.get('model')} with --base"
        )
    return original


def _merged(folder: Path, content: Mapping[str, Any], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors, by name: its own, and for the others the base's."""
    if not _is(folder / LAYERS, content["layers_sha256"]):
        raise InputError(f"{folder / LAYERS}: missing, or {WEIGHTS_HELP}")
    try:
        with safe_open(folder / LAYERS, framework="pt") as stored:
            own = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / LAYERS}: {WEIGHTS_HELP} ({error})") from None
    names = {name for entry in content["weights"] for name in json.loads(entry["header"]) if name != "__metadata__"}
    for name in sorted(names - own.keys() - theirs.keys()):
        raise InputError(f"{folder}: damaged: neither {LAYERS} nor the base has {name}; download it again")
    return {name: own[name] if name in own else theirs[name] for name in names}


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and file_sha256(path) == digest


# --- writing ---------------------------------------------------------------------------------------------------------------------


def _header(file: Path) -> str:
    """The JSON at the head of a safetensors file, as it stands there."""
    with file.open("rb") as content:
        return content.read(int.from_bytes(content.read(8), "little")).decode()


def _pieces(header: str, tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    """A weight file, from its head and its tensors in the order that the head gives."""
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    text = header.encode()
    yield len(text).to_bytes(8, "little") + text
    for name, _ in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        yield _bytes(tensors[name])


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _same(ours: Tensor, theirs: Tensor | None) -> bool:
    """Bit for bit: as numbers, 0 and -0 would be the same."""
    if theirs is None or ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    one, other = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (ours, theirs))
    return one.equal(other)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _write_card(folder: Path, work: Path, config: Any) -> None:
    """A card of the delta's own, of the checkpoint's report and recipe, which say what the checkpoint itself was measured to be."""
    if not (folder / REPORT).is_file():
        return
    report = read_report(folder)
    assert report is not None
    write_card(work, report, recipe_of(folder), base_on_hub=not recorded_base(config).get("local", True), full=work / FULL)

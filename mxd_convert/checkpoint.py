"""A finished folder: read with errors that say what to do, and the base model that it came from."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mxd_convert.architectures import kept_mlp
from mxd_convert.base import WEIGHTS_HELP, explained, load_base, model_sha256, quiet, untied_tensors
from mxd_convert.errors import InputError, disk_guard
from mxd_convert.modeling import configuration_mxd, modeling_mxd
from mxd_convert.own_code import class_in, is_trusted
from mxd_convert.recipe import Base

LOCAL = "mxd_local.json"
REPORT = "mxd_report.json"
DASHBOARD = "dashboard"  # folder of one, where a run has written it
ONNX = "onnx"  # the same of an export
DELTA = "mxd_delta.json"  # marks a folder as what a conversion changed, without the base's weights


def read_config(folder: str | Path) -> Any:
    """The config of a converted checkpoint. Raises InputError where the folder holds none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    path = folder / "config.json"
    if not path.is_file():
        if (folder / DELTA).is_file():
            raise InputError(f"{folder}: a delta; `mxd-convert apply {folder} DIR` makes the full checkpoint of it")
        place = folder.resolve()
        unfinished = place.name.endswith(".partial") or place.parent.joinpath(f"{place.name}.partial").is_dir()
        raise InputError(f"{folder}: no config.json, so not a checkpoint" + ("; its run has not finished" if unfinished else ""))
    with explained("its config.json", str(folder)):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not str(content.get("model_type")).startswith("mxd_"):
            kind = f"a {content.get('model_type')!r} model" if isinstance(content, dict) else "no mapping"
            raise InputError(f"{folder}: config.json is of {kind}, not of one with MxD layers; `mxd-convert run` makes those")
        if not isinstance(content.get("mxd"), dict):
            raise InputError(f"{folder}: config.json: mxd is {content.get('mxd')!r}; expected format_version, mlp and layers")
        architecture = str((content.get("architectures") or [""])[0])
        if not (architecture.startswith("Mxd") and architecture.endswith("ForCausalLM")):
            raise InputError(
                f"{folder}: config.json: architectures is {content.get('architectures')!r}; expected one Mxd...ForCausalLM"
            )
        stem = architecture.removeprefix("Mxd").removesuffix("ForCausalLM")
        try:
            own = class_in(folder, content.get("auto_map"), "AutoConfig")
            config_type = own or configuration_mxd.config_class(stem)
        except AttributeError:
            raise InputError(
                f"{folder}: this transformers has no {stem}Config, which the checkpoint needs; upgrade transformers"
            ) from None
        with quiet():
            return config_type.from_pretrained(folder)


def load_checkpoint(folder: str | Path, dtype: str = "auto") -> Any:
    """A converted model from its folder, in evaluation mode. Raises InputError for missing, damaged or ill-fitting weights."""
    config = read_config(folder)
    with explained("the checkpoint", str(folder)), quiet():
        model_class = class_of(Path(folder), config)
        with torch.device("meta"):
            expected = {name: list(tensor.shape) for name, tensor in untied_tensors(model_class(config)).items()}
        check_tensors(Path(folder), expected)
        model = model_class.from_pretrained(folder, dtype=dtype)
    return model.eval().requires_grad_(False)


def class_of(folder: Path, config: Any) -> Any:
    """The class of a checkpoint's model. folder: where its code is, if that is not ours."""
    own = class_in(folder, config.auto_map, "AutoModelForCausalLM")
    return own or getattr(modeling_mxd, type(config).__name__.removesuffix("Config") + "ForCausalLM")


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint. Raises InputError where one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise InputError(f"{index}: not a readable index of weight files; download it or convert again") from None
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: missing; download it or convert again")
    return files


def check_tensors(folder: Path, expected: dict[str, list[int]]) -> None:
    """Compares the tensors on disk, by their headers, with the shapes that the config makes. Raises InputError for the first difference."""
    found: dict[str, list[int]] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise InputError(f"{file}: {WEIGHTS_HELP} ({error})") from None
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise InputError(f"{folder}: the weights don't fit config.json: missing tensor {name}; download it or convert again")
        if name not in expected:
            raise InputError(
                f"{folder}: the weights don't fit config.json: unexpected tensor {name}; download it or convert again"
            )
        if found[name] != expected[name]:
            raise InputError(
                f"{folder}: the weights don't fit config.json: {name} has shape {found[name]} where it makes {expected[name]}"
            )


def base_of(folder: str | Path, override: str | None = None) -> Base:
    """The base model that a checkpoint came from: `override`, the local path kept beside it, or the recorded id. Raises InputError."""
    return chosen_base(Path(folder), recorded_base(read_config(folder)), override)


def chosen_base(folder: Path, recorded: Mapping[str, Any], override: str | None) -> Base:
    """The same for whatever keeps beside it what it knows of its base. recorded: the base's id, revision, and whether it was local."""
    more: dict[str, Any] = {"mlp": kept_mlp(recorded), "trust_remote_code": is_trusted()}
    if override is not None:
        path = Path(override).expanduser()
        if path.exists():
            return Base(model=str(path.resolve()), **more)
        return Base(model=override, revision=recorded.get("revision") if override == recorded.get("model") else None, **more)
    local = read_local(folder).get("base")
    if isinstance(local, str) and Path(local).is_dir():
        return Base(model=local, **more)
    if recorded.get("local", False) or not recorded.get("model"):
        raise InputError(
            f"{folder}: its base model {recorded.get('model') or ''} was a local folder that is not here; give it with --base PATH"
        )
    return Base(model=recorded["model"], revision=recorded.get("revision"), **more)


def is_converted(folder: Path) -> bool:
    """Whether a folder holds, whole or damaged, a checkpoint with MxD layers."""
    try:
        return '"mxd_' in (folder / "config.json").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def belonging(folder: Path) -> list[str]:
    """The files that belong to a checkpoint, by path: all but hidden ones, what is of this machine only, the
    dashboard, for people, and the ONNX export, which is a model of its own."""
    paths = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in paths if belongs(path)]


def belongs(path: str) -> bool:
    parts = path.split("/")
    return parts[-1] != LOCAL and parts[0] not in (DASHBOARD, ONNX) and not any(part.startswith(".") for part in parts)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recorded_base(config: Any) -> dict[str, Any]:
    """What config.json says of the base model; empty where it says nothing."""
    recorded = (config.mxd or {}).get("base")
    return recorded if isinstance(recorded, dict) else {}


def check_base(converted: Any, original: Any, name: str) -> None:
    """Raises InputError where `original` is not the model that `converted` came from, by the hash of its tensors."""
    recorded = recorded_base(converted.config).get("sha256")
    if recorded is not None and model_sha256(original) != recorded:
        raise InputError(
            f"{name}: not the model that this checkpoint came from (the hash of its tensors differs); give the right one with --base"
        )


def original_of(folder: str | Path, converted: Any, override: str | None = None) -> Any:
    """The very base model that a loaded checkpoint came from, in its own dtype. override: as in `base_of`. Raises InputError."""
    settings = base_of(folder, override)
    original = load_base(settings, dtype="auto")
    check_base(converted, original, settings.model)
    return original


def check_new(output: Path, checkpoint: Path) -> None:
    """Raises InputError where something is at `output` already, or it lies inside the checkpoint that it is made of."""
    if checkpoint.resolve() in output.resolve().parents:
        raise InputError(f"{output}: lies inside the checkpoint; choose another folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: exists already; choose another folder")


@contextmanager
def new_folder(output: Path, checkpoint: Path) -> Iterator[Path]:
    """A folder beside `output` that becomes it at the end, and is gone where something goes wrong. Raises InputError as `check_new` does."""
    check_new(output, checkpoint)
    output.parent.mkdir(parents=True, exist_ok=True)
    with disk_guard(output), quiet(), tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        work = Path(scratch) / "new"
        work.mkdir()
        yield work
        if output.exists():
            output.rmdir()
        work.rename(output)


def read_local(folder: Path) -> dict[str, Any]:
    """What is kept of this machine beside a checkpoint, and is not published; empty where there is none or it can't be read."""
    try:
        content = json.loads((folder / LOCAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def same_outside_layers(converted: Any, base: Any) -> str | None:
    """None where every tensor outside the MxD layers is the base's, bit for bit; else the name of the first that is not."""
    mxd = converted.config.mxd
    paths = tuple(path for index in mxd["layers"] for path in configuration_mxd.mlp_paths(mxd, index))
    ours = {name: tensor for name, tensor in untied_tensors(converted).items() if not name.startswith(paths)}
    theirs = {name: tensor for name, tensor in untied_tensors(base).items() if not name.startswith(paths)}
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or ours[name].dtype != theirs[name].dtype or not ours[name].equal(theirs[name]):
            return name
    return None

"""A finished folder: read with errors that say what to do, and the base model that it came from."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mxd_convert.base import WEIGHTS_HELP, explained, quiet, untied_tensors
from mxd_convert.errors import InputError
from mxd_convert.modeling import configuration_mxd, modeling_mxd
from mxd_convert.recipe import Base

LOCAL = "mxd_local.json"
REPORT = "mxd_report.json"


def read_config(folder: str | Path) -> Any:
    """The config of a converted checkpoint. Raises InputError where the folder holds none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    path = folder / "config.json"
    if not path.is_file():
        unfinished = folder.name.endswith(".partial") or folder.with_name(f"{folder.name}.partial").is_dir()
        raise InputError(f"{folder}: no config.json, so not a checkpoint" + ("; its run has not finished" if unfinished else ""))
    with explained("its config.json", str(folder)):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not str(content.get("model_type")).startswith("mxd_"):
            kind = content.get("model_type") if isinstance(content, dict) else None
            raise InputError(f"{folder}: a {kind!r} model, not one with MxD layers; `mxd-convert run` makes those")
        architecture = str((content.get("architectures") or [""])[0])
        stem = architecture.removeprefix("Mxd").removesuffix("ForCausalLM")
        try:
            config_type = configuration_mxd.config_class(stem)
        except AttributeError:
            raise InputError(
                f"{folder}: this transformers has no {stem}Config, which the checkpoint needs; upgrade transformers"
            ) from None
        with quiet():
            return config_type.from_pretrained(folder)


def load_checkpoint(folder: str | Path, dtype: str = "auto") -> Any:
    """A converted model from its folder, in evaluation mode. Raises InputError for missing, damaged or ill-fitting weights."""
    config = read_config(folder)
    check_files(folder)
    stem = type(config).__name__.removeprefix("Mxd").removesuffix("Config")
    with explained("the checkpoint", str(folder)), quiet():
        model = getattr(modeling_mxd, f"Mxd{stem}ForCausalLM").from_pretrained(folder, dtype=dtype)
    return model.eval().requires_grad_(False)


def check_files(folder: str | Path) -> list[Path]:
    """The weight files of a checkpoint, each with a whole header and all the bytes that it promises. Raises InputError."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise InputError(f"{index}: not a readable index of weight files; download it or convert again") from None
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: missing; download it or convert again")
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise InputError(f"{file}: {WEIGHTS_HELP} ({error})") from None
    return files


def base_of(folder: str | Path, override: str | None = None) -> Base:
    """The base model that a checkpoint came from: `override`, the local path kept beside it, or the recorded id. Raises InputError."""
    folder = Path(folder)
    if override is not None:
        path = Path(override).expanduser()
        return Base(model=str(path.resolve()) if path.exists() else override)
    config = read_config(folder)
    recorded = (config.mxd or {}).get("base") or {}
    local = folder / LOCAL
    if local.is_file():
        path = Path(json.loads(local.read_text())["base"])
        if path.is_dir():
            return Base(model=str(path))
    if recorded.get("local", False) or not recorded.get("model"):
        raise InputError(
            f"{folder}: its base model {recorded.get('model') or ''} was a local folder that is not here; give it with --base PATH"
        )
    return Base(model=recorded["model"], revision=recorded.get("revision"))


def same_outside_layers(converted: Any, base: Any) -> str | None:
    """None where every tensor outside the MxD layers is the base's, bit for bit; else the name of the first that is not."""
    paths = tuple(f"{converted.config.mxd['mlp'].format(i=index)}." for index in converted.config.mxd["layers"])
    ours = {name: tensor for name, tensor in untied_tensors(converted).items() if not name.startswith(paths)}
    theirs = {name: tensor for name, tensor in untied_tensors(base).items() if not name.startswith(paths)}
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or ours[name].dtype != theirs[name].dtype or not ours[name].equal(theirs[name]):
            return name
    return None

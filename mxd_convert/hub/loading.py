"""`load`: a converted model from wherever it is, a folder or the Hub, whole or as a delta."""

from pathlib import Path
from typing import Any

from mxd_convert.checkpoint import load_checkpoint
from mxd_convert.deltas import is_delta, load_delta
from mxd_convert.errors import InputError
from mxd_convert.hub.client import check_name, client, explained, patiently

_NOT_TO_RUN = ["dashboard/*", "plots/*", "full/dashboard/*", "full/plots/*", "onnx/*", "full/onnx/*"]


def load(name: str | Path, base: str | None = None, revision: str | None = None, dtype: str = "auto") -> Any:
    """A converted model, in evaluation mode, from a folder or a repository on the Hub, which may hold a full checkpoint or a delta.

    base: of a delta, the base model, where not the recorded one. dtype: "auto" (as saved), "float32", ... The checkpoint's own code is not run;
    this package's is. Raises InputError.
    """
    folder = local_folder(name, revision)
    return load_delta(folder, base, dtype) if is_delta(folder) else load_checkpoint(folder, dtype)


def local_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: `name` itself, or the Hub's client's copy of the repository of that name. Raises InputError."""
    if Path(name).exists() or isinstance(name, Path):
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise InputError(f"{name}: no such folder")
    check_name(name)
    api = client()
    with explained(name, "downloading", revision):
        return Path(patiently(lambda: api.snapshot_download(name, revision=revision, ignore_patterns=_NOT_TO_RUN)))

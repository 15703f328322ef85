"""`load`: a converted model from wherever it is, a folder or the Hub, whole or as a delta."""

from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download

from mxd_convert.checkpoint.delta import is_delta, load_delta
from mxd_convert.checkpoint.read import LOCAL, load_checkpoint
from mxd_convert.errors import InputError
from mxd_convert.hub.client import check_name, client, explained, patiently
from mxd_convert.hub.content import wrong_files
from mxd_convert.hub.repository import files_of

_NOT_TO_RUN = ["dashboard/*", "plots/*", "full/dashboard/*", "full/plots/*", "onnx/*", "full/onnx/*", LOCAL, ".*"]


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
    options: dict[str, Any] = {"revision": revision, "ignore_patterns": _NOT_TO_RUN}
    if constants.HF_HUB_OFFLINE:
        with explained(name, "loading", revision):
            return Path(snapshot_download(name, local_files_only=True, **options))
    api = client()
    with explained(name, "downloading", revision):
        folder = Path(patiently(lambda: api.snapshot_download(name, **options)))
        files = {path: file for path, file in files_of(api, name, folder.name).items() if (folder / path).is_file()}
        if wrong_files(folder, files):  # of the client's copies: what it has once, it does not look at again
            folder = Path(patiently(lambda: api.snapshot_download(name, force_download=True, **options)))
            if wrong := wrong_files(folder, files):
                raise InputError(f"{name}: {wrong[0]} arrives with another hash than the Hub has of it")
    return folder

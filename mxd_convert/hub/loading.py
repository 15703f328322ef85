"""`load`: load a converted model from a folder or the Hub, from a full checkpoint or a delta."""

from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download

from mxd_convert.checkpoint.delta import is_delta, load_delta
from mxd_convert.checkpoint.read import LOCAL, load_checkpoint
from mxd_convert.errors import InputError
from mxd_convert.hub.client import check_name, client, hub_errors, with_retries
from mxd_convert.hub.content import wrong_files
from mxd_convert.hub.repository import files_of

# files that loading doesn't need
_NOT_TO_RUN = ["dashboard/*", "plots/*", "full/dashboard/*", "full/plots/*", "onnx/*", "full/onnx/*", LOCAL, ".*"]


def load(name: str | Path, base: str | None = None, revision: str | None = None, dtype: str = "auto") -> Any:
    """Load a converted model in evaluation mode. It is run by this package's code, not by code in the checkpoint.

    Args:
        name: folder, or Hub id, of a full checkpoint or a delta.
        base: the base model of a delta, if it is not the recorded one.
        revision: branch, tag or commit on the Hub.
        dtype: "auto" for the saved dtype, or a name such as "float32".

    Raises:
        InputError: if the checkpoint is missing or damaged, `base` is not its base model, or the Hub can't be reached.
    """
    folder = local_folder(name, revision)
    return load_delta(folder, base, dtype) if is_delta(folder) else load_checkpoint(folder, dtype)


def local_folder(name: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint: `name` itself, or the copy of that repository in the Hub client's cache.

    Raises InputError if there is neither a folder nor a repository of that name, or a file has another hash than on the Hub.
    """
    if Path(name).exists() or isinstance(name, Path):
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise InputError(f"{name}: no such folder")
    check_name(name)
    options: dict[str, Any] = {"revision": revision, "ignore_patterns": _NOT_TO_RUN}
    if constants.HF_HUB_OFFLINE:
        with hub_errors(name, "loading", revision):
            return Path(snapshot_download(name, local_files_only=True, **options))
    api = client()
    with hub_errors(name, "downloading", revision):
        folder = Path(with_retries(lambda: api.snapshot_download(name, **options)))
        files = {path: file for path, file in files_of(api, name, folder.name).items() if (folder / path).is_file()}
        if wrong_files(folder, files):  # the client doesn't check files that are in its cache
            folder = Path(with_retries(lambda: api.snapshot_download(name, force_download=True, **options)))
            if wrong := wrong_files(folder, files):
                raise InputError(f"{name}: {wrong[0]} arrived with another hash than on the Hub. Run the same command again.")
    return folder

"""`pull`: download a checkpoint from the Hub into a folder, completely or not at all."""

import functools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from mxd_convert.checkpoint.read import DELTA, belongs
from mxd_convert.errors import InputError, address_space, disk_guard
from mxd_convert.files import check_free_space, write_text
from mxd_convert.hub.client import check_name, client, hub_errors, with_retries
from mxd_convert.hub.content import wrong_files
from mxd_convert.hub.repository import files_of

MARK = ".pulling"  # file in an unfinished download with the repository's name


@dataclass(frozen=True)
class Pull:
    """A finished download.

    Attributes:
        output: the checkpoint's folder.
        repo_id: owner/name.
        commit: hash of the downloaded commit.
        files: size of each file in bytes, by path.
        already_there: whether the folder was complete before this call.
    """

    output: Path
    repo_id: str
    commit: str
    files: dict[str, int]
    already_there: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**vars(self), "output": str(self.output)}


def pull(repo_id: str, output: str | Path, revision: str | None = None) -> Pull:
    """Download a checkpoint or a delta, or resume an interrupted download.

    Files are downloaded into `<output>.partial`, which is renamed once all files have the Hub's hashes. No downloaded code runs.

    Args:
        repo_id: owner/name.
        output: the checkpoint's folder.
        revision: a branch, tag or commit.

    Raises:
        InputError: if the repository doesn't exist or has no checkpoint with MxD layers, a file has another hash than on the Hub,
            or `output` contains other files.
    """
    check_name(repo_id)
    folder = Path(output).expanduser().absolute()
    partial = folder.with_name(f"{folder.name}.partial")
    api = client()
    with hub_errors(repo_id, "downloading", revision), disk_guard(folder):
        commit = str(with_retries(lambda: api.model_info(repo_id, revision=revision)).sha)
        # a repository may have hidden and machine-local files, which don't belong to a checkpoint
        files = {path: file for path, file in files_of(api, repo_id, commit).items() if belongs(path)}
        sizes = {path: file.size for path, file in files.items()}
        if folder.exists() and any(folder.iterdir()):
            if wrong_files(folder, files):
                raise InputError(f"{output}: exists already and contains other files. Choose another folder.")
            (folder / MARK).unlink(missing_ok=True)
            return Pull(folder, repo_id, commit, sizes, True)
        _claim(partial, repo_id)
        _check_kind(api, repo_id, commit, files, partial)
        _check_room(partial, files)
        _download(api, repo_id, commit, files, partial)
        _check(partial, files, repo_id)
        _clear(partial, files)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
        (folder / MARK).unlink()
    return Pull(folder, repo_id, commit, sizes, False)


def _download(api: HfApi, repo_id: str, commit: str, files: Mapping[str, RepoFile], partial: Path) -> None:
    """Download the files, one after another if the process has a limit of address space.

    Under such a limit a thread of a pool may run out of memory while starting, and then hang without an error.
    """
    if address_space() is None:
        patterns = list(map(escape, files))
        with_retries(lambda: api.snapshot_download(repo_id, revision=commit, local_dir=partial, allow_patterns=patterns))
        return
    for path in files:
        with_retries(functools.partial(api.hf_hub_download, repo_id, path, revision=commit, local_dir=partial))


def _check(partial: Path, files: Mapping[str, RepoFile], repo_id: str) -> None:
    """Raise InputError if a file is missing or has another hash than on the Hub; a wrong file is deleted."""
    for path in wrong_files(partial, files):
        if not (partial / path).is_file():
            raise InputError(f"{repo_id}: {path} was not downloaded. Run the same command again to resume.")
        (partial / path).unlink()
        raise InputError(
            f"{repo_id}: {path} arrived with another hash than on the Hub and was deleted. Run the same command again."
        )


def _clear(partial: Path, files: Mapping[str, RepoFile]) -> None:
    """Remove everything that is not in the revision: the Hub client's cache, and files of another revision's download."""
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    for path in sorted(partial.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(partial).as_posix() not in files and path.name != MARK:
            path.unlink()


def _claim(partial: Path, repo_id: str) -> None:
    """Mark the unfinished folder as this download's, and remove the incomplete files of a killed one.

    Raises InputError if the folder is not an unfinished download of this repository.
    """
    mark = partial / MARK
    if partial.exists() and any(partial.iterdir()) and not (mark.is_file() and mark.read_text() == repo_id):
        raise InputError(
            f"{partial}: exists already and is not an unfinished download of {repo_id}. Move it, or choose another folder."
        )
    partial.mkdir(parents=True, exist_ok=True)
    write_text(mark, repo_id)
    for file in (partial / ".cache").rglob("*.incomplete"):
        file.unlink()


def _check_kind(api: HfApi, repo_id: str, commit: str, files: Mapping[str, RepoFile], partial: Path) -> None:
    """Raise InputError if the repository has no checkpoint with MxD layers. Only config.json is downloaded."""
    found: Any = None
    if DELTA in files:
        return
    if "config.json" in files:
        path = with_retries(lambda: api.hf_hub_download(repo_id, "config.json", revision=commit, local_dir=partial))
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError):
            found = None
    if not str(found).startswith("mxd_"):
        shutil.rmtree(partial)
        what = f"a {found} model" if found else "no readable config.json"
        raise InputError(
            f"{repo_id}: contains {what}, not a checkpoint with MxD layers. `mxd-convert list` shows such checkpoints."
        )


def _check_room(partial: Path, files: Mapping[str, RepoFile]) -> None:
    """Raise InputError if the disk has too little space for the remaining files."""
    need = sum(file.size for path, file in files.items() if not (partial / path).is_file())
    check_free_space(partial, need, f"{partial}: the rest of the download")

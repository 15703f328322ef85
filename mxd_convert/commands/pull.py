"""`pull`: a checkpoint from the Hub into a folder, whole or not at all."""

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
from mxd_convert.files import write_text
from mxd_convert.hub.client import check_name, client, explained, patiently
from mxd_convert.hub.content import wrong_files
from mxd_convert.hub.repository import files_of

MARK = ".pulling"  # in an unfinished folder: the repository that it comes from


@dataclass(frozen=True)
class Pull:
    """What was downloaded. files: bytes, by path. already_there: the folder held all of it before."""

    output: Path
    repo_id: str
    commit: str
    files: dict[str, int]
    already_there: bool

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "output": str(self.output)}


def pull(repo_id: str, output: str | Path, revision: str | None = None) -> Pull:
    """Downloads a checkpoint with MxD layers, or goes on with a download that was cut off; each file is held against the Hub's hash of it.

    Everything arrives in `<output>.partial`, which gets its name when it is whole. Nothing that arrives is run. Raises InputError where there is
    no such repository, it holds no checkpoint with MxD layers, a file is not what the Hub says it is, or `output` holds something else.
    """
    check_name(repo_id)
    folder = Path(output).expanduser().absolute()
    partial = folder.with_name(f"{folder.name}.partial")
    api = client()
    with explained(repo_id, "downloading", revision), disk_guard(folder):
        commit = str(patiently(lambda: api.model_info(repo_id, revision=revision)).sha)
        # what is hidden, and what is of one machine only, is no part of a checkpoint, whoever put it there
        files = {path: file for path, file in files_of(api, repo_id, commit).items() if belongs(path)}
        sizes = {path: file.size for path, file in files.items()}
        if folder.exists() and any(folder.iterdir()):
            if wrong_files(folder, files):
                raise InputError(f"{output}: is there and holds something else; choose another folder")
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
    """Download the files; where the process has a limit of address space, one after another.

    A pool's thread that runs out of memory as it starts never ends, and never says so.
    """
    if address_space() is None:
        patterns = list(map(escape, files))
        patiently(lambda: api.snapshot_download(repo_id, revision=commit, local_dir=partial, allow_patterns=patterns))
        return
    for path in files:
        patiently(functools.partial(api.hf_hub_download, repo_id, path, revision=commit, local_dir=partial))


def _check(partial: Path, files: Mapping[str, RepoFile], repo_id: str) -> None:
    """Raises InputError where a file is not there, or not what the Hub says it is; then it is thrown away."""
    for path in wrong_files(partial, files):
        if not (partial / path).is_file():
            raise InputError(f"{repo_id}: {path} has not arrived; give the same command again: it goes on where it stopped")
        (partial / path).unlink()
        raise InputError(
            f"{repo_id}: {path} arrived with another hash than the Hub has of it, and was thrown away; give the same command again"
        )


def _clear(partial: Path, files: Mapping[str, RepoFile]) -> None:
    """Takes away what is not the revision's: the client's notes, and files of another revision that was begun before."""
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    for path in sorted(partial.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(partial).as_posix() not in files and path.name != MARK:
            path.unlink()


def _claim(partial: Path, repo_id: str) -> None:
    """Makes the unfinished folder this download's, without what an earlier one that was killed can't use any more."""
    mark = partial / MARK
    if partial.exists() and any(partial.iterdir()) and not (mark.is_file() and mark.read_text() == repo_id):
        raise InputError(
            f"{partial}: is in the way, and is no unfinished download of {repo_id}; move it away, or choose another folder"
        )
    partial.mkdir(parents=True, exist_ok=True)
    write_text(mark, repo_id)
    for file in (partial / ".cache").rglob("*.incomplete"):
        file.unlink()


def _check_kind(api: HfApi, repo_id: str, commit: str, files: Mapping[str, RepoFile], partial: Path) -> None:
    """Before gigabytes are downloaded: whether it is a checkpoint of ours."""
    found: Any = None
    if DELTA in files:
        return
    if "config.json" in files:
        path = patiently(lambda: api.hf_hub_download(repo_id, "config.json", revision=commit, local_dir=partial))
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError):
            found = None
    if not str(found).startswith("mxd_"):
        shutil.rmtree(partial)
        what = f"a {found} model" if found else "no readable config.json"
        raise InputError(f"{repo_id}: holds {what}, not a checkpoint with MxD layers; `mxd-convert list` shows those")


def _check_room(partial: Path, files: Mapping[str, RepoFile]) -> None:
    need = sum(file.size for path, file in files.items() if not (partial / path).is_file())
    free = shutil.disk_usage(partial).free
    if need > free:
        raise InputError(f"{partial}: {need / 2**20:,.0f} MiB are left to download and {free / 2**20:,.0f} are free; free some")

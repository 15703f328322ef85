"""What of a checkpoint's folder is published, and how it compares with what a repository holds."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from mxd_convert.checkpoint.read import REPORT, belonging
from mxd_convert.report.card import CARD, REPOSITORY

ATTRIBUTES = ".gitattributes"  # the Hub's own
# what goes where the folder has not got it: weights of another layout, which would be loaded in place of these, and what is said of others
_STALE = re.compile(
    rf"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|layers\.safetensors|{re.escape(REPORT)}|(full/)?plots/\w+\.png"
)


@dataclass(frozen=True)
class Local:
    """A file as it goes to the Hub. source: where it is, or its content."""

    path: str
    source: Path | bytes

    @property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def is_in(self, remote: RepoFile) -> bool:
        """Whether the repository's file has the same content, by the hash that the Hub keeps: SHA-256 of large files, git's of others."""
        if remote.size != self.size:
            return False
        return remote.lfs.sha256 == self._sha256 if remote.lfs is not None else remote.blob_id == self._git_sha1

    @cached_property
    def _sha256(self) -> str:
        if isinstance(self.source, bytes):
            return hashlib.sha256(self.source).hexdigest()
        with self.source.open("rb") as file:
            return sha_fileobj(file).hex()

    @cached_property
    def _git_sha1(self) -> str:
        return git_hash(self.source if isinstance(self.source, bytes) else self.source.read_bytes())


def to_publish(folder: Path, repo_id: str) -> list[Local]:
    """The files of a checkpoint's folder that are published, by path.

    The card is published with the repository's name in its examples, also where it was pulled from another; the folder's own is left as it is.
    """
    found = []
    for path in belonging(folder):
        source: Path | bytes = folder / path
        if path == CARD:
            source = _named((folder / path).read_text(encoding="utf-8"), repo_id).encode()
        found.append(Local(path, source))
    return found


def _named(card: str, repo_id: str) -> str:
    earlier = re.search(r'^name = "([\w.-]+/[\w.-]+)"$', card, re.MULTILINE)
    if earlier is not None:
        card = re.sub(r"```.*?```", lambda block: block[0].replace(earlier[1], repo_id), card, flags=re.DOTALL)
    return card.replace(REPOSITORY, repo_id)


@dataclass(frozen=True)
class Difference:
    """What a push does to a repository. Each by path, with sizes in bytes."""

    added: dict[str, int]
    changed: dict[str, int]
    removed: dict[str, int]
    left: dict[str, int]  # in the repository only, and not touched
    same: dict[str, int]

    @property
    def none(self) -> bool:
        return not (self.added or self.changed or self.removed)

    def to_dict(self) -> dict[str, Any]:
        return {name: dict(getattr(self, name)) for name in ("added", "changed", "removed", "left", "same")}


def compare(local: list[Local], remote: Mapping[str, RepoFile], replace: bool) -> Difference:
    """replace: whether what only the repository has is removed; without it, only weights of another layout and an earlier report are."""
    ours = {file.path: file for file in local}
    same = {path: file.size for path, file in ours.items() if path in remote and file.is_in(remote[path])}
    only_there = {path: file.size for path, file in remote.items() if path not in ours and path != ATTRIBUTES}
    removed = {path: size for path, size in only_there.items() if replace or _STALE.fullmatch(path)}
    return Difference(
        {path: file.size for path, file in ours.items() if path not in remote},
        {path: file.size for path, file in ours.items() if path in remote and path not in same},
        removed,
        {path: size for path, size in only_there.items() if path not in removed},
        same,
    )


def wrong_files(folder: Path, files: Mapping[str, RepoFile]) -> list[str]:
    """The files that a folder lacks or holds with another content than the repository."""
    here = {path: Local(path, folder / path) for path in files if (folder / path).is_file()}
    return sorted(path for path, file in files.items() if path not in here or not here[path].is_in(file))

"""The published files of a checkpoint's folder, and their comparison with a repository."""

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

ATTRIBUTES = ".gitattributes"  # managed by the Hub
# files of an earlier checkpoint that a push removes: weights that would be loaded instead of the new ones, their report and plots
_STALE = re.compile(
    rf"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|layers\.safetensors|{re.escape(REPORT)}|(full/)?plots/\w+\.png"
)


@dataclass(frozen=True)
class Local:
    """A file to publish. path: in the repository. source: a local file, or the content itself."""

    path: str
    source: Path | bytes

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def is_in(self, remote: RepoFile) -> bool:
        """Return whether the repository's file has the same content.

        The Hub stores SHA-256 hashes of large files and git's hashes of others.
        """
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
    """Return the files of a checkpoint's folder to publish, sorted by path.

    The published card has the repository's name in its examples, even if the checkpoint was pulled from another repository.
    The card in the folder is not changed.
    """
    found = []
    for path in belonging(folder):
        source: Path | bytes = folder / path
        if path == CARD:
            source = _named((folder / path).read_text(encoding="utf-8"), repo_id).encode()
        found.append(Local(path, source))
    return found


def _named(card: str, repo_id: str) -> str:
    """Return the card with `repo_id` in its examples."""
    earlier = re.search(r'^name = "([\w.-]+/[\w.-]+)"$', card, re.MULTILINE)
    if earlier is not None:
        card = re.sub(r"```.*?```", lambda block: block[0].replace(earlier[1], repo_id), card, flags=re.DOTALL)
    return card.replace(REPOSITORY, repo_id)


@dataclass(frozen=True)
class Difference:
    """Changes of a push to a repository. Each field has sizes in bytes, by path."""

    added: dict[str, int]
    changed: dict[str, int]
    removed: dict[str, int]
    left: dict[str, int]  # only in the repository, and kept
    same: dict[str, int]

    @property
    def none(self) -> bool:
        """Whether the push would change nothing."""
        return not (self.added or self.changed or self.removed)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {name: dict(getattr(self, name)) for name in ("added", "changed", "removed", "left", "same")}


def compare(local: list[Local], remote: Mapping[str, RepoFile], replace: bool) -> Difference:
    """Return the changes that make a repository contain the local files.

    Args:
        local: the files to publish.
        remote: the repository's files, by path.
        replace: remove all other files. Otherwise only weights of another layout and an earlier checkpoint's report and plots are
            removed.
    """
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
    """Return the paths of the files that are missing in the folder or differ from the repository's."""
    here = {path: Local(path, folder / path) for path in files if (folder / path).is_file()}
    return sorted(path for path, file in files.items() if path not in here or not here[path].is_in(file))

"""A repository on the Hub before a push: its files, and whether the push may change them."""

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from mxd_convert.checkpoint.read import DELTA
from mxd_convert.errors import InputError
from mxd_convert.hub.client import with_retries
from mxd_convert.hub.content import ATTRIBUTES

MAIN = "main"
_MARKS = (DELTA, "config.json")  # files that identify a checkpoint, in order of preference


@dataclass(frozen=True)
class Repository:
    """A repository before a push.

    Attributes:
        repo_id: owner/name.
        head: commit of the revision, or of main if the revision doesn't exist. None if the repository doesn't exist.
        has_revision: whether the revision exists.
        private: whether the repository is private.
        files: the files at `head`, by path.
    """

    repo_id: str
    head: str | None
    has_revision: bool
    private: bool
    files: dict[str, RepoFile]

    @classmethod
    def find(cls, api: HfApi, repo_id: str, revision: str | None) -> "Repository":
        """Return the state of a repository, which may not exist."""
        try:
            found = with_retries(lambda: api.model_info(repo_id))
        except RepositoryNotFoundError:
            return cls(repo_id, None, False, False, {})
        has_revision = True
        if revision not in (None, MAIN):
            try:
                found = with_retries(lambda: api.model_info(repo_id, revision=revision))
            except RevisionNotFoundError:
                has_revision = False
        return cls(repo_id, found.sha, has_revision, bool(found.private), files_of(api, repo_id, str(found.sha)))

    def check(self, api: HfApi, folder: Path, private: bool, replace: bool) -> None:
        """Raise InputError if the repository can't take a push.

        Args:
            api: the client.
            folder: the checkpoint to publish. The repository may be empty or contain another version of it.
            private: whether the repository must be private.
            replace: accept any content.
        """
        if self.head is not None and private and not self.private:
            raise InputError(
                f"--private: {self.repo_id} exists already and is public. Change that in its settings on the Hub, or remove --private."
            )
        content = sorted(path for path in self.files if path != ATTRIBUTES)
        if not content or replace:
            return
        theirs = next((self._identity(api, name) for name in _MARKS if name in content), None)
        ours = identity(folder)
        if theirs is not None and theirs.same(ours):
            return
        what = (
            theirs.description(ours)
            if theirs is not None
            else f"{content[0]}" + (f" and {len(content) - 1} more" if content[1:] else "")
        )
        raise InputError(
            f"{self.repo_id}: already contains something else ({what}). Choose another name, or use --replace to remove all its other"
            " files (they remain in its history)."
        )

    def _identity(self, api: HfApi, name: str) -> "Identity":
        """Return the identity of the repository's content, read from the file `name`."""
        return _read(Path(with_retries(lambda: api.hf_hub_download(self.repo_id, name, revision=self.head))))


def files_of(api: HfApi, repo_id: str, revision: str) -> dict[str, RepoFile]:
    """Return the files of a revision by path, with sizes and hashes. Raises InputError if a path points out of the repository."""
    entries = with_retries(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=revision)))
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    for path in files:
        if path.startswith("/") or ".." in path.split("/"):
            raise InputError(f"{repo_id}: the path {path!r} points out of the repository. None of its files was used.")
    return files


@dataclass(frozen=True)
class Identity:
    """The identity of a checkpoint.

    Two versions of a checkpoint have the same base model, the same kinds and shapes of layers, and the same form (full or delta).
    """

    kind: str  # config.json's model_type, or "delta"
    base: str | None  # SHA-256 of the base model's tensors; None if not recorded
    layers: str  # kinds and shapes, as JSON

    def same(self, other: "Identity") -> bool:
        """Return whether both are versions of one checkpoint. False if no base model is recorded."""
        return self == other and self.base is not None

    def description(self, ours: "Identity") -> str:
        """Return how it differs from `ours`, for an error message."""
        if self.kind != ours.kind:
            return "a delta" if self.kind == "delta" else f"a model of type {self.kind}"
        return (
            "a conversion of another base"
            if self.base != ours.base or self.base is None
            else "a conversion with other layers or settings"
        )


def identity(folder: Path) -> Identity:
    """Return the identity of a folder's checkpoint or delta."""
    return _read(next(folder / name for name in _MARKS if (folder / name).is_file()))


def _read(file: Path) -> Identity:
    """Return the identity in a config.json or a delta's file; of kind "unreadable" if it is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        holder = content if file.name == DELTA else content.get("mxd") or {}
        kind = "delta" if file.name == DELTA else str(content.get("model_type"))
        return Identity(kind, (holder.get("base") or {}).get("sha256"), json.dumps(holder.get("layers"), sort_keys=True))
    except (ValueError, AttributeError):
        return Identity("unreadable", None, "")

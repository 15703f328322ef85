"""A repository on the Hub as it stands before a push: what it holds, and whether that may be touched."""

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from mxd_convert.checkpoint.read import DELTA
from mxd_convert.errors import InputError
from mxd_convert.hub.client import patiently
from mxd_convert.hub.content import ATTRIBUTES

MAIN = "main"
_MARKS = (DELTA, "config.json")


@dataclass(frozen=True)
class Repository:
    """head: the commit at the revision, or at main where that is not there yet; None: no such repository. files: what is there, by path."""

    repo_id: str
    head: str | None
    has_revision: bool
    private: bool
    files: dict[str, RepoFile]

    @classmethod
    def find(cls, api: HfApi, repo_id: str, revision: str | None) -> "Repository":
        try:
            found = patiently(lambda: api.model_info(repo_id))
        except RepositoryNotFoundError:
            return cls(repo_id, None, False, False, {})
        has_revision = True
        if revision not in (None, MAIN):
            try:
                found = patiently(lambda: api.model_info(repo_id, revision=revision))
            except RevisionNotFoundError:
                has_revision = False
        return cls(repo_id, found.sha, has_revision, bool(found.private), files_of(api, repo_id, str(found.sha)))

    def check(self, api: HfApi, folder: Path, private: bool, replace: bool) -> None:
        """Raises InputError where it holds something else than a version of `folder`, or is public where it should not be."""
        if self.head is not None and private and not self.private:
            raise InputError(
                f"--private: {self.repo_id} is there already, and public; change that in its settings on the Hub, or leave --private out"
            )
        content = sorted(path for path in self.files if path != ATTRIBUTES)
        if not content or replace:
            return
        theirs = next((self._identity(api, name) for name in _MARKS if name in content), None)
        ours = identity(folder)
        if theirs is not None and theirs.same(ours):
            return
        what = (
            theirs.words(ours)
            if theirs is not None
            else f"{content[0]}" + (f" and {len(content) - 1} more" if content[1:] else "")
        )
        raise InputError(
            f"{self.repo_id}: holds something else ({what}); choose another name, or --replace to let it hold this checkpoint and nothing"
            " else (what was there stays in its history)"
        )

    def _identity(self, api: HfApi, name: str) -> "Identity":
        return _read(Path(patiently(lambda: api.hf_hub_download(self.repo_id, name, revision=self.head))))


def files_of(api: HfApi, repo_id: str, revision: str) -> dict[str, RepoFile]:
    """What a revision holds, by path, with sizes and hashes. Raises InputError where a path leads out of the repository."""
    entries = patiently(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=revision)))
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    for path in files:
        if path.startswith("/") or ".." in path.split("/"):
            raise InputError(f"{repo_id}: has a file called {path!r}, which no repository should; nothing of it was used")
    return files


@dataclass(frozen=True)
class Identity:
    """What a folder or repository is a version of: a conversion of one base into layers of certain shapes, whole or as a delta."""

    kind: str  # config.json's model_type, or "delta"
    base: str | None  # hash of the base's tensors
    layers: str  # kinds and shapes

    def same(self, other: "Identity") -> bool:
        return self == other and self.base is not None

    def words(self, ours: "Identity") -> str:
        """What it is, to one who would publish `ours`."""
        if self.kind != ours.kind:
            return "a delta" if self.kind == "delta" else f"a model of type {self.kind}"
        return (
            "a conversion of another base"
            if self.base != ours.base or self.base is None
            else "a conversion with other layers or settings"
        )


def identity(folder: Path) -> Identity:
    return _read(next(folder / name for name in _MARKS if (folder / name).is_file()))


def _read(file: Path) -> Identity:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        holder = content if file.name == DELTA else content.get("mxd") or {}
        kind = "delta" if file.name == DELTA else str(content.get("model_type"))
        return Identity(kind, (holder.get("base") or {}).get("sha256"), json.dumps(holder.get("layers"), sort_keys=True))
    except (ValueError, AttributeError):
        return Identity("unreadable", None, "")

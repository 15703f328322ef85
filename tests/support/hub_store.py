"""Storage of the Hub on loopback: repositories with one commit per change, with git's names."""

import hashlib
import json
from dataclasses import dataclass, field

LARGE = 2048  # bytes from which any file is stored as a large one, so that a small checkpoint causes many requests
LARGE_NAMES = (".safetensors", ".png", ".gz")


def is_large(path: str, size: int) -> bool:
    return size >= LARGE or path.endswith(LARGE_NAMES)


@dataclass(frozen=True)
class Blob:
    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @property
    def oid(self) -> str:
        """Return git's object name; for a large file, that of its pointer."""
        content = self.pointer if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Commit:
    oid: str
    files: dict[str, Blob]
    title: str


@dataclass
class Repo:
    name: str
    private: bool = False
    refs: dict[str, list[Commit]] = field(default_factory=dict)  # of each branch or pull request, oldest first
    pulls: list[str] = field(default_factory=list)  # titles of pull requests

    def commit(self, ref: str, files: dict[str, Blob], title: str) -> Commit:
        history = self.refs.setdefault(ref, [])
        content = [self.name, ref, len(history), title, sorted((path, blob.oid) for path, blob in files.items())]
        made = Commit(hashlib.sha1(json.dumps(content).encode()).hexdigest(), files, title)
        history.append(made)
        return made

    def find(self, revision: str) -> Commit | None:
        if revision in self.refs:
            return self.refs[revision][-1]
        return next((commit for history in self.refs.values() for commit in history if commit.oid == revision), None)

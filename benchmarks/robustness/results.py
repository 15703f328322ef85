"""What a command made, compared with what undisturbed runs of it made; and what it left lying about."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Result = dict[str, str]  # of a file or, in a JSON file, of a value: what it holds

TIMES = {"cost", "seconds", "tokens_per_second", "resumed", "stages"}  # keys that tell how a run went, not what came out


def result_of(folder: Path, out: bytes = b"") -> Result:
    """Return what is in the output of a command: hashes of files, values of JSON files. out: its stdout, where that is the result."""
    found: Result = {}
    with contextlib.suppress(ValueError):
        found |= dict(_leaves("stdout", json.loads(out)))
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if path.is_file():
            found |= dict(_values(path, path.relative_to(folder).as_posix()))
    return found


def _values(path: Path, name: str) -> Iterator[tuple[str, str]]:
    content = path.read_bytes()
    yield f"{name} is there", "yes"
    if path.suffix in (".json", ".jsonl"):
        with contextlib.suppress(ValueError):
            parsed = [json.loads(line) for line in content.splitlines()] if path.suffix == ".jsonl" else json.loads(content)
            yield from _leaves(name, parsed)
            return
    yield name, hashlib.sha256(content).hexdigest()


def _leaves(name: str, content: Any) -> Iterator[tuple[str, str]]:
    if isinstance(content, dict | list):
        entries: Iterable[tuple[Any, Any]] = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in entries:
            if key not in TIMES:
                yield from _leaves(f"{name} {key}", value)
    else:
        yield name, repr(content)


def stable(results: list[Result]) -> Result:
    """Return what is the same in all results of undisturbed runs; what differs there (times) is compared by nobody."""
    first, *others = results
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def differences(expected: Result, results: list[Result], result: Result) -> list[str]:
    """Return what is missing, other, or too much in a result."""
    known = set().union(*results)
    other = [key for key, value in expected.items() if result.get(key) != value]
    return other + [f"{key}, which is new" for key in sorted(result.keys() - known)]


def leftovers(folder: Path, allowed: Iterable[str]) -> list[str]:
    """Return what lies in a folder besides what is allowed there, and every hidden or temporary file below."""
    allowed = set(allowed)
    beside = [path.name for path in folder.iterdir() if path.name not in allowed]
    below = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if (path.name.startswith(".") or path.name.endswith(".tmp")) and not _unfinished(path.relative_to(folder), allowed)
    ]
    return sorted({*beside, *below})


def _unfinished(path: Path, allowed: set[str]) -> bool:
    """Whether it lies in the work folder of a command that resumes."""
    return any(part.endswith(".partial") for part in path.parts[:-1]) and path.parts[0] in allowed

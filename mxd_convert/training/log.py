"""training_log.jsonl: a line a log step. Every group of layers that is trained in one pass has its own; the run's is made of them."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mxd_convert.errors import disk_guard
from mxd_convert.files import replacing, write_text

NAME = "training_log.jsonl"


def append_line(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_guard(path.parent), path.open("a") as log:
        log.write(json.dumps(line) + "\n")


def lines_of(path: Path) -> Iterable[dict[str, Any]]:
    """Yield the whole lines of a log."""
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            line["step"]
        except (ValueError, KeyError, TypeError):
            continue
        yield line


def log_extent(path: Path) -> dict[str, Any]:
    """Return the bytes that a log has and their SHA-256, once they are on the disk: what a saved state keeps of it."""
    if not path.is_file():
        return {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    with path.open("rb") as log:
        os.fsync(log.fileno())
        digest = hashlib.file_digest(log, "sha256").hexdigest()
        return {"bytes": log.tell(), "sha256": digest}


def is_whole(path: Path, extent: Mapping[str, Any]) -> bool:
    """Whether a log still begins with what it held when its extent was taken."""
    return hashlib.sha256(_beginning(path, extent["bytes"])).hexdigest() == extent["sha256"]


def cut_log(path: Path, extent: Mapping[str, Any]) -> None:
    """Drop what came after the extent was taken: lines of steps that will be done again, and one that a kill has cut short."""
    if path.is_file() and path.stat().st_size > extent["bytes"]:
        kept = _beginning(path, extent["bytes"])
        with replacing(path) as temporary:
            temporary.write_bytes(kept)


def _beginning(path: Path, size: int) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as log:
        return log.read(size)


def split_log(path: Path, part: Path, indices: list[int]) -> None:
    """Write a log of some of a group's layers, which alone would have been quicker in proportion."""
    wanted = {str(index) for index in indices}
    lines = []
    for line in lines_of(path) if path.is_file() else ():
        layers = {index: figures for index, figures in line["layers"].items() if index in wanted}
        rate = round(line["tokens_per_second"] * len(line["layers"]) / len(layers), 1)
        lines.append({**line, "tokens_per_second": rate, "layers": layers})
    _write(part, lines)


def merge_logs(groups: list[list[Path]], path: Path, then: Iterable[dict[str, Any]] = ()) -> None:
    """Write one log out of those of all groups, with the layers of a step in one line. groups: by process, which ran side by side.

    then: lines to follow.
    """
    merged: dict[int, dict[str, Any]] = {}
    for logs in groups:
        seconds: dict[int, float] = {}  # for a token, of this process's groups one after the other
        for log in logs:
            for line in lines_of(log):
                step = line["step"]
                seconds[step] = seconds.get(step, 0.0) + 1.0 / max(line["tokens_per_second"], 1e-9)
                whole = merged.setdefault(step, {**line, "layers": {}, "tokens_per_second": float("inf")})
                whole["layers"] |= line["layers"]
        for step, each in seconds.items():
            merged[step]["tokens_per_second"] = round(min(merged[step]["tokens_per_second"], 1.0 / each), 1)
    for line in merged.values():
        line["layers"] = {index: line["layers"][index] for index in sorted(line["layers"], key=int)}
    _write(path, [*(merged[step] for step in sorted(merged)), *then])


def _write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

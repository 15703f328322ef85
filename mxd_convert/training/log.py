"""training_log.jsonl: one line per log step. Each group of layers has its own log; the log of the run merges them."""

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
    """Append one line to a log. Raises InputError if the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_guard(path.parent), path.open("a") as log:
        log.write(json.dumps(line) + "\n")


def lines_of(path: Path) -> Iterable[dict[str, Any]]:
    """Yield the lines of a log, skipping those that are cut off or damaged."""
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            line["step"]
        except (ValueError, KeyError, TypeError):
            continue
        yield line


def log_extent(path: Path) -> dict[str, Any]:
    """Return the size of a log in bytes and its SHA-256, as a saved state records them. The log is synced to disk first."""
    if not path.is_file():
        return {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    with path.open("rb") as log:
        os.fsync(log.fileno())
        digest = hashlib.file_digest(log, "sha256").hexdigest()
        return {"bytes": log.tell(), "sha256": digest}


def is_whole(path: Path, extent: Mapping[str, Any]) -> bool:
    """Return whether a log still begins with the bytes that `extent` describes."""
    return hashlib.sha256(_beginning(path, extent["bytes"])).hexdigest() == extent["sha256"]


def cut_log(path: Path, extent: Mapping[str, Any]) -> None:
    """Truncate a log to `extent`: later lines belong to steps that will be repeated, and the last may be cut off."""
    if path.is_file() and path.stat().st_size > extent["bytes"]:
        kept = _beginning(path, extent["bytes"])
        with replacing(path) as temporary:
            temporary.write_bytes(kept)


def _beginning(path: Path, size: int) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as log:
        return log.read(size)


def split_log(path: Path, target: Path, indices: list[int]) -> None:
    """Write the lines of some of a group's layers to `target`, with tokens/s scaled up in proportion to the number of layers."""
    wanted = {str(index) for index in indices}
    lines = []
    for line in lines_of(path) if path.is_file() else ():
        layers = {index: figures for index, figures in line["layers"].items() if index in wanted}
        rate = round(line["tokens_per_second"] * len(line["layers"]) / len(layers), 1)
        lines.append({**line, "tokens_per_second": rate, "layers": layers})
    _write(target, lines)


def merge_logs(groups: list[list[Path]], path: Path, then: Iterable[dict[str, Any]] = ()) -> None:
    """Merge the logs of all groups into one, with all layers of a step in one line.

    groups: the logs of each process, in the order in which it trained them; the processes ran in parallel. then: lines to append.
    """
    merged: dict[int, dict[str, Any]] = {}
    for logs in groups:
        seconds: dict[int, float] = {}  # per token, by step, summed over this process's groups
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

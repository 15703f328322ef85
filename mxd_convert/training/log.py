"""training_log.jsonl: a line a log step. Every group of layers that is trained in one pass has its own; the run's is made of them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mxd_convert.errors import disk_guard

NAME = "training_log.jsonl"


def append_line(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_guard(path.parent), path.open("a") as log:
        log.write(json.dumps(line) + "\n")


def lines_of(path: Path) -> Iterable[dict[str, Any]]:
    """The whole lines of a log."""
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
            line["step"]
        except (ValueError, KeyError, TypeError):
            continue
        yield line


def cut_log(path: Path, step: int) -> None:
    """Drops the lines of steps after `step`, which will be done again, and one that a kill has cut short."""
    if path.is_file():
        kept = "".join(json.dumps(line) + "\n" for line in lines_of(path) if line["step"] <= step)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(kept)
        temporary.replace(path)


def split_log(path: Path, part: Path, indices: list[int]) -> None:
    """Writes a log of some of a group's layers, which alone would have been quicker in proportion."""
    wanted = {str(index) for index in indices}
    for line in lines_of(path) if path.is_file() else ():
        layers = {index: figures for index, figures in line["layers"].items() if index in wanted}
        rate = round(line["tokens_per_second"] * len(line["layers"]) / len(layers), 1)
        append_line(part, {**line, "tokens_per_second": rate, "layers": layers})


def merge_logs(groups: list[list[Path]], path: Path) -> None:
    """Writes one log out of those of all groups, with the layers of a step in one line. groups: by process, which ran side by side."""
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
    with disk_guard(path.parent), path.open("w") as file:
        for step in sorted(merged):
            layers = merged[step]["layers"]
            line = {**merged[step], "layers": {index: layers[index] for index in sorted(layers, key=int)}}
            file.write(json.dumps(line) + "\n")

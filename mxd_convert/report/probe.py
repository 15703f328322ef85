"""The files of linear probes: probe.json with all results, two tables as CSV, and the plot."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mxd_convert.errors import InputError
from mxd_convert.files import check_output, move_into_place, read_json, temporary_sibling, write_csv, write_json
from mxd_convert.report.probe_plot import plot_probe

PROBE = "probe.json"


def probe_folder(output: str | Path | None, checkpoint: Path, data: Path) -> Path:
    """Return the output folder: `output`, or by default `<checkpoint>-probe-<data>` next to the checkpoint.

    Raises InputError if it has other content or can't be written. Call it before any work is done.
    """
    if output is None:
        stem = re.sub(r"(\.jsonl|\.parquet)?(\.gz)?$", "", data.name)
        whole = checkpoint.expanduser().resolve()
        target = whole.parent / f"{whole.name}-probe-{re.sub(r'[^A-Za-z0-9_-]+', '_', stem).strip('_') or 'data'}"
        if not checkpoint.is_absolute() and checkpoint.name:
            target = checkpoint.parent / target.name
    else:
        target = Path(output).expanduser()
    if target.exists() and not (target.is_dir() and (is_probe(target) or not any(target.iterdir()))):
        raise InputError(f"--output {target}: exists already and is not the result of a probe. Choose another folder.")
    check_output(target)
    above = next(folder for folder in target.resolve().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"--output {target}: {above} can't be written to. Choose another folder.")
    return target


@contextmanager
def finished_probe(target: Path) -> Iterator[Path]:
    """Yield the path of a folder for the caller to create. It replaces `target` once the block has succeeded."""
    with temporary_sibling(target) as scratch:
        yield scratch / "probe"
        move_into_place(scratch / "probe", target, scratch)


def write_probe(folder: Path, content: dict[str, Any]) -> None:
    """Create `folder` and write probe.json, probe.csv, top_experts.csv and probe.png into it."""
    folder.mkdir()
    _write_rows(folder / "probe.csv", content["results"])
    _write_rows(folder / "top_experts.csv", content["top_experts"])
    plot_probe(folder / "probe.png", content)
    write_json(folder / PROBE, content)


def is_probe(folder: Path) -> bool:
    """Return whether a folder was written by `write_probe`."""
    try:
        content = read_json(folder / PROBE)
    except InputError:
        return False
    return isinstance(content, dict) and {"checkpoint", "results", "top_experts"} <= content.keys()


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    short = ({key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()} for row in rows)
    write_csv(path, list(rows[0]), short)

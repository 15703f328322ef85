"""Folders of results: their files, the data of a dashboard, the entries of a cache, a card made from a report."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

NASTY = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "<!-- ]]> & \" ' \\ \u2028 \u2029 \u202e &lt;b&gt; <b>bold</b>",
)
"""Text that would be markup or end a script."""


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file, by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def content_hash(folder: Path) -> str:
    """Hash the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for name, content in sorted(contents(folder).items()):
        digest.update(f"{name}\0".encode() + content)
    return digest.hexdigest()


def nothing_left(folder: Path) -> bool:
    """Return whether neither the folder nor a temporary one beside it exists."""
    return not folder.exists() and not [file for file in folder.parent.iterdir() if file.name.startswith(f".{folder.name}")]


def data_of(folder: Path, name: str):
    """Return what a data file of a dashboard gives to its page."""
    match = re.fullmatch(rf'MXD\.give\("{name}",(.*)\);\n', (folder / f"{name}.js").read_text(encoding="ascii"))
    return json.loads(match[1])


def experts_of(folder: Path, layer: int) -> list[dict]:
    """Return what a dashboard holds of every expert of a layer."""
    number = len(list((folder / "data" / str(layer)).glob("experts-*.js")))
    return [expert for shard in range(number) for expert in data_of(folder, f"data/{layer}/experts-{shard}")]


def cache_of(folder: Path):
    """Read a module's cache of activations, and check its format.

    Returns: entries (block, position, expert) -> activation; the tokens; the range of experts of every file.
    """
    entries, tokens, ranges = {}, None, []
    for path in sorted(folder.glob("*.safetensors"), key=lambda path: int(path.stem.split("_")[0])):
        first, last = map(int, path.stem.split("_"))  # inclusive
        ranges.append((first, last))
        content = load_file(path)
        assert content.keys() == {"locations", "activations", "tokens"}
        locations, activations = content["locations"], content["activations"]
        assert locations.dtype == np.uint16
        assert activations.dtype == np.float16
        assert content["tokens"].dtype == np.int64
        assert locations.shape == (len(activations), 3)
        assert tokens is None or np.array_equal(tokens, content["tokens"])
        tokens = content["tokens"]
        rows = [tuple(row) for row in locations.tolist()]
        assert rows == sorted(rows)
        assert all(0 <= expert <= last - first for _, _, expert in rows)
        entries |= {(b, t, expert + first): value for (b, t, expert), value in zip(rows, activations, strict=True)}
    assert [first for first, _ in ranges[1:]] == [last + 1 for _, last in ranges[:-1]]
    return entries, tokens, ranges


def write_card(folder: Path, report: dict, recipe: str, base_on_hub: bool) -> None:
    """Write the card of a report, given as its JSON content."""
    from mxd_convert.report import card, schema

    card.write_card(folder, schema.parse_report(report, folder / "mxd_report.json"), recipe, base_on_hub=base_on_hub)

"""The command `dashboard`."""

from pathlib import Path
from typing import Annotated

import typer

import mxd_convert
from mxd_convert.cli.app import CheckpointArgument, JsonOption, app, human, print_json, show


@app.command(epilog="Example: `mxd-convert dashboard runs/quickstart --data held-out.jsonl --output runs/quickstart-dashboard`")
def dashboard(
    checkpoint: CheckpointArgument,
    data: Annotated[Path, typer.Option("--data", help="Held-out text: .txt, .jsonl (also .gz), .parquet, a folder or a glob.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; an existing dashboard is replaced.")],
    text_field: Annotated[str, typer.Option("--text-field", help="Field with the text of each document.")] = "text",
    tokens: Annotated[int, typer.Option("--tokens", help="Maximum number of tokens to read.")] = 262_144,
    layers: Annotated[str, typer.Option("--layers", help='Layers to show: "3,4", "0-2" or all.')] = "all",
    as_json: JsonOption = False,
) -> None:
    """Write a dashboard of every expert's activity on a text: HTML pages that open from disk, without a network."""
    written = mxd_convert.make_dashboard(checkpoint, data, output, tokens, text_field, layers)
    if as_json:
        print_json(written)
        return
    for index, layer in written["layers"].items():
        figures = ", ".join(f"{layer[key]:,} {key.replace('_', ' ')}" for key in ("dead", "rare", "always_on"))
        human.print(f"layer {index}: {layer['experts']:,} experts, {figures}")
    show(Path(written["output"]) / "index.html")

"""The command that writes the dashboard."""

from pathlib import Path
from typing import Annotated

import typer

import mxd_convert
from mxd_convert.cli.app import CheckpointArgument, JsonOption, app, human, print_json, show


@app.command(epilog="Example: `mxd-convert dashboard runs/quickstart --data held-out.jsonl --output runs/quickstart-dashboard`")
def dashboard(
    checkpoint: CheckpointArgument,
    data: Annotated[Path, typer.Option("--data", help="Held-out text: .txt, .jsonl (also .gz), .parquet, a folder or a glob.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; a dashboard that is there is replaced.")],
    text_field: Annotated[str, typer.Option("--text-field", help="Field that holds the text of a document.")] = "text",
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens to look at, at most.")] = 262_144,
    layers: Annotated[str, typer.Option("--layers", help='Layers to show: "3,4", "0-2" or all.')] = "all",
    as_json: JsonOption = False,
) -> None:
    """Write what every expert does on a text as a folder of HTML, which opens from disk without network."""
    written = mxd_convert.make_dashboard(checkpoint, data, output, tokens, text_field, layers)
    if as_json:
        print_json(written)
        return
    for index, layer in written["layers"].items():
        figures = ", ".join(f"{layer[key]:,} {key.replace('_', ' ')}" for key in ("dead", "rare", "always_on"))
        human.print(f"layer {index}: {layer['experts']:,} experts, {figures}")
    show(Path(written["output"]) / "index.html")

"""The command `edit`."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import mxd_convert
from mxd_convert.cli.app import BaseOption, CheckpointArgument, JsonOption, app, print_json, show


@app.command(epilog="Example: `mxd-convert edit runs/quickstart --ablate 2:17 --scale 0:3:0.5 --output runs/edited`")
def edit(
    checkpoint: CheckpointArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    ablate: Annotated[
        Optional[list[str]],
        typer.Option("--ablate", metavar="LAYER:EXPERT", help="Take an expert's part away for good; repeatable."),
    ] = None,
    scale: Annotated[
        Optional[list[str]],
        typer.Option("--scale", metavar="LAYER:EXPERT:C", help="Multiply an expert's part by C for good; repeatable."),
    ] = None,
    steer: Annotated[
        Optional[list[str]],
        typer.Option("--steer", metavar="LAYER:EXPERT:+C", help="Steer from now on, by a preset in config.json; repeatable."),
    ] = None,
    data: Annotated[Optional[Path], typer.Option("--data", help="Held-out text to measure the result on.")] = None,
    text_field: Annotated[str, typer.Option("--text-field", help="Field that holds the text of a document.")] = "text",
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens to measure on, at most.")] = 262_144,
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ablate, scale or steer experts in a new checkpoint, whose card says so."""
    edits: list[dict[str, Any]] = [{**mxd_convert.parse_expert("--ablate", text), "ablate": True} for text in ablate or []]
    edits += [mxd_convert.parse_scale(text) for text in scale or []]
    preset = [mxd_convert.parse_steering(text) for text in steer or []]
    folder = mxd_convert.edit(checkpoint, output, edits, preset, data, text_field, tokens, base)
    if as_json:
        print_json({"output": str(folder), "edits": edits, "steering": preset})
    else:
        show(folder)

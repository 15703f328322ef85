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
        typer.Option("--ablate", metavar="LAYER:EXPERT", help="Ablate an expert permanently; repeatable."),
    ] = None,
    scale: Annotated[
        Optional[list[str]],
        typer.Option("--scale", metavar="LAYER:EXPERT:C", help="Multiply an expert's output by C permanently; repeatable."),
    ] = None,
    steer: Annotated[
        Optional[list[str]],
        typer.Option(
            "--steer",
            metavar="LAYER:EXPERT:+C",
            help="Add a steering preset to config.json, active whenever the model runs; repeatable.",
        ),
    ] = None,
    data: Annotated[
        Optional[Path],
        typer.Option("--data", help="Held-out text to evaluate the new checkpoint on. Default: none, and no report is written."),
    ] = None,
    text_field: Annotated[str, typer.Option("--text-field", help="Field with the text of each document.")] = "text",
    tokens: Annotated[int, typer.Option("--tokens", help="Maximum number of tokens to evaluate on.")] = 262_144,
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a new checkpoint with experts ablated, scaled or steered. Its model card lists the changes."""
    edits: list[dict[str, Any]] = [{**mxd_convert.parse_expert("--ablate", text), "ablate": True} for text in ablate or []]
    edits += [mxd_convert.parse_scale(text) for text in scale or []]
    preset = [mxd_convert.parse_steering(text) for text in steer or []]
    folder = mxd_convert.edit(checkpoint, output, edits, preset, data, text_field, tokens, base)
    if as_json:
        print_json({"output": str(folder), "edits": edits, "steering": preset})
    else:
        show(folder)

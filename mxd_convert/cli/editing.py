"""Commands that change checkpoints by hand: edit, label."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import mxd_convert
from mxd_convert.cli.app import BaseOption, CheckpointArgument, JsonOption, app, human, print_json, show


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


@app.command(
    epilog='Example: `mxd-convert label runs/quickstart 2:17 "negations" --author mara`. Without a text it lists the labels.'
)
def label(
    checkpoint: CheckpointArgument,
    expert: Annotated[Optional[str], typer.Argument(metavar="LAYER:EXPERT", help="The expert that the text is about.")] = None,
    text: Annotated[Optional[str], typer.Argument(help="What it is about.")] = None,
    author: Annotated[Optional[str], typer.Option("--author", help="Who says so.")] = None,
    file: Annotated[Optional[Path], typer.Option("--file", help="A JSON list of layer, expert, text and author to add.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Note what experts are about, in a file that travels with the checkpoint."""
    if file is not None:
        labels = mxd_convert.add_labels(checkpoint, file)
    elif expert is not None:
        if not text or not author:
            raise mxd_convert.InputError(
                f'label {expert}: give a text and --author, for example: label DIR {expert} "negations" --author mara'
            )
        labels = mxd_convert.add_labels(
            checkpoint, [{**mxd_convert.parse_expert("label", expert), "text": text, "author": author}]
        )
    else:
        labels = mxd_convert.read_labels(checkpoint)
    if as_json:
        print_json([found.model_dump() for found in labels])
        return
    for found in labels:
        show(f"{found.layer}:{found.expert}  {found.text}  ({found.author})")
    if not labels:
        human.print("no labels yet")

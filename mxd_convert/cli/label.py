"""The command `label`."""

from pathlib import Path
from typing import Annotated, Optional

import typer

import mxd_convert
from mxd_convert.cli.app import CheckpointArgument, JsonOption, app, human, print_json, show


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

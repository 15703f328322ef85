"""The command `label`."""

from pathlib import Path
from typing import Annotated, Optional

import typer

import mxd_convert
from mxd_convert.cli.app import CheckpointArgument, JsonOption, app, human, print_json, show


@app.command(
    epilog='Examples:\n\n`mxd-convert label runs/quickstart 2:17 "negations" --author mara`\n\n`mxd-convert label runs/quickstart`'
)
def label(
    checkpoint: CheckpointArgument,
    expert: Annotated[Optional[str], typer.Argument(metavar="LAYER:EXPERT", help="Expert to label.")] = None,
    text: Annotated[Optional[str], typer.Argument(help="Text of the label: what the expert responds to.")] = None,
    author: Annotated[Optional[str], typer.Option("--author", help="Author of the label.")] = None,
    file: Annotated[
        Optional[Path], typer.Option("--file", help="JSON file with a list of labels to add: layer, expert, text and author.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Label an expert, or list the labels if no expert is given.

    Labels are kept in a file of the checkpoint.
    """
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

"""The command `revert`."""

from pathlib import Path
from typing import Annotated

import typer

import mxd_convert
from mxd_convert.cli.app import (
    BaseOption,
    CheckpointArgument,
    JsonOption,
    app,
    print_json,
    show,
)


@app.command(epilog="Example: `mxd-convert revert runs/quickstart --layers 3,4 --output runs/partly`")
def revert(
    checkpoint: CheckpointArgument,
    layers: Annotated[str, typer.Option("--layers", help='Layers to revert: "3,4", "0-2" or all.')],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a copy of a checkpoint in which the given layers have their original MLPs again."""
    folder = mxd_convert.revert(checkpoint, layers, output, base)
    if as_json:
        print_json({"output": str(folder)})
    else:
        show(folder)

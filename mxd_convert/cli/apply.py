"""The command `apply`."""

from pathlib import Path
from typing import Annotated

import typer

import mxd_convert
from mxd_convert.cli.app import (
    BaseOption,
    JsonOption,
    app,
    print_json,
    show,
)


@app.command(epilog="Example: `mxd-convert apply deltas/gpt2-mxd runs/gpt2-mxd --base models/gpt2`")
def apply(
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="Folder of a delta.")],
    output: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.")],
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the full checkpoint of a delta and its base, every file as it was. Another base is refused."""
    folder = mxd_convert.apply(delta, output, base)
    if as_json:
        print_json({"output": str(folder)})
    else:
        show(folder)

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
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="Folder of the delta.")],
    output: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.")],
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Rebuild the full checkpoint from a delta and its base model, byte for byte.

    A different base model is rejected.
    """
    folder = mxd_convert.apply(delta, output, base)
    if as_json:
        print_json({"output": str(folder)})
    else:
        show(folder)

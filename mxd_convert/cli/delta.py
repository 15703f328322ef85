"""The command `delta`."""

from pathlib import Path
from typing import Annotated

import typer

import mxd_convert
from mxd_convert.cli.app import (
    BaseOption,
    CheckpointArgument,
    JsonOption,
    app,
    human,
    print_json,
    show,
    size_of,
)


@app.command(epilog="Example: `mxd-convert delta runs/gpt2-mxd deltas/gpt2-mxd`")
def delta(
    checkpoint: CheckpointArgument,
    output: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.")],
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write only what the conversion changed: for bases that may not be passed on, and a fraction of the bytes.

    `apply` makes the full checkpoint of it again, to the bit; `mxd_convert.load` loads it as it is.
    """
    done = mxd_convert.delta(checkpoint, output, base)
    if as_json:
        print_json(done.to_dict())
        return
    human.print(
        f"{size_of(done.size)} in place of {size_of(done.full_size)}; {done.tensors} tensors that the base does not have",
    )
    show(done.output)

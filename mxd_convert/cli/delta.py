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
    """Write only what the conversion changed, as a delta against the base model.

    A delta is smaller than the checkpoint, and suits base models that may not be redistributed. `apply` rebuilds the full
    checkpoint, byte for byte. `mxd_convert.load` loads a delta directly.
    """
    done = mxd_convert.delta(checkpoint, output, base)
    if as_json:
        print_json(done.to_dict())
        return
    human.print(
        f"delta {size_of(done.size)}, full checkpoint {size_of(done.full_size)}; {done.tensors} tensors differ from the base model",
    )
    show(done.output)

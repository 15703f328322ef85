"""The command `init`."""

from pathlib import Path
from typing import Annotated, Optional

import typer

import mxd_convert
from mxd_convert.cli.app import (
    app,
    human,
)


@app.command(epilog="Example: `mxd-convert init openai-community/gpt2 --output gpt2.yaml`")
def init(
    base_model: Annotated[str, typer.Argument(help="Hub id, local folder or .gguf file of the model to convert.")],
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", help="File to write. Default: NAME-mxd.yaml, with the name of the base model."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a commented recipe for a base model."""
    path = mxd_convert.write_starter(base_model, output, force)
    human.print(f"{path} written. Next: mxd-convert plan {path}")

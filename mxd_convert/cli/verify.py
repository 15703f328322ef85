"""The command `verify`."""

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


@app.command(
    epilog="Examples: `mxd-convert verify runs/quickstart`, `mxd-convert verify runs/quickstart --provenance`. Exit status 1 where a check fails."
)
def verify(
    checkpoint: CheckpointArgument,
    base: BaseOption = None,
    provenance: Annotated[
        bool,
        typer.Option(
            "--provenance",
            help="Instead: recompute what its report says of files, recipe, base and texts, as far as they are at hand.",
        ),
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run the checkpoint's own code though it is not, to the byte, this package's."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Prove in fresh processes, with and without this package, that a checkpoint is whole and behaves as an ordinary one."""
    if provenance:
        found = mxd_convert.verify_provenance(checkpoint, base)
    else:
        found = mxd_convert.verify(checkpoint, base, trust_remote_code)
    if as_json:
        print_json(found.to_dict())
    else:
        marks = {True: "ok", False: "FAILED", None: "not checked"}
        for check in found.checks:
            show(f"{marks[check.ok]:<12}{check.check}" + (f": {check.detail}" if check.detail else ""))
    if not found.ok:
        raise typer.Exit(1)

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


@app.command(epilog="Examples:\n\n`mxd-convert verify runs/quickstart`\n\n`mxd-convert verify runs/quickstart --provenance`")
def verify(
    checkpoint: CheckpointArgument,
    base: BaseOption = None,
    provenance: Annotated[
        bool,
        typer.Option(
            "--provenance",
            help="Instead, check the files, recipe, base model and texts against the report, where they are available.",
        ),
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run the checkpoint's own code even if it differs from this package's code."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Verify that a checkpoint is complete and works like an ordinary one, with and without this package.

    The checks run in fresh processes. The exit status is 1 if a check fails.
    """
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

"""The command `run`."""

from pathlib import Path
from typing import Annotated, Optional

import typer

import mxd_convert
from mxd_convert.cli.app import (
    JsonOption,
    RecipeArgument,
    SetOption,
    app,
    human,
    print_json,
    show,
)
from mxd_convert.cli.figures import print_figures
from mxd_convert.errors import INTERRUPTED, INTERRUPTED_AND_REPORTED, Stopped
from mxd_convert.training.distributed import destroy_process_group, once_per_machine


@app.command(
    epilog="Example: `mxd-convert run recipes/quickstart.yaml --set data.tokens=300000`\n\nThe same command resumes an interrupted run."
)
def run(
    recipe: RecipeArgument,
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", help="Folder of the finished checkpoint. Default: output.dir of the recipe."),
    ] = None,
    settings: SetOption = None,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Start over, replacing the converted checkpoint or unfinished run in the output folder."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a model: train the layers, insert them, evaluate the result and write the report."""
    with once_per_machine():  # report errors of the recipe before torch is loaded
        loaded = mxd_convert.load_recipe(recipe, mxd_convert.parse_overrides(settings or []))
    try:
        result = mxd_convert.convert(loaded, output, fresh=fresh)
    except Stopped as stopped:
        raise typer.Exit(INTERRUPTED_AND_REPORTED if stopped.reported_elsewhere else INTERRUPTED) from None
    destroy_process_group()
    if not result.main_process:
        return
    if as_json:
        content = {"output": str(result.output), "already_finished": result.already_finished, "url": result.url}
        print_json({**content, "onnx_failures": list(result.onnx_failures), "report": result.report})
        if result.onnx_failures:
            raise typer.Exit(1)
        return
    if result.already_finished:
        human.print("this run has already finished. Use --fresh to run it again.")
    print_figures(result.report)
    if result.url is not None:
        human.print(f"published: {result.url}")
    show(result.output)
    if result.onnx_failures:
        for line in result.onnx_failures:
            human.print(f"ONNX export, out of tolerance and not written: {line}", soft_wrap=True)
        raise typer.Exit(1)

"""The command `inspect`."""

from typing import Annotated

import typer

import mxd_convert
from mxd_convert.cli.app import CheckpointArgument, JsonOption, app, console, human, print_json, table_of


@app.command(epilog='Example: `mxd-convert inspect runs/quickstart --prompt "If the argument is" --layers 2 --top 4`')
def inspect(
    checkpoint: CheckpointArgument,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to run the model on.")],
    layers: Annotated[str, typer.Option("--layers", help='Layers to show: "2", "0-2" or all.')] = "all",
    top: Annotated[
        int, typer.Option("--top", help="Experts per token and layer, largest contribution first. --json prints all.")
    ] = 3,
    as_json: JsonOption = False,
) -> None:
    """Show which experts are active on each token of a prompt, with their coefficients and labels."""
    views = mxd_convert.inspect(checkpoint, prompt, layers, None if as_json else top)
    if as_json:
        print_json([view.to_dict() for view in views])
        return
    shown = list(views[0].layers)
    table = table_of("token", *(f"layer {index}" for index in shown))
    for view in views:
        cells = (
            "\n".join(
                f"{firing.expert} {firing.coefficient:.2f}" + (f" {firing.label}" if firing.label else "")
                for firing in view.layers[index]
            )
            for index in shown
        )
        table.add_row(repr(view.text)[1:-1], *cells)
    console().print(table)
    human.print("each cell: expert, coefficient and label, largest contribution to the layer's output first")

"""The command `list`."""

from typing import Annotated, Optional

import typer

import mxd_convert
from mxd_convert.cli.app import (
    JsonOption,
    app,
    console,
    figure,
    human,
    print_json,
    table_of,
)


@app.command(name="list", epilog="Example: `mxd-convert list --base openai-community/gpt2`")
def list_(
    base: Annotated[
        Optional[str], typer.Option("--base", help="Only conversions of this model: gpt2, openai-community/gpt2.")
    ] = None,
    author: Annotated[Optional[str], typer.Option("--author", help="Only those of this owner.")] = None,
    limit: Annotated[Optional[int], typer.Option("--limit", help="At most so many.", min=1)] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the checkpoints on the Hub that this program made, by what their cards say. Rises are on each card's own text."""
    found = mxd_convert.list_checkpoints(base, author, limit)
    if as_json:
        print_json({"checkpoints": [one.to_dict() for one in found]})
        return
    if not found:
        human.print("none found")
        return
    table = table_of("repository", "base", "kind", "layers", "K", "rise", "verdict", "updated")
    for one in found:
        layers = "-" if one.layers is None else str(len(one.layers))
        rest = (str(one.k or "-"), figure(one.delta_ce, "+.3f"), one.verdict or "-", one.updated or "-")
        cells = (one.repo_id, one.base or "-", (one.kind or "-").replace("_", " "), layers, *rest)
        table.add_row(*map(str, cells))
    console().print(table)

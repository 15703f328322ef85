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
        Optional[str], typer.Option("--base", help="Only conversions of this base model, such as gpt2 or openai-community/gpt2.")
    ] = None,
    author: Annotated[Optional[str], typer.Option("--author", help="Only checkpoints of this user or organisation.")] = None,
    limit: Annotated[Optional[int], typer.Option("--limit", help="Maximum number of checkpoints to list.", min=1)] = None,
    as_json: JsonOption = False,
) -> None:
    """List the converted checkpoints on the Hub, with figures from their model cards.

    Each rise in cross-entropy is measured on that checkpoint's own evaluation text.
    """
    found = mxd_convert.list_checkpoints(base, author, limit)
    if as_json:
        print_json({"checkpoints": [one.to_dict() for one in found]})
        return
    if not found:
        human.print("no checkpoints found")
        return
    table = table_of("repository", "base", "kind", "layers", "K", "rise", "verdict", "updated")
    for one in found:
        layers = "-" if one.layers is None else str(len(one.layers))
        rest = (str(one.k or "-"), figure(one.delta_ce, "+.3f"), one.verdict or "-", one.updated or "-")
        cells = (one.repo_id, one.base or "-", (one.kind or "-").replace("_", " "), layers, *rest)
        table.add_row(*map(str, cells))
    console().print(table)

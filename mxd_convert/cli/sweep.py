"""The command `sweep`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import mxd_convert
from mxd_convert.cli.app import JsonOption, RecipeArgument, app, console, figure, print_json, show, table_of, with_error


@app.command(
    epilog="Example: `mxd-convert sweep quickstart --set layer.k=4,8,16 --set layer.kind=mxd,transcoder,dense_twin --output sweeps/quickstart`\n\n"
    "Each kind at its own learning rate: `--arm 'layer.kind=mxd train.lr=5e-3' --arm 'layer.kind=transcoder train.lr=1e-2'`\n\n"
    "The same command resumes an interrupted sweep."
)
def sweep(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the table, plots and runs to.")],
    settings: Annotated[
        Optional[list[str]],
        typer.Option("--set", metavar="KEY=VALUE,VALUE,...", help="Recipe key and the values to try; repeatable."),
    ] = None,
    arms: Annotated[
        Optional[list[str]],
        typer.Option(
            "--arm",
            metavar="'KEY=VALUE KEY=VALUE ...'",
            help="Settings that belong together, such as a kind of layer and its learning rate; repeatable.",
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over, replacing an earlier sweep in the output folder.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe for every combination of values, and write a table and plots.

    The plots show faithfulness against sparsity and against reliance on the experts.
    """
    parsed = [mxd_convert.parse_arm(arm) for arm in arms or []]
    found = mxd_convert.sweep(recipe, mxd_convert.parse_grid(settings or []), output, fresh=fresh, arms=parsed)
    if as_json:
        print_json({"output": str(found.output), "runs": found.rows})
        return
    table = table_of("run", "parameters", "rise", "behind best", "FVU", "active", "dead", "gate", "hidden", "product", "routing")
    for row in found.rows:
        if "error" in row:
            table.add_row(row["name"], "-", "failed", *["-"] * 8)
            continue
        shares = (row.get(name) for name in ("gate_share", "hidden_share", "product_share", "routing_necessity"))
        table.add_row(
            row["name"],
            figure(row["parameters"], ","),
            with_error(row["delta_ce"], row.get("delta_ce_se"), "+.4f"),
            _behind(row),
            figure(row["fvu"], ".3f"),
            figure(row["l0"], ".1f"),
            figure(row["dead_fraction"], ".1%"),
            *(figure(share, ".2f") for share in shares),
        )
    console().print(table)
    show(found.output)


def _behind(row: Mapping[str, Any]) -> str:
    """Return how far a run is behind the one with the lowest rise, with the standard error over the same documents."""
    if not row.get("behind_best"):
        return "best" if row.get("behind_best") == 0 else "-"
    noise = " (noise)" if row["within_noise_of_best"] else ""
    return with_error(row["behind_best"], row["behind_best_se"], "+.4f") + noise

"""The command `compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer

import mxd_convert
from mxd_convert.cli.app import JsonOption, app, console, figure, print_json, table_of


@app.command(epilog="Example: `mxd-convert compare runs/quickstart runs/mine`")
def compare(
    one: Annotated[Path, typer.Argument(help="Folder of a converted checkpoint.")],
    other: Annotated[Path, typer.Argument(help="Folder of the checkpoint to compare it with.")],
    as_json: JsonOption = False,
) -> None:
    """Compare the reports of two checkpoints: settings, figures and verdicts side by side."""
    found = mxd_convert.compare(one, other)
    if as_json:
        print_json(found)
        return
    out = console()
    for key, same in (("base model", found["same_base"]), ("held-out text", found["same_eval_text"])):
        if not same:
            out.print(f"note: the {key} differs or is unknown, so the figures aren't directly comparable")
    table = table_of("", Path(one).name, Path(other).name, "difference")
    for key, values in found["settings"].items():
        table.add_row(key, *map(str, values), "")
    table.add_section()
    for key, values in found["whole"].items():
        table.add_row(key, *_cells(values))
    for index, figures in found["layers"].items():
        table.add_section()
        for key, values in figures.items():
            table.add_row(f"layer {index} {key}", *_cells(values))
    out.print(table)
    for folder, verdict in zip((one, other), found["verdicts"], strict=True):
        out.print(f"{Path(folder).name}: {verdict}", soft_wrap=True)


def _cells(values: list[Any]) -> list[str]:
    shown = [figure(value, ".4f") for value in values]
    return [*shown, "" if "-" in shown else figure(values[1] - values[0], "+.4f")]

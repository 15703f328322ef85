"""The command `compare`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import mxd_convert
from mxd_convert.cli.app import JsonOption, app, console, is_figure, print_json, show, table_of, with_error


@app.command(epilog="Example: `mxd-convert compare runs/quickstart runs/mine`")
def compare(
    one: Annotated[Path, typer.Argument(help="Folder of a converted checkpoint.")],
    other: Annotated[Path, typer.Argument(help="Folder of the checkpoint to compare it with.")],
    plot: Annotated[
        Optional[Path], typer.Option("--plot", help="PNG file to write: rise in cross-entropy against gate and hidden share.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the reports of two checkpoints: settings, figures and verdicts side by side."""
    found = mxd_convert.compare(one, other, plot)
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
    _add_rows(table, "", found["whole"], found["differences"])
    for index, figures in found["layers"].items():
        table.add_section()
        _add_rows(table, f"layer {index} ", figures, {})
    out.print(table)
    for name, difference in found["differences"].items():
        if difference is None:
            continue
        if difference["standard_error"] is None:
            out.print(f"The noise of the difference in {name} is unknown, because a report has no standard errors.")
            continue
        how = "paired over the same documents" if difference["paired"] else "not paired, because the reports share no documents"
        size = "within noise" if difference["within_noise"] else "larger than noise"
        out.print(f"The difference in {name} is {size} (two standard errors, {how}).")
    for folder, verdict in zip((one, other), found["verdicts"], strict=True):
        out.print(f"{Path(folder).name}: {verdict}", soft_wrap=True)
    if plot is not None:
        show(plot)


def _add_rows(table: Any, prefix: str, figures: Mapping[str, list[Any]], differences: Mapping[str, Any]) -> None:
    """Add a row per figure, with the standard errors that are known."""
    for key, values in figures.items():
        if not key.endswith("_se"):
            errors = figures.get(f"{key}_se", [None, None])
            table.add_row(f"{prefix}{key}", *map(with_error, values, errors), _difference(values, differences.get(key)))


def _difference(values: list[Any], difference: Mapping[str, Any] | None) -> str:
    """Return the difference of two figures, with its standard error if it is known."""
    if not all(map(is_figure, values)):
        return ""
    return with_error(values[1] - values[0], None if difference is None else difference["standard_error"], "+.4f")

"""The Typer app, options that several commands share, and the functions that print.

Names, labels, texts and figures may come from a checkpoint, a dataset or the Hub. Every str is therefore printed as plain text:
without rich markup and without terminal control characters.
"""

import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import mxd_convert
from mxd_convert.escaping import printable
from mxd_convert.files import finite

app = typer.Typer(
    name="mxd-convert",
    help="Convert a pretrained Hugging Face language model into one whose MLPs are sparse, interpretable Mixtures of Decoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


class _Console(Console):
    """A console that prints a str as one line of plain text, or as several lines in a table cell."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(Text(printable(one)) if isinstance(one, str) else one for one in objects), **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, lines=True), **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit here


human = _Console(stderr=True)

RecipeArgument = Annotated[str, typer.Argument(help="Recipe file, or name of a bundled recipe: quickstart, stories260k, ...")]
CheckpointArgument = Annotated[Path, typer.Argument(help="Folder of a converted checkpoint.")]
SetOption = Annotated[Optional[list[str]], typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; repeatable.")]
BaseOption = Annotated[
    Optional[str], typer.Option("--base", metavar="PATH", help="Base model to use instead of the recorded one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def prepare_streams() -> None:
    """Make stdout and stderr replace characters that their encoding lacks, so that ASCII terminals raise no error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def console() -> Console:
    """Return a console of the terminal's width, or 120 columns for a file or pipe."""
    return _Console(width=None if sys.stdout is not None and sys.stdout.isatty() else 120)


def table_of(*headers: str) -> Table:
    """Return an empty table: the first column left-aligned, the others right-aligned, long headers folded."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
    for number, header in enumerate(headers):
        table.add_column(header, justify="right" if number else "left", overflow="fold")
    return table


def show(result: object, lines: bool = False) -> None:
    """Print a result on stdout, unwrapped.

    lines: keep line breaks and tabs instead of printing one line.
    """
    if sys.stdout is not None:  # stdout is closed
        sys.stdout.write(printable(str(result), lines) + "\n")


def print_json(content: Any) -> None:
    """Print strict ASCII JSON on stdout, with null for numbers that are not finite."""
    show(json.dumps(finite(content), indent=2, allow_nan=False), lines=True)


def figure(value: Any, form: str) -> str:
    """Return a report value formatted as a table cell, or a dash if it isn't a finite number."""
    return format(value, form) if is_figure(value) else "-"


def with_error(value: Any, error: Any, form: str = ".4f") -> str:
    """Return a report value formatted as a table cell, with its standard error if it has one: `0.1234 ± 0.0056`."""
    return (
        f"{figure(value, form)} ± {figure(error, form.lstrip('+'))}"
        if is_figure(value) and is_figure(error)
        else figure(value, form)
    )


def is_figure(value: Any) -> bool:
    """Return whether a report value is a finite number within the range of a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _version(wanted: bool) -> None:
    if wanted:
        show(f"mxd-convert {mxd_convert.__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow custom code of base models and checkpoints to run.")
    ] = False,
) -> None:
    settings.debug = debug
    if trust_remote_code:
        context.with_resource(mxd_convert.trusting())  # until this command ends


class Settings:
    """Values of the program's global options."""

    debug = False


settings = Settings()


RepositoryArgument = Annotated[
    str, typer.Argument(metavar="REPO_ID", help="Repository on the Hub: owner/name, or a name under your own account.")
]


def size_of(count: float) -> str:
    """Return a size in bytes as text with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"

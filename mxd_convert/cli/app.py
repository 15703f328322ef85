"""The program's frame: options that several commands share, and the one place where they print.

Names, labels, texts and figures may come from a checkpoint, a data set or the Hub. So every str is text here: never rich's markup, and
without the control characters that a terminal obeys.
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
    help="Turns a pretrained HuggingFace language model into one whose MLPs are sparse, interpretable Mixtures of Decoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


class _Console(Console):
    """A console for which a str is a line of text; in a cell of a table, lines of text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(Text(printable(one)) if isinstance(one, str) else one for one in objects), **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, lines=True), **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would end the program here


human = _Console(stderr=True)

RecipeArgument = Annotated[str, typer.Argument(help="Recipe file, or the name of one that ships: quickstart, stories260k, ...")]
CheckpointArgument = Annotated[Path, typer.Argument(help="Folder of a converted checkpoint.")]
SetOption = Annotated[
    Optional[list[str]], typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeatable.")
]
BaseOption = Annotated[Optional[str], typer.Option("--base", metavar="PATH", help="The base model, where not the recorded one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def prepare_streams() -> None:
    """Let stdout and stderr replace what their encoding lacks: a terminal of ASCII only is no reason to stop."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def console() -> Console:
    """Return a console of the terminal's width; wide enough for our tables where the output is a file or a pipe."""
    return _Console(width=None if sys.stdout is not None and sys.stdout.isatty() else 120)


def table_of(*headers: str) -> Table:
    """Return a table that keeps to 80 columns: figures to the right, headers of several words over several lines."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
    for number, header in enumerate(headers):
        table.add_column(header, justify="right" if number else "left", overflow="fold")
    return table


def show(result: object, lines: bool = False) -> None:
    """Print a result on stdout: as one line, neither wrapped nor cut. lines: keep its line breaks and tabs."""
    if sys.stdout is not None:  # where it is closed
        sys.stdout.write(printable(str(result), lines) + "\n")


def print_json(content: Any) -> None:
    """Print strict JSON in ASCII on stdout; numbers that are not finite become null."""
    show(json.dumps(finite(content), indent=2, allow_nan=False), lines=True)


def figure(value: Any, form: str) -> str:
    """Return a figure of a report as a cell of a table; what is no finite number is a dash."""
    return format(value, form) if is_figure(value) else "-"


def is_figure(value: Any) -> bool:
    """Whether a value of a report is a finite number, and one that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _version(wanted: bool) -> None:
    if wanted:
        show(f"mxd-convert {mxd_convert.__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a base model and its checkpoints.")
    ] = False,
) -> None:
    settings.debug = debug
    if trust_remote_code:
        context.with_resource(mxd_convert.trusting())  # for this command


class Settings:
    """What the program's own options say."""

    debug = False


settings = Settings()


RepositoryArgument = Annotated[
    str, typer.Argument(metavar="REPO_ID", help="Repository on the Hub: owner/name, or a name of your own.")
]


def size_of(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"

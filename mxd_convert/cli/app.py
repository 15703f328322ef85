"""The program's frame: options that several commands share, and how they print."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich import box
from rich.console import Console
from rich.table import Table

import mxd_convert

app = typer.Typer(
    name="mxd-convert",
    help="Turns a pretrained HuggingFace language model into one whose MLPs are sparse, interpretable Mixtures of Decoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
human = Console(stderr=True, highlight=False)

RecipeArgument = Annotated[str, typer.Argument(help="Recipe file, or the name of one that ships: quickstart, stories260k, ...")]
CheckpointArgument = Annotated[Path, typer.Argument(help="Folder of a converted checkpoint.")]
SetOption = Annotated[
    Optional[list[str]], typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeatable.")
]
BaseOption = Annotated[Optional[str], typer.Option("--base", metavar="PATH", help="The base model, where not the recorded one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def console() -> Console:
    """Of the terminal's width; wide enough for our tables where the output is a file or a pipe."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def table_of(*headers: str) -> Table:
    """A table that keeps to 80 columns: figures to the right, headers of several words over several lines."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
    for number, header in enumerate(headers):
        table.add_column(header, justify="right" if number else "left", overflow="fold")
    return table


def plain(text: str) -> str:
    """Text from elsewhere without what a terminal would take for orders."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def print_json(content: Any) -> None:
    print(json.dumps(content, indent=2))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mxd-convert {mxd_convert.__version__}")
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

"""Commands that read and steer checkpoints: generate, inspect, compare."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import mxd_convert
from mxd_convert.cli.app import CheckpointArgument, JsonOption, app, console, figure, human, print_json, show, table_of


class Positions(Enum):
    """Where steering acts."""

    all = "all"
    prompt = "prompt"
    generation = "generation"


@app.command(epilog='Example: `mxd-convert generate runs/quickstart --prompt "The function" --steer 2:17:+10`')
def generate(
    checkpoint: CheckpointArgument,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")],
    steer: Annotated[
        Optional[list[str]],
        typer.Option(
            "--steer",
            metavar="LAYER:EXPERT:+C",
            help="Add C to an expert's coefficient (=C sets it, xC scales it, off ablates it); repeatable.",
        ),
    ] = None,
    positions: Annotated[
        Positions, typer.Option("--positions", help="Where it is steered: everywhere, in the prompt, or in what is written.")
    ] = Positions.all,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="0: the most likely token each time.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampling.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Continue a text, steered if asked."""
    steering = [mxd_convert.parse_steering(text, positions.value) for text in steer or []]
    text = mxd_convert.generate(checkpoint, prompt, steering, max_new_tokens, temperature, seed)
    if as_json:
        print_json({"prompt": prompt, "steering": steering, "text": text})
    else:
        show(text, lines=True)


@app.command(epilog='Example: `mxd-convert inspect runs/quickstart --prompt "If the argument is" --layers 2 --top 4`')
def inspect(
    checkpoint: CheckpointArgument,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to look at.")],
    layers: Annotated[str, typer.Option("--layers", help='Layers to show: "2", "0-2" or all.')] = "all",
    top: Annotated[int, typer.Option("--top", help="Experts a token and layer, those that add most first.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Show which experts fire, token by token, with their coefficients and labels."""
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
    human.print("expert and coefficient; those that add most to the layer's output first")


@app.command(epilog="Example: `mxd-convert compare runs/quickstart runs/mine`")
def compare(
    one: Annotated[Path, typer.Argument(help="Folder of a converted checkpoint.")],
    other: Annotated[Path, typer.Argument(help="Folder of another.")],
    as_json: JsonOption = False,
) -> None:
    """Set two checkpoints' reports side by side."""
    found = mxd_convert.compare(one, other)
    if as_json:
        print_json(found)
        return
    out = console()
    for key, same in (("base model", found["same_base"]), ("held-out text", found["same_eval_text"])):
        if not same:
            out.print(f"note: not the same {key}; figures can't be compared one to one")
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

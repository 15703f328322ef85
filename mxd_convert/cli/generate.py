"""The command `generate`."""

from enum import Enum
from typing import Annotated, Optional

import typer

import mxd_convert
from mxd_convert.cli.app import CheckpointArgument, JsonOption, app, print_json, show


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

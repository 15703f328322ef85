"""The command `generate`."""

from enum import Enum
from typing import Annotated, Optional

import typer

import mxd_convert
from mxd_convert.cli.app import CheckpointArgument, JsonOption, app, print_json, show


class Positions(Enum):
    """Positions at which steering acts."""

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
            help="Steer an expert: +C adds C to its coefficient, =C sets it, xC scales it, off ablates it; repeatable.",
        ),
    ] = None,
    positions: Annotated[
        Positions,
        typer.Option("--positions", help="Positions to steer: all, those of the prompt, or those of the generated tokens."),
    ] = Positions.all,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Maximum number of tokens to generate.")] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Sampling temperature; 0 takes the most likely token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Random seed of the sampling.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt, optionally with steered experts."""
    steering = [mxd_convert.parse_steering(text, positions.value) for text in steer or []]
    text = mxd_convert.generate(checkpoint, prompt, steering, max_new_tokens, temperature, seed)
    if as_json:
        print_json({"prompt": prompt, "steering": steering, "text": text})
    else:
        show(text, lines=True)

"""The command `eval`."""

from pathlib import Path
from typing import Annotated

import typer

import mxd_convert
from mxd_convert.cli.app import (
    BaseOption,
    CheckpointArgument,
    JsonOption,
    app,
    print_json,
)
from mxd_convert.cli.figures import print_figures


@app.command(name="eval", epilog="Example: `mxd-convert eval runs/quickstart --data held-out.jsonl --tokens 50000`")
def evaluate(
    checkpoint: CheckpointArgument,
    data: Annotated[Path, typer.Option("--data", help="Held-out text: .txt, .jsonl (also .gz), .parquet, a folder or a glob.")],
    text_field: Annotated[str, typer.Option("--text-field", help="Field with the text of each document.")] = "text",
    tokens: Annotated[int, typer.Option("--tokens", help="Maximum number of tokens to evaluate on.")] = 262_144,
    base: BaseOption = None,
    record: Annotated[
        bool,
        typer.Option(
            "--record",
            help="Also add the figures to the checkpoint's report and card, under this text. A report without hidden shares gets this verdict.",
        ),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure only the whole model's fidelity and the shares: two passes over the text.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a checkpoint on a text: fidelity to the base model and reliance on the experts."""
    figures = mxd_convert.evaluate(checkpoint, data, tokens, text_field, base, quick=quick)
    if record:
        mxd_convert.record(checkpoint, figures)
    if as_json:
        print_json(figures)
    else:
        print_figures(figures)

"""The command `measure-steering`."""

from pathlib import Path
from typing import Annotated, Optional

import typer

import mxd_convert
from mxd_convert.cli.app import BaseOption, CheckpointArgument, JsonOption, app, console, figure, print_json, show, table_of


@app.command(
    epilog="Example: `mxd-convert measure-steering runs/quickstart --data text.jsonl --expert 2:17 --strengths 1,2,4 --output steering/quickstart`"
)
def measure_steering(
    checkpoint: CheckpointArgument,
    data: Annotated[Path, typer.Option("--data", help="Held-out text: .txt, .jsonl (also .gz), .parquet, a folder or a glob.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the table, samples and plot to.")],
    expert: Annotated[
        Optional[list[str]],
        typer.Option("--expert", metavar="LAYER:EXPERT", help="Expert to steer; repeatable. Default: experts drawn at random."),
    ] = None,
    count: Annotated[
        int, typer.Option("--count", help="Number of experts to draw, among those that are active on the text.")
    ] = 20,
    strengths: Annotated[
        str, typer.Option("--strengths", help="Strengths, in units of the 99th percentile of an expert's active coefficients.")
    ] = "0.5,1,2,4,8",
    prompt: Annotated[str, typer.Option("--prompt", help="Prompt of the samples. Default: the BOS token.")] = "",
    samples: Annotated[int, typer.Option("--samples", help="Number of samples per expert and strength.")] = 10,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Number of tokens per sample.")] = 32,
    contexts: Annotated[
        int, typer.Option("--contexts", help="Number of held-out contexts on which the next-token distribution is compared.")
    ] = 32,
    text_field: Annotated[str, typer.Option("--text-field", help="Field with the text of each document.")] = "text",
    tokens: Annotated[int, typer.Option("--tokens", help="Maximum number of tokens to take coefficients from.")] = 32_768,
    seed: Annotated[int, typer.Option("--seed", help="Random seed of the experts drawn and of the samples.")] = 0,
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the effect of steering experts: on the next token, on fluency, and on the similarity of samples.

    Fluency is the base model's perplexity of the samples.
    """
    pairs = [mxd_convert.parse_expert("--expert", text) for text in expert or []]
    found = mxd_convert.measure_steering(
        checkpoint,
        data,
        output,
        [(pair["layer"], pair["expert"]) for pair in pairs],
        count,
        mxd_convert.parse_numbers("--strengths", strengths),
        prompt,
        samples,
        new_tokens,
        contexts,
        text_field,
        tokens,
        seed,
        base,
    )
    if as_json:
        print_json({"output": str(output), **found})
        return
    table = table_of("expert", "strength", "coefficient", "KL", "perplexity", "n-grams shared", "similarity")
    for row in (found["unsteered"], *found["effects"]):
        name = "not steered" if row["strength"] == 0 else f"{row['layer']}:{row['expert']}"
        forms = {"kl": ".4f", "perplexity": ",.1f", "ngrams": ".3f", "embedding": "+.3f"}
        table.add_row(
            name, f"{row['strength']:g}", f"{row['coefficient']:.2f}", *(figure(row[key], form) for key, form in forms.items())
        )
    console().print(table)
    show(output)

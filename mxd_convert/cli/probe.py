"""The command `probe`."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import mxd_convert
from mxd_convert.cli.app import BaseOption, CheckpointArgument, JsonOption, app, console, print_json, show, table_of


@app.command(epilog="Example: `mxd-convert probe runs/gpt2-mxd --data ag_news.jsonl.gz --compare runs/gpt2-transcoder`")
def probe(
    checkpoint: CheckpointArgument,
    data: Annotated[Path, typer.Option("--data", help="Labelled text: .jsonl (also .gz), .parquet, a folder or a glob.")],
    text_field: Annotated[str, typer.Option("--text-field", help="Field with the text of each document.")] = "text",
    label_field: Annotated[str, typer.Option("--label-field", help="Field with the class of each document.")] = "label",
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", help="Folder to write. Default: CHECKPOINT-probe-DATA, next to the checkpoint."),
    ] = None,
    compare: Annotated[
        Optional[list[Path]],
        typer.Option(
            "--compare", metavar="CHECKPOINT", help="Another conversion of the same base model, such as a transcoder; repeatable."
        ),
    ] = None,
    layers: Annotated[str, typer.Option("--layers", help='Layers to probe: "3,4", "0-2" or all.')] = "all",
    documents: Annotated[int, typer.Option("--documents", help="Maximum number of documents per class.")] = 500,
    tokens: Annotated[
        Optional[int], typer.Option("--tokens", help="Maximum number of tokens per document, from its beginning. Default: 128.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="Random seed of the sample, the split, the random gate and the bootstrap.")
    ] = 0,
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the expert that best separates each class of labelled documents, and score it on held-out documents.

    Baselines: the best neuron of the base model's MLPs, the best expert of a random gate, the best expert or latent of each
    --compare checkpoint, and a logistic regression on all experts.
    """
    found = mxd_convert.probe(
        checkpoint, data, text_field, label_field, output, compare or (), base, layers, documents, tokens, seed
    )
    if as_json:
        print_json(found)
        return
    _print_results(found)
    show(found["output"])


def _print_results(found: dict[str, Any]) -> None:
    families, results = list(found["families"]), found["results"]
    units = families[0]
    out = console()
    heads = [_short(name if found["families"][name]["whole_vector"] else f"best {name}") for name in families]
    table = table_of("F1", f"layer:{units}", *heads)
    for label in found["data"]["classes"]:
        rows = {row["family"]: row for row in results if row["class"] == label}
        cells = [f"{row['f1']:.2f}\n{row['f1_low']:.2f}-{row['f1_high']:.2f}" for row in (rows[family] for family in families)]
        table.add_row(_short(label), f"{rows[units]['layer']}:{rows[units]['unit']}", *cells)
    table.add_row("mean", "", *(f"{found['mean_f1'][family]:.2f}" for family in families))
    out.print(table)
    test, share = results[0]["test_documents"], [row["chance"] for row in results if row["family"] == units]
    chance = f"{min(share):.2f}" if f"{min(share):.2f}" == f"{max(share):.2f}" else f"{min(share):.2f} to {max(share):.2f}"
    out.print(f"on {test:,} test documents, with 95 % intervals; F1 of assigning every document to the class: {chance}")


def _short(label: str) -> str:
    line = " ".join(label.split())
    return line if len(line) <= 24 else line[:23] + "…"

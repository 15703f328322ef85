"""The command `export-onnx`: a checkpoint for runtimes without PyTorch."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import mxd_convert
from mxd_convert.cli.app import CheckpointArgument, JsonOption, app, console, human, print_json, show, table_of


@app.command(
    "export-onnx",
    epilog="Examples:\n\n"
    "`mxd-convert export-onnx runs/quickstart exports/quickstart`\n\n"
    "`mxd-convert export-onnx runs/quickstart exports/quickstart --dtype fp32,fp16 --quantize int8 --expert-outputs --steering`",
)
def export_onnx(
    checkpoint: CheckpointArgument,
    output: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.")],
    dtype: Annotated[str, typer.Option("--dtype", help="Precision: fp32, fp16, or fp32,fp16 for a graph in each.")] = "fp32",
    quantize: Annotated[
        Optional[str], typer.Option("--quantize", metavar="int8", help="Also write a graph with 8-bit weights.")
    ] = None,
    opset: Annotated[int, typer.Option("--opset", help="ONNX opset version, from 18 to 23.")] = 20,
    expert_outputs: Annotated[
        bool,
        typer.Option("--expert-outputs", help="Also output each layer's active experts and their coefficients."),
    ] = False,
    steering: Annotated[
        bool, typer.Option("--steering", help="Also take (layer, expert, amount) as inputs, to add to coefficients.")
    ] = False,
    data: Annotated[
        Optional[str],
        typer.Option(
            "--data", help="Text to compare on. Default: the checkpoint's held-out text if available, else a bundled text."
        ),
    ] = None,
    text_field: Annotated[str, typer.Option("--text-field", help="Field with the text of each document.")] = "text",
    tokens: Annotated[int, typer.Option("--tokens", help="Maximum number of tokens for the cross-entropy.")] = 8192,
    as_json: JsonOption = False,
) -> None:
    """Export a checkpoint to ONNX and compare it with PyTorch.

    The folder works with onnxruntime, onnxruntime-genai, optimum-onnx and transformers.js. If a graph is out of tolerance, no
    folder is written and the exit status is 1.
    """
    dtypes = [name.strip() for name in dtype.split(",")]
    found = mxd_convert.export_onnx(
        checkpoint, output, dtypes, quantize, opset, expert_outputs, steering, data, tokens, text_field
    )
    if as_json:
        print_json({"output": None if found.output is None else str(found.output), "failures": found.failures, **found.report})
    else:
        _print_parity(found.report)
    for line in found.failures:
        human.print(f"out of tolerance: {line}", soft_wrap=True)
    if found.output is None:
        human.print(f"{output} was not written", soft_wrap=True)
        raise typer.Exit(1)
    if not as_json:
        show(found.output)


def _print_parity(report: dict[str, Any]) -> None:
    table = table_of(
        "graph", "MB", "largest difference", "KL", "same top token", "same experts", "shared experts", "same greedy text", "rise"
    )
    for dtype, graph in report["graphs"].items():
        parity = graph["parity"]
        table.add_row(
            dtype,
            f"{graph['bytes'] / 1e6:,.1f}",
            *(_figure(parity[name], ".1e") for name in ("largest_difference", "kl")),
            *(
                "-" if parity[name] is None else f"{parity[name]:.2%}"
                for name in ("argmax_agreement", "expert_agreement", "expert_overlap")
            ),
            f"{parity['greedy']['equal']}/{parity['greedy']['prompts']}",
            _figure(parity["delta_ce"], "+.4f"),
        )
    out = console()
    out.print(table)
    first = next(iter(report["graphs"].values()))["parity"]
    out.print(
        f"against PyTorch in float32, {first['tokens']:,} tokens of {report['data']['path']}; rise in cross-entropy"
        f" over {_figure(first['ce_checkpoint'], '.4f')} on {report['data']['tokens']:,}; opset {report['opset']}",
        soft_wrap=True,
    )


def _figure(value: float | None, form: str) -> str:
    """Return a figure as a table cell, without a minus sign before a zero, or a dash for None."""
    return "-" if value is None else format(round(value, 4) + 0.0 if form.endswith("f") else value, form)

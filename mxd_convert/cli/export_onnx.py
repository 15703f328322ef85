"""The command for runtimes without PyTorch: export-onnx."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import mxd_convert
from mxd_convert.cli.app import CheckpointArgument, JsonOption, app, console, human, print_json, show, table_of


@app.command(
    "export-onnx",
    epilog="Examples: `mxd-convert export-onnx runs/quickstart exports/quickstart`,"
    " `mxd-convert export-onnx runs/quickstart exports/quickstart --dtype fp32,fp16 --quantize int8 --expert-outputs --steering`."
    " Exit status 1 where a graph is out of tolerance; then there is no folder.",
)
def export_onnx(
    checkpoint: CheckpointArgument,
    output: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.")],
    dtype: Annotated[str, typer.Option("--dtype", help="A graph in fp32, in fp16, or in both: fp32,fp16.")] = "fp32",
    quantize: Annotated[
        Optional[str], typer.Option("--quantize", metavar="int8", help="Add a graph with weights in 8 bits.")
    ] = None,
    opset: Annotated[int, typer.Option("--opset", help="Version of ONNX's operators, from 18.")] = 20,
    expert_outputs: Annotated[
        bool,
        typer.Option("--expert-outputs", help="The graph also gives the active experts of each layer and their coefficients."),
    ] = False,
    steering: Annotated[
        bool, typer.Option("--steering", help="The graph also takes (layer, expert, amount), to add to coefficients.")
    ] = False,
    data: Annotated[
        Optional[str],
        typer.Option("--data", help="Text to compare on; default: what the checkpoint was evaluated on, or one that ships here."),
    ] = None,
    text_field: Annotated[str, typer.Option("--text-field", help="Field that holds the text of a document.")] = "text",
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens to take the cross-entropy of.")] = 8192,
    as_json: JsonOption = False,
) -> None:
    """Export to ONNX: a folder for onnxruntime, onnxruntime-genai, optimum-onnx and transformers.js, compared with PyTorch first."""
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
        f"against PyTorch in float32, {first['tokens']:,} tokens of {report['data']['path']}; rise of cross-entropy"
        f" over {_figure(first['ce_checkpoint'], '.4f')} on {report['data']['tokens']:,}; opset {report['opset']}",
        soft_wrap=True,
    )


def _figure(value: float | None, form: str) -> str:
    """A figure rounded, so that there is no minus before a zero; none is what is no number."""
    return "-" if value is None else format(round(value, 4) + 0.0 if form.endswith("f") else value, form)

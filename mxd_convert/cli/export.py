"""The command `export`: layers and activations of a checkpoint for other tools."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

import mxd_convert
from mxd_convert.cli.app import (
    BaseOption,
    CheckpointArgument,
    JsonOption,
    app,
    console,
    figure,
    human,
    print_json,
    show,
    table_of,
)


class Layouts(Enum):
    """Tools that an export is written for."""

    sparsify = "sparsify"
    circuit_tracer = "circuit-tracer"
    delphi = "delphi"


@app.command(
    epilog="Examples:\n\n"
    "`mxd-convert export runs/quickstart exports/sparsify --to sparsify --data held-out.jsonl`\n\n"
    "`mxd-convert export runs/gpt2-mxd exports/circuits --to circuit-tracer --data held-out.jsonl --base models/gpt2`\n\n"
    "`mxd-convert export runs/quickstart exports/delphi --to delphi --data held-out.jsonl --layers 0-2 --tokens 1000000`"
)
def export(
    checkpoint: CheckpointArgument,
    output: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.")],
    to: Annotated[Layouts, typer.Option("--to", help="Tool to export for.")],
    data: Annotated[Path, typer.Option("--data", help="Held-out text: .txt, .jsonl (also .gz), .parquet, a folder or a glob.")],
    text_field: Annotated[str, typer.Option("--text-field", help="Field with the text of each document.")] = "text",
    tokens: Annotated[int, typer.Option("--tokens", help="Maximum number of tokens to read.")] = 131_072,
    layers: Annotated[str, typer.Option("--layers", help='Layers to export: "3,4", "0-2" or all.')] = "all",
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Export layers as static transcoders (sparsify, circuit-tracer), or activations on a text (delphi).

    A transcoder is exported exactly. An MxD is approximated by a static transcoder, whose decoder rows are each expert's mean
    output while active; the table shows the error of this. lm-eval and nnsight need no export: see docs/other-tools.md.
    """
    if to is Layouts.delphi and base is not None:
        raise mxd_convert.InputError(f"--base {base}: export --to delphi does not use the base model. Leave out --base.")
    if to is Layouts.delphi:
        found = mxd_convert.cache_activations(checkpoint, output, data, tokens, text_field, layers)
    else:
        found = mxd_convert.export_transcoder(checkpoint, output, to.value, data, tokens, text_field, layers, base)
    if as_json:
        print_json({"output": str(output), **found})
        return
    _print_cache(found) if to is Layouts.delphi else _print_losses(found)
    for note in found["notes"]:
        human.print(f"note: {note}", soft_wrap=True)
    show(output)


def _print_losses(found: dict[str, Any]) -> None:
    table = table_of(
        "layer", "kind", "active", "never fired", "FVU of layer", "FVU of surrogate", "FVU against layer", "rise over converted"
    )
    for index, layer in found["layers"].items():
        table.add_row(
            index,
            layer["kind"],
            f"{layer['l0']:.1f}",
            "exact" if layer["exact"] else f"{layer['never_fired'] / layer['n_experts']:.1%}",
            *(figure(layer[name], ".3f") for name in ("fvu_layer", "fvu_surrogate", "fvu_against_layer")),
            f"{layer['delta_ce']:+.4f}",
        )
    out = console()
    out.print(table)
    base = "" if found["ce_base"] is None else f"base {found['ce_base']:.4f}, "
    rise = "" if found["ce_base"] is None else f", {found['delta_ce_base']:+.4f} over the base"
    out.print(
        f"cross-entropy: {base}converted {found['ce_converted']:.4f}, all surrogates in place {found['ce_surrogates']:.4f}:"
        f" {found['delta_ce_converted']:+.4f} over the converted model{rise}; on {found['data']['tokens_measured']:,} tokens",
        soft_wrap=True,
    )


def _print_cache(found: dict[str, Any]) -> None:
    table = table_of("layer", "module", "experts", "never fired", "activations")
    for index, layer in found["layers"].items():
        counts = (f"{layer[name]:,}" for name in ("n_experts", "never_fired", "entries"))
        table.add_row(index, layer["module"], *counts)
    out = console()
    out.print(table)
    out.print(f"{found['data']['tokens']:,} tokens in blocks of {found['data']['context']}; {found['data']['masked']}")

"""Commands that make checkpoints: init, plan, run, eval, verify, revert."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import mxd_convert
from mxd_convert.cli.app import (
    BaseOption,
    CheckpointArgument,
    JsonOption,
    RecipeArgument,
    SetOption,
    app,
    console,
    figure,
    human,
    is_figure,
    print_json,
    show,
    table_of,
)
from mxd_convert.errors import INTERRUPTED, INTERRUPTED_AND_TOLD, Stopped
from mxd_convert.processes import once_a_machine, part


@app.command(epilog="Example: `mxd-convert init openai-community/gpt2 --output gpt2.yaml`")
def init(
    base_model: Annotated[str, typer.Argument(help="Hub id or local folder of the model to convert.")],
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="File to write; default: <name>-mxd.yaml.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Write a commented recipe for a base model."""
    path = output or Path(f"{Path(base_model).name}-mxd.yaml")
    mxd_convert.write_starter(base_model, path, force)
    human.print(f"{path} written; next: mxd-convert plan {path}")


@app.command(epilog="Example: `mxd-convert plan quickstart --set layer.k=8`")
def plan(recipe: RecipeArgument, settings: SetOption = None, as_json: JsonOption = False) -> None:
    """Show what a recipe comes to: layers, experts, parameters, work, memory, disk, and the time it takes on this machine."""
    loaded = mxd_convert.load_recipe(recipe, mxd_convert.parse_overrides(settings or []))
    made = mxd_convert.make_plan(loaded)
    outlook = mxd_convert.outlook(made)
    if as_json:
        print_json({**made.to_dict(), **outlook.to_dict()})
        return
    table = table_of("layer", "in > hidden > out", "activation", "experts", "active", "parameters", "of the MLP")
    for layer in made.layers:
        shape = layer.shape
        activation = f"{shape.activation}, GLU" if shape.glu else shape.activation
        widths = " > ".join(f"{width:,}" for width in (shape.d_in, shape.d_hidden, shape.d_out) if width)
        counts = (f"{count:,}" for count in (shape.n_experts, shape.k, layer.parameters, layer.mlp_parameters))
        table.add_row(str(layer.index), widths, activation, *counts)
    out = console()
    out.print(table)
    train, memory, speed = made.recipe.train, outlook.memory, outlook.speed
    growth = made.converted_parameters / made.base_parameters
    out.print(f"model     {made.base_parameters:,} parameters, {made.converted_parameters:,} converted ({growth:.2f} x)")
    out.print(f"MLPs      {made.mlp}", soft_wrap=True)
    out.print(f"kind      {made.recipe.layer.kind}")
    out.print(
        f"training  {made.steps:,} steps of {made.tokens // made.steps:,} tokens; {train.preset} preset: lr {train.lr:g}", end=""
    )
    out.print(f", warm-up {train.warmup_steps:,} steps, {train.schedule}; layers in {_groups(outlook.groups)}", end="")
    out.print(f", the last {made.finish_steps:,} steps all together, in the model" if made.finish_steps else "")
    work, total = outlook.flops_per_token / 1e6, outlook.flops_per_token * made.tokens / 1e12
    out.print(f"work      {work:,.1f} MFLOP a token, {total:,.1f} TFLOP in all")
    out.print(f"memory    about {memory.peak / 2**20:,.0f} MiB: training {memory.training / 2**20:,.0f}", end="")
    out.print(f" of {outlook.room / 2**20:,.0f} to be had, evaluation {memory.evaluation / 2**20:,.0f}")
    out.print(f"disk      about {made.disk_bytes / 2**20:,.0f} MiB")
    if speed is not None:
        out.print(
            f"time      about {_duration(speed.seconds)} on this machine: training {_duration(speed.training_seconds)}", end=""
        )
        out.print(f" at {speed.tokens_per_second:,.0f} tokens/s, evaluation {_duration(speed.evaluation_seconds)}")
    out.print(f"output    {made.output}")
    for warning in outlook.warnings:
        out.print(f"warning   {warning}", soft_wrap=True)


def _groups(groups: list[list[int]]) -> str:
    return "one pass" if len(groups) == 1 else f"{len(groups)} passes, at most {max(map(len, groups))} at once"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


@app.command(
    epilog="Example: `mxd-convert run recipes/quickstart.yaml --set data.tokens=300000`. A run that was cut off goes on with the same command."
)
def run(
    recipe: RecipeArgument,
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Folder of the finished checkpoint.")] = None,
    settings: SetOption = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over: replace a converted checkpoint or an unfinished run there.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a model: train the layers, put them in, evaluate, report."""
    with once_a_machine():  # a mistake in the recipe is told before torch is loaded
        loaded = mxd_convert.load_recipe(recipe, mxd_convert.parse_overrides(settings or []))
    try:
        result = mxd_convert.convert(loaded, output, fresh=fresh)
    except Stopped as stopped:
        raise typer.Exit(INTERRUPTED_AND_TOLD if stopped.told else INTERRUPTED) from None
    part()
    if not result.main_process:
        return
    if as_json:
        content = {"output": str(result.output), "already_finished": result.already_finished, "url": result.url}
        print_json({**content, "onnx_failures": list(result.onnx_failures), "report": result.report})
        if result.onnx_failures:
            raise typer.Exit(1)
        return
    if result.already_finished:
        human.print("this recipe has finished before; --fresh runs it again")
    print_figures(result.report)
    if result.url is not None:
        human.print(f"published: {result.url}")
    show(result.output)
    if result.onnx_failures:
        for line in result.onnx_failures:
            human.print(f"ONNX export, out of tolerance and not written: {line}", soft_wrap=True)
        raise typer.Exit(1)


def print_figures(report: dict[str, Any]) -> None:
    fidelity, reliance = report["fidelity"], report["reliance"]
    out = console()
    summary = table_of("held-out cross-entropy", "nats a token", "perplexity")
    for name, key in (
        ("base", "ce_base"),
        ("converted", "ce_converted"),
        ("all zeroed", "ce_zero_ablation"),
        ("all at their mean", "ce_mean_ablation"),
    ):
        summary.add_row(name, figure(fidelity[key], ".4f"), figure(_perplexity(fidelity[key]), ",.2f"))
    out.print(summary)
    out.print(
        f"rise {figure(fidelity['delta_ce'], '+.4f')} on {figure(fidelity['tokens'], ',')} tokens; KL {figure(fidelity['kl'], '.4f')};"
        f" same most likely token {figure(fidelity['top1_agreement'], '.1%')};"
        f" compounding {figure(fidelity['compounding'], '.2f')}"
    )
    table = table_of(
        "layer",
        "rise alone",
        "recovered",
        "FVU",
        "FVU in place",
        "active",
        "dead",
        "gate share",
        "identity share",
        "routing necessity",
        "dims",
    )
    forms = {"delta_ce": "+.4f", "recovered_zero": ".1%", "fvu": ".3f"}
    forms |= {"fvu_in_place_local": ".3f", "l0": ".1f", "dead_fraction": ".1%"}
    for index, layer in fidelity["layers"].items():
        shares = reliance["layers"][index]
        table.add_row(
            index,
            *(figure(layer[key], form) for key, form in forms.items()),
            *(figure(shares[key], ".2f") for key in ("gate_share", "identity_share", "routing_necessity")),
            _directions(shares),
        )
    out.print(table)
    out.print(f"verdict: {reliance['sentence']}", soft_wrap=True)


def _directions(layer: Mapping[str, Any]) -> str:
    """Of the gain, and of the MLP's output. Reports from before these figures have none."""
    gain, output = (figure(layer.get(name), ".0f") for name in ("gain_dimensions", "output_dimensions"))
    return "-" if "-" in (gain, output) else f"{gain}/{output}"


def _perplexity(cross_entropy: Any) -> float | None:
    return math.exp(min(cross_entropy, 700)) if is_figure(cross_entropy) else None


@app.command(name="eval", epilog="Example: `mxd-convert eval runs/quickstart --data held-out.jsonl --tokens 50000`")
def evaluate(
    checkpoint: CheckpointArgument,
    data: Annotated[Path, typer.Option("--data", help="Held-out text: .txt, .jsonl (also .gz), .parquet, a folder or a glob.")],
    text_field: Annotated[str, typer.Option("--text-field", help="Field that holds the text of a document.")] = "text",
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens to evaluate on, at most.")] = 262_144,
    base: BaseOption = None,
    record: Annotated[
        bool, typer.Option("--record", help="Add the figures to the checkpoint's report and card, as of another text.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a checkpoint on a text: fidelity to the base model and reliance on the experts."""
    figures = mxd_convert.evaluate(checkpoint, data, tokens, text_field, base)
    if record:
        mxd_convert.record(checkpoint, figures)
    if as_json:
        print_json(figures)
    else:
        print_figures(figures)


@app.command(
    epilog="Examples: `mxd-convert verify runs/quickstart`, `mxd-convert verify runs/quickstart --provenance`. Exit status 1 where a check fails."
)
def verify(
    checkpoint: CheckpointArgument,
    base: BaseOption = None,
    provenance: Annotated[
        bool,
        typer.Option(
            "--provenance",
            help="Instead: recompute what its report says of files, recipe, base and texts, as far as they are at hand.",
        ),
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run the checkpoint's own code though it is not, to the byte, this package's."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Prove in fresh processes, with and without this package, that a checkpoint is whole and behaves as an ordinary one."""
    if provenance:
        found = mxd_convert.verify_provenance(checkpoint, base)
    else:
        found = mxd_convert.verify(checkpoint, base, trust_remote_code)
    if as_json:
        print_json(found.to_dict())
    else:
        marks = {True: "ok", False: "FAILED", None: "not checked"}
        for check in found.checks:
            show(f"{marks[check.ok]:<12}{check.check}" + (f": {check.detail}" if check.detail else ""))
    if not found.ok:
        raise typer.Exit(1)


@app.command(epilog="Example: `mxd-convert revert runs/quickstart --layers 3,4 --output runs/partly`")
def revert(
    checkpoint: CheckpointArgument,
    layers: Annotated[str, typer.Option("--layers", help='Layers to revert: "3,4", "0-2" or all.')],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give chosen layers their original MLPs back, in a new folder."""
    folder = mxd_convert.revert(checkpoint, layers, output, base)
    if as_json:
        print_json({"output": str(folder)})
    else:
        show(folder)

"""The command `plan`."""

import mxd_convert
from mxd_convert.cli.app import (
    JsonOption,
    RecipeArgument,
    SetOption,
    app,
    console,
    print_json,
    table_of,
)


@app.command(epilog="Example: `mxd-convert plan quickstart --set layer.k=8`")
def plan(recipe: RecipeArgument, settings: SetOption = None, as_json: JsonOption = False) -> None:
    """Show the layers of a recipe, with their parameters, and the compute, memory, disk and time on this machine."""
    loaded = mxd_convert.load_recipe(recipe, mxd_convert.parse_overrides(settings or []))
    made = mxd_convert.make_plan(loaded)
    forecast = mxd_convert.forecast(made)
    if as_json:
        print_json({**made.to_dict(), **forecast.to_dict()})
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
    train, memory, speed = made.recipe.train, forecast.memory, forecast.timing
    growth = made.converted_parameters / made.base_parameters
    out.print(f"model     {made.base_parameters:,} parameters, {made.converted_parameters:,} converted ({growth:.2f} x)")
    out.print(f"MLPs      {made.mlp}", soft_wrap=True)
    out.print(f"kind      {made.recipe.layer.kind}")
    out.print(
        f"training  {made.steps:,} steps of {made.tokens // made.steps:,} tokens; {train.preset} preset: lr {train.lr:g}", end=""
    )
    out.print(f", warm-up {train.warmup_steps:,} steps, {train.schedule}; layers in {_groups(forecast.groups)}", end="")
    out.print(f", the last {made.joint_steps:,} steps as a joint stage" if made.joint_steps else "")
    work, total = forecast.flops_per_token / 1e6, forecast.flops_per_token * made.tokens / 1e12
    out.print(f"work      {work:,.1f} MFLOP per token, {total:,.1f} TFLOP in total")
    out.print(f"memory    about {memory.peak / 2**20:,.0f} MiB: training {memory.training / 2**20:,.0f}", end="")
    out.print(f" of {forecast.memory_available / 2**20:,.0f} available, evaluation {memory.evaluation / 2**20:,.0f}")
    out.print(f"disk      about {made.disk_bytes / 2**20:,.0f} MiB")
    if speed is not None:
        out.print(
            f"time      about {_duration(speed.seconds)} on this machine: training {_duration(speed.training_seconds)}", end=""
        )
        out.print(f" at {speed.tokens_per_second:,.0f} tokens/s, evaluation {_duration(speed.evaluation_seconds)}")
    out.print(f"output    {made.output}")
    for warning in forecast.warnings:
        out.print(f"warning   {warning}", soft_wrap=True)


def _groups(groups: list[list[int]]) -> str:
    return "one pass" if len(groups) == 1 else f"{len(groups)} passes, at most {max(map(len, groups))} at once"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"

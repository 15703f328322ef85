"""Tables that `run` and `eval` print."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from mxd_convert.cli.app import (
    console,
    figure,
    is_figure,
    table_of,
    with_error,
)


def print_figures(report: dict[str, Any]) -> None:
    """Print the fidelity and reliance figures of a report as tables, then the verdict. Errors are standard errors over documents."""
    fidelity, reliance = report["fidelity"], report["reliance"]
    out = console()
    summary = table_of("held-out cross-entropy", "nats per token", "perplexity")
    for name, key in (
        ("base", "ce_base"),
        ("converted", "ce_converted"),
        ("all zeroed", "ce_zero_ablation"),
        ("all at their mean", "ce_mean_ablation"),
    ):
        if key in fidelity:
            cell = with_error(fidelity[key], fidelity.get(f"{key}_se"))
            summary.add_row(name, cell, figure(_perplexity(fidelity[key]), ",.2f"))
    out.print(summary)
    compounding = (
        f"; compounding {with_error(fidelity['compounding'], fidelity.get('compounding_se'), '.2f')}"
        if "compounding" in fidelity
        else ""
    )
    out.print(
        f"rise {with_error(fidelity['delta_ce'], fidelity.get('delta_ce_se'), '+.4f')} on {figure(fidelity['tokens'], ',')} tokens;"
        f" KL {with_error(fidelity['kl'], fidelity.get('kl_se'))};"
        f" same most likely token {with_error(fidelity['top1_agreement'], fidelity.get('top1_agreement_se'), '.1%')}{compounding}",
        soft_wrap=True,
    )
    if reason := fidelity.get("reason"):
        out.print(f"figures are missing: {reason}", soft_wrap=True)
    out.print(_fidelity(fidelity["layers"]))
    out.print(_reliance(reliance["layers"]))
    if variants := fidelity.get("variants"):
        where = f"on {figure(variants['tokens'], ',')} of these tokens, in {figure(variants['documents'], ',')} documents"
        out.print(f"rise alone, recovered, Jacobian error and routing necessity: {where}", soft_wrap=True)
    out.print(f"verdict: {reliance['sentence']}", soft_wrap=True)


def _fidelity(layers: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return the table of each layer's fidelity. Columns that no layer has are left out."""
    columns = {
        "rise alone": lambda layer: with_error(layer.get("delta_ce"), layer.get("delta_ce_se"), "+.4f"),
        "recovered": lambda layer: with_error(layer.get("recovered_zero"), layer.get("recovered_zero_se"), ".1%"),
        "FVU": lambda layer: with_error(layer.get("fvu"), layer.get("fvu_se"), ".3f"),
        "FVU in place": lambda layer: figure(layer.get("fvu_in_place_local"), ".3f"),
        "active": lambda layer: figure(layer.get("l0"), ".1f"),
        "dead": lambda layer: figure(layer.get("dead_fraction"), ".1%"),
        "Jacobian error": _jacobian,
    }
    return _table(layers, columns)


def _reliance(layers: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return the table of each layer's reliance on its two sides. Columns that no layer has are left out."""
    names = {
        "gate share": "gate_share",
        "hidden share": "hidden_share",
        "product share": "product_share",
        "expert share": "expert_share",
        "identity share": "identity_share",
        "routing necessity": "routing_necessity",
    }
    columns = {name: partial(_share, key) for name, key in names.items()}
    return _table(layers, {**columns, "experts for 50/90 %": _carried, "dims": _directions})


def _table(layers: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Callable[[Mapping[str, Any]], str]]) -> Any:
    rows = {index: {name: cell(layer) for name, cell in columns.items()} for index, layer in layers.items()}
    shown = [name for name in columns if any(row[name] != "-" for row in rows.values())]
    table = table_of("layer", *shown)
    for index, row in rows.items():
        table.add_row(index, *(row[name] for name in shown))
    return table


def _share(key: str, layer: Mapping[str, Any]) -> str:
    return figure(layer.get(key), ".2f")


def _jacobian(layer: Mapping[str, Any]) -> str:
    """Return the relative squared errors of the layer's changes, towards other tokens and in random directions."""
    directions = layer.get("jacobian") or {}
    return "/".join(figure(one.get("relative_squared_error"), ".2f") for one in directions.values()) or "-"


def _carried(layer: Mapping[str, Any]) -> str:
    """Return the numbers of experts that carry 50 and 90 % of the product's variance."""
    half, most = (figure(layer.get(name), ",") for name in ("experts_50", "experts_90"))
    return "-" if "-" in (half, most) else f"{half}/{most}"


def _directions(layer: Mapping[str, Any]) -> str:
    """Return the dimensions of the gain and of the MLP's output, or a dash for older reports without these figures."""
    gain, output = (figure(layer.get(name), ".0f") for name in ("gain_dimensions", "output_dimensions"))
    return "-" if "-" in (gain, output) else f"{gain}/{output}"


def _perplexity(cross_entropy: Any) -> float | None:
    return math.exp(min(cross_entropy, 700)) if is_figure(cross_entropy) else None

"""Tables that `run` and `eval` print."""

import math
from collections.abc import Mapping
from typing import Any

from mxd_convert.cli.app import (
    console,
    figure,
    is_figure,
    table_of,
)


def print_figures(report: dict[str, Any]) -> None:
    """Print the fidelity and reliance figures of a report as tables, then the verdict."""
    fidelity, reliance = report["fidelity"], report["reliance"]
    out = console()
    summary = table_of("held-out cross-entropy", "nats per token", "perplexity")
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
    """Return the dimensions of the gain and of the MLP's output, or a dash for older reports without these figures."""
    gain, output = (figure(layer.get(name), ".0f") for name in ("gain_dimensions", "output_dimensions"))
    return "-" if "-" in (gain, output) else f"{gain}/{output}"


def _perplexity(cross_entropy: Any) -> float | None:
    return math.exp(min(cross_entropy, 700)) if is_figure(cross_entropy) else None

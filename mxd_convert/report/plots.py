"""Plots of a run: training, and the fidelity and reliance of each layer."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from mxd_convert.files import replacing
from mxd_convert.report.schema import Report


def save_figure(figure: Figure, path: Path, dpi: int = 160) -> None:
    """Write a figure as a PNG file and close it."""
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=dpi, format="png")
    finally:
        plt.close(figure)


def write_plots(folder: Path, report: Report, log: Path) -> None:
    """Write plots/training.png and plots/layers.png into `folder`."""
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    _training(lines, plots / "training.png")
    _layers(report, plots / "layers.png")


def _training(lines: list[dict[str, Any]], path: Path) -> None:
    together = [line for line in lines if "kl" in line]  # only the joint stage logs a KL
    wide = 3 if together else 2
    figure, axes = plt.subplots(1, wide, figsize=(4.5 * wide, 3.4), layout="constrained")
    indices = list(lines[0]["layers"]) if lines else []
    colours = plt.get_cmap("viridis")
    panels = (("fvu", "fraction of variance unexplained"), ("dead_fraction", "share of experts idle since the last log line"))
    for axis, (name, title) in zip(axes, panels, strict=False):
        for number, index in enumerate(indices):
            values = [line["layers"][index][name] for line in lines]
            axis.plot(
                [line["tokens"] for line in lines],
                values,
                color=colours(number / max(1, len(indices) - 1)),
                label=f"layer {index}",
            )
        axis.set_title(title, fontsize=10)
        if together:
            axis.axvspan(together[0]["tokens"], together[-1]["tokens"], color="grey", alpha=0.12, linewidth=0)
    if together:
        axes[2].plot([line["tokens"] for line in together], [line["kl"] for line in together], color="#31688e")
        axes[2].set_title("joint stage (grey): KL from the base, nats per token", fontsize=10)
        axes[2].set_ylim(bottom=0)
    for axis in axes:
        axis.set_xlabel("training tokens")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("log")
    axes[1].set_ylim(0, 1)
    if 0 < len(indices) <= 16:
        axes[0].legend(fontsize=7, frameon=False, ncols=2)
    save_figure(figure, path, dpi=130)


def _layers(report: Report, path: Path) -> None:
    assert report.fidelity is not None
    assert report.reliance is not None
    fidelity, reliance = report.fidelity.layers, report.reliance.layers
    indices = list(fidelity)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    axes[0].bar(indices, [fidelity[index].delta_ce or 0.0 for index in indices], color="#31688e")
    axes[0].set_title("rise in cross-entropy, this layer alone (nats per token)", fontsize=10)
    colours = {"gate_share": "#440154", "identity_share": "#31688e", "routing_necessity": "#35b779"}
    for offset, (name, colour) in enumerate(colours.items()):
        label = name.replace("_", " ")
        positions = [number + (offset - 1) * 0.26 for number in range(len(indices))]
        axes[1].bar(
            positions, [getattr(reliance[index], name) or 0.0 for index in indices], width=0.24, label=label, color=colour
        )
    axes[1].set_xticks(range(len(indices)), indices)
    axes[1].axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes[1].set_title("reliance on the experts", fontsize=10)
    axes[1].legend(fontsize=7, frameon=False)
    for axis in axes:
        axis.set_xlabel("layer")
        axis.grid(alpha=0.3, axis="y")
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, dpi=130)

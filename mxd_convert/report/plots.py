"""Plots of a run: training, and the fidelity and reliance of each layer."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from mxd_convert.files import replacing
from mxd_convert.report.difference import known
from mxd_convert.report.schema import Report

SHARES = ("gate_share", "hidden_share")
MANY_LAYERS = 16  # more have no legend, and their panels are one above the other


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
    _training(_whole_windows(lines), plots / "training.png")
    _layers(report, plots / "layers.png")


def _whole_windows(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of the log without those of a few steps, at the end of a stage, whose figures are too noisy to show."""
    before = [0, *(line["tokens"] for line in lines)]
    windows = [
        line["tokens"] - start if line["tokens"] > start else line["tokens"] for line, start in zip(lines, before, strict=False)
    ]
    return [line for line, window in zip(lines, windows, strict=True) if 2 * window >= max(windows)]


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
    if 0 < len(indices) <= MANY_LAYERS:
        axes[0].legend(fontsize=7, frameon=False, ncols=2)
    elif indices:
        scale = ScalarMappable(Normalize(int(indices[0]), int(indices[-1])), colours)
        figure.colorbar(scale, ax=axes[1], label="layer")
    save_figure(figure, path, dpi=130)


def _layers(report: Report, path: Path) -> None:
    assert report.fidelity is not None
    assert report.reliance is not None
    fidelity, reliance = report.fidelity.layers, report.reliance.layers
    indices = list(fidelity)
    many = len(indices) > MANY_LAYERS
    figure, axes = plt.subplots(*((2, 1) if many else (1, 2)), figsize=(9, 6.4 if many else 3.4), layout="constrained")
    rises, errors = ([getattr(fidelity[index], name) or 0.0 for index in indices] for name in ("delta_ce", "delta_ce_se"))
    axes[0].bar(range(len(indices)), rises, yerr=errors, color="#31688e", ecolor="#222222", capsize=2)
    axes[0].set_title("rise in cross-entropy, this layer alone (nats per token)", fontsize=10)
    colours = {"gate_share": "#440154", "hidden_share": "#b5367a", "product_share": "#fb8861", "routing_necessity": "#35b779"}
    for number, (name, colour) in enumerate(colours.items()):
        values = [getattr(reliance[index], name) for index in indices]
        if any(value is not None for value in values):
            positions = [at + (number - 1.5) * 0.2 for at in range(len(indices))]
            label = name.replace("_", " ")
            axes[1].bar(positions, [value or 0.0 for value in values], width=0.19, label=label, color=colour)
    axes[1].set_title("reliance on each side of the product", fontsize=10)
    axes[1].set_ylim(top=1.2 * axes[1].get_ylim()[1])  # room for the legend
    axes[1].legend(fontsize=7, frameon=False, ncols=4, loc="upper center")
    for axis in axes:
        axis.set_xticks(range(len(indices)), indices)
        axis.set_xlim(-0.7, len(indices) - 0.3)
        axis.set_xlabel("layer")
        axis.set_axisbelow(True)
        axis.grid(alpha=0.3, axis="y")
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, dpi=130)


def plot_shares(reports: Mapping[str, Report], path: Path) -> None:
    """Write the rise in cross-entropy of some reports, by name, against the gate and the hidden share of their layers, as PNG."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for number, (name, report) in enumerate(reports.items()):
        rise = None if report.fidelity is None else known(report.fidelity.delta_ce)
        if report.fidelity is None or report.reliance is None or rise is None:
            continue
        error = max(0.0, known(report.fidelity.delta_ce_se) or 0.0)
        colour = plt.get_cmap("tab10")(number % 10)
        for axis, share in zip(axes, SHARES, strict=True):
            values = [value for layer in report.reliance.layers.values() if (value := known(getattr(layer, share))) is not None]
            if not values:
                continue
            middle = sum(values) / len(values)
            spread = [[middle - min(values)], [max(values) - middle]]
            axis.errorbar(middle, rise, error, spread, marker="o", color=colour, capsize=2, label=name)
    shares_axes(axes)
    if labels := axes[0].get_legend_handles_labels()[0]:
        figure.legend(handles=labels, fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    save_figure(figure, path)


def shares_axes(axes: Sequence[Any]) -> None:
    """Label two panels, the rise in cross-entropy against gate share and against hidden share."""
    for axis, share, low in zip(axes, SHARES, ("dense layer: 0", "transcoder: 0"), strict=True):
        axis.set_xlim(-0.04, 1.06)
        axis.set_xlabel(f"{share.replace('_', ' ')}, mean and range over layers ({low})")
        axis.axhline(0, color="black", linewidth=1.0)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("rise in cross-entropy (nats per token)")

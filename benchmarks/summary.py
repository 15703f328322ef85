"""The tables of docs/results/: one line per kind of sweeps over a single layer, or one per layer of a conversion.

    python benchmarks/summary.py SWEEP [SWEEP ...]
    python benchmarks/summary.py CHECKPOINT

Of sweeps, the mean over seeds. An error is the larger of two standard errors: over documents (the mean of the seeds'), and over seeds, where
there are several. Shares and Jacobian errors are given as the range over seeds.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPORT = "mxd_report.json"
HEAD = (
    "layer",
    "seeds",
    "rise",
    "FVU",
    "dead",
    "gate share",
    "hidden share",
    "product share",
    "Jacobian error",
    "random directions",
)


OF_A_LAYER = (
    *("layer", "rise alone", "FVU", "dead", "gate share", "hidden share", "expert share", "routing necessity"),
    *("Jacobian error, data / random", "experts for half of the output"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+")
    folders = parser.parse_args().folder
    if (folders[0] / REPORT).is_file():
        _show_layers(json.loads((folders[0] / REPORT).read_text()))
    else:
        _show_sweeps(folders)


def _show_layers(report: dict[str, Any]) -> None:
    print(f"| {' | '.join(OF_A_LAYER)} |\n|{'---|' * len(OF_A_LAYER)}")
    for index, layer in report["fidelity"]["layers"].items():
        reliance, jacobian = report["reliance"]["layers"][index], layer["jacobian"]
        cells = [
            *(index, _mean([layer], "delta_ce", "+.3f"), f"{layer['fvu']:.2f}", f"{layer['dead_fraction']:.2f}"),
            *(f"{reliance[name]:.2f}" for name in ("gate_share", "hidden_share", "expert_share", "routing_necessity")),
            " / ".join(f"{jacobian[along]['relative_squared_error']:.2f}" for along in ("data", "random")),
            f"{reliance['experts_50']:,}",
        ]
        print(f"| {' | '.join(cells)} |")


def _show_sweeps(folders: Sequence[Path]) -> None:
    groups: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        for row in json.loads((folder / "sweep.json").read_text())["runs"]:
            if "error" in row:
                continue
            report = json.loads((folder / "runs" / row["name"] / REPORT).read_text())
            settings = {key.rpartition(".")[2]: value for key, value in row.items() if "." in key and key != "train.seed"}
            groups.setdefault(", ".join(f"{key} {value}" for key, value in settings.items()), []).append(report)
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for name, reports in groups.items():
        print(f"| {name} | {len(reports)} | {' | '.join(_cells(reports))} |")


def _cells(reports: Sequence[dict[str, Any]]) -> list[str]:
    layers = [next(iter(report["fidelity"]["layers"].values())) for report in reports]
    reliance = [next(iter(report["reliance"]["layers"].values())) for report in reports]
    jacobian = [layer.get("jacobian") or {} for layer in layers]
    return [
        _mean([report["fidelity"] for report in reports], "delta_ce", "+.4f"),
        _mean(layers, "fvu", ".3f"),
        _range([layer.get("dead_fraction") for layer in layers]),
        *(_range([layer.get(name) for layer in reliance]) for name in ("gate_share", "hidden_share", "product_share")),
        *(_range([one.get(along, {}).get("relative_squared_error") for one in jacobian]) for along in ("data", "random")),
    ]


def _mean(layers: Sequence[dict[str, Any]], key: str, form: str) -> str:
    values = [layer[key] for layer in layers]
    error = statistics.fmean(layer[f"{key}_se"] or 0.0 for layer in layers)
    if len(values) > 1:
        error = max(error, statistics.stdev(values) / len(values) ** 0.5)
    return f"{statistics.fmean(values):{form}} ± {error:{form.replace('+', '')}}"


def _range(values: Sequence[float | None]) -> str:
    known = sorted({f"{value:.2f}" for value in values if value is not None}, key=float)
    return " to ".join(dict.fromkeys((known[0], known[-1]))) if known else "–"


if __name__ == "__main__":
    main()

"""One line per kind of a sweep over a single layer, with the mean over seeds: what docs/results/ shows.

    python benchmarks/summary.py SWEEP [SWEEP ...]

An error is the larger of two standard errors: over documents (the mean of the seeds'), and over seeds, where there are several. Shares and
Jacobian errors are given as the range over seeds.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, nargs="+")
    arguments = parser.parse_args()
    groups: dict[str, list[dict[str, Any]]] = {}
    for folder in arguments.sweep:
        for row in json.loads((folder / "sweep.json").read_text())["runs"]:
            if "error" in row:
                continue
            report = json.loads((folder / "runs" / row["name"] / "mxd_report.json").read_text())
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

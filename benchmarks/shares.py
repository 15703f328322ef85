"""What kind of layer each recipe trains: shares, Jacobian faithfulness and verdict of conversions of stories260K, as a table and a plot.

    python benchmarks/shares.py --output FOLDER [--tokens 600000] [--k 8] [--seed 0] [--plot docs/concepts/shares.png]

Each row is a conversion of all layers, evaluated as loaded from disk. A run resumes if it was interrupted, and is kept in FOLDER. The
learning rate of `paper` is that of benchmarks/study.py at this budget.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mxd_convert import convert
from mxd_convert.recipe.kinds import KINDS

PAPER = {"train.preset": "paper", "train.lr": 2e-2, "train.warmup_steps": 7}
# `fast` before December 2026
BEFORE = {"layer.hidden": 43, "layer.shared_expert": False, "train.jacobian": 0.0, "train.joint_lr": 2e-3}
CASES: dict[str, dict[str, Any]] = {
    "`fast`": {},
    "`paper`": PAPER,
    "`fast`, before": BEFORE,
    "transcoder": {"layer.kind": "transcoder"},
    "skip transcoder": {"layer.kind": "skip_transcoder"},
    "additive control": {"layer.kind": "dense_assisted"},
    "dense twin": {"layer.kind": "dense_twin"},
}
PLOTTED = ("`fast`", "`paper`", "`fast`, before", "transcoder", "dense twin")
SHARES = ("gate_share", "hidden_share", "product_share", "expert_share")


def row(name: str, report: dict[str, Any]) -> str:
    """Return a row of the table: means over layers, and the range where it is wider than .02."""
    fidelity, layers = report["fidelity"], report["reliance"]["layers"].values()
    cells = [name, f"{fidelity['delta_ce']:+.3f} ± {fidelity['delta_ce_se']:.3f}"]
    for share in SHARES:
        values = [layer[share] for layer in layers]
        cells.append(
            f"{min(values):.2f} to {max(values):.2f}" if max(values) - min(values) > 0.02 else f"{sum(values) / len(values):.2f}"
        )
    for direction in ("data", "random"):
        found = [layer["jacobian"][direction] for layer in fidelity["layers"].values()]
        cosine, error = (sum(one[key] for one in found) / len(found) for key in ("cosine", "relative_squared_error"))
        cells.append(f"{cosine:.2f} / {error:.2f}")
    return f"| {' | '.join([*cells, report['reliance']['verdict']])} |"


def plot(reports: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the plane of gate share and hidden share, with its corners named and every layer of five checkpoints."""
    figure, axis = plt.subplots(figsize=(6.4, 5.2), layout="constrained")
    corners = {
        (0.98, 0.14): ("transcoder", "right"),
        (0.02, 0.93): ("dense layer", "left"),
        (0.98, 1.0): ("mixture of decoders", "right"),
        (0.02, 0.03): ("constant output", "left"),
    }
    for at, (text, side) in corners.items():
        axis.text(*at, text, ha=side, fontsize=10, color="#555555", style="italic")
    colours = {
        "`paper`": "#c9952b",
        "`fast`": KINDS["mxd"].colour,
        "`fast`, before": "#c46bd1",
        "transcoder": KINDS["transcoder"].colour,
        "dense twin": KINDS["dense_twin"].colour,
    }
    for name in PLOTTED:
        layers = reports[name]["reliance"]["layers"]
        points = [(layer["gate_share"], layer["hidden_share"]) for layer in layers.values()]
        axis.scatter(
            *zip(*points, strict=True),
            s=48,
            color=colours[name],
            label=name.replace("`", ""),
            zorder=3,
            alpha=0.85,
            clip_on=False,
        )
        if name.startswith("`"):
            for index, (x, y) in zip(layers, points, strict=True):
                axis.annotate(index, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7, color=colours[name])
    axis.axvspan(0, 0.1, color="grey", alpha=0.1, lw=0)
    axis.axhspan(0, 0.1, color="grey", alpha=0.1, lw=0)
    axis.set(xlim=(-0.02, 1.04), ylim=(-0.02, 1.04), xlabel="gate share", ylabel="hidden share")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("numbers at the points: layers; grey: below a tenth", fontsize=8, color="#555555", loc="right")
    figure.legend(fontsize=9, frameon=False, loc="outside lower center", ncols=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the conversions")
    parser.add_argument("--tokens", type=int, default=600_000)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    common = {"layer.k": arguments.k, "layer.experts": "auto", "data.tokens": arguments.tokens}
    common |= {"train.seed": arguments.seed}
    reports = {}
    for name, settings in CASES.items():
        folder = arguments.output / name.replace("`", "").replace(", ", "-").replace(" ", "-")
        reports[name] = convert("stories260k", folder, {**common, **settings}, quiet=True).report
        print(json.dumps({"case": name, "evaluation": reports[name]["cost"]["evaluation"]}), flush=True)
    print(
        "\n| layer | rise | gate share | hidden share | product share | expert share | Jacobian, data: cosine / error | random | verdict |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, report in reports.items():
        print(row(name, report))
    if arguments.plot:
        plot(reports, arguments.plot)


if __name__ == "__main__":
    main()

"""The results of a sweep: one row per run, the table, and the frontier plots."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from mxd_convert.files import write_csv, write_json
from mxd_convert.plan.resolve import LayerPlan
from mxd_convert.recipe.kinds import KINDS
from mxd_convert.recipe.schema import Recipe
from mxd_convert.report.plots import SHARES, save_figure, shares_axes
from mxd_convert.report.schema import Report, Section

_FIGURES = ("ce_base", "ce_converted", "delta_ce", "ce_zero_ablation", "ce_mean_ablation", "kl", "top1_agreement", "compounding")

_RELIANCE = ("gate_share", "hidden_share", "product_share", "expert_share", "identity_share", "routing_necessity")


def row_of(report: Report, recipe: Recipe, layers: Sequence[LayerPlan]) -> dict[str, Any]:
    """Return a run's row: kind, k, seed, sizes, figures of the whole model, and means over its layers.

    Figures that the kind of layer doesn't have are None.
    """
    fidelity, reliance, data, cost = report.fidelity, report.reliance, report.data, report.cost
    assert fidelity and reliance and data and data.train and cost  # noqa: PT018 (a run measures all of them)
    shapes = [layer.shape for layer in layers]
    return {
        "kind": recipe.layer.kind,
        "k": shapes[0].k or None,
        "seed": recipe.train.seed,
        "experts": shapes[0].n_experts,
        "parameters": sum(layer.parameters for layer in layers),
        "tokens": data.train.tokens,
        "eval_tokens": fidelity.tokens,
        **{key: getattr(fidelity, key) for name in _FIGURES for key in (name, f"{name}_se")},
        **{name: _mean(fidelity.layers, name) for name in ("fvu", "fvu_in_place_local", "l0", "dead_fraction")},
        **{name: _mean(reliance.layers, name) for name in _RELIANCE},
        **{
            f"lowest_{name}": min(
                (value for layer in reliance.layers.values() if (value := getattr(layer, name)) is not None), default=None
            )
            for name in SHARES
        },
        "verdict": reliance.verdict,
        "train_seconds": cost.train_seconds,
        "recipe_sha256": report.recipe_sha256,
    }


def _mean(layers: Mapping[str, Section], name: str) -> float | None:
    values = [value for layer in layers.values() if (value := getattr(layer, name)) is not None]
    return sum(values) / len(values) if values else None


def write_table(folder: Path, content: Mapping[str, Any]) -> None:
    """Write sweep.json (the recipe shared by all runs, and the rows) and sweep.csv (the rows) into `folder`."""
    rows = content["runs"]
    write_csv(folder / "sweep.csv", list(dict.fromkeys(key for row in rows for key in row)), rows)
    write_json(folder / "sweep.json", content)


def write_frontier(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write frontier.png and shares.png into `folder`: the rise in cross-entropy against K, and against both sides' shares."""
    folder.mkdir(exist_ok=True)
    rows = [row for row in rows if None not in (row.get(name) for name in ("ce_base", "delta_ce", "ce_zero_ablation"))]
    if not rows:  # no run has finite figures
        return
    _frontier(rows, folder / "frontier.png")
    _shares(rows, folder / "shares.png")


def _lines(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[int, list[Mapping[str, Any]]]]:
    """Group rows with experts by (kind, other swept settings), then by K. A group has one row per seed."""
    found: dict[tuple[str, str], dict[int, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    known = ("layer.kind", "layer.k", "train.seed")
    for row in rows:
        if row["k"] is not None:
            others = ", ".join(
                f"{key.rpartition('.')[2]} {row[key]}" for key in row if ("." in key or key == "layers") and key not in known
            )
            found[row["kind"], others][row["k"]].append(row)
    return found


def _frontier(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure, (above, axis) = plt.subplots(
        2, 1, figsize=(6.4, 4.6), sharex=True, layout="constrained", gridspec_kw={"height_ratios": [1, 7], "hspace": 0.02}
    )
    seeds = len({row["seed"] for row in rows}) > 1
    ks = sorted({row["k"] for row in rows if row["k"] is not None}) or [1]
    for number, ((kind, others), line) in enumerate(_lines(rows).items()):
        at = sorted(line)
        rises = [[row["delta_ce"] for row in line[k]] for k in at]
        style = ("-", "--", ":", "-.")[list(dict.fromkeys(o for k, o in _lines(rows) if k == kind)).index(others) % 4]
        label = _label(kind, others)
        colour = KINDS[kind].colour
        errors = [_middle([row.get("delta_ce_se") or 0.0 for row in line[k]]) for k in at]
        axis.errorbar(
            at,
            [_middle(values) for values in rises],
            errors,
            ls=style,
            marker=KINDS[kind].marker,
            color=colour,
            label=label,
            ms=5,
            capsize=2,
            zorder=3 + number,
        )
        if seeds:
            axis.fill_between(
                at, [min(values) for values in rises], [max(values) for values in rises], color=colour, alpha=0.18, lw=0
            )
    zero = _middle([row["ce_zero_ablation"] - row["ce_base"] for row in rows])
    base = _middle([row["ce_base"] for row in rows])
    twins = [row["delta_ce"] for row in rows if row["kind"] == "dense_twin"]
    if twins:
        axis.axhline(_middle(twins), color=KINDS["dense_twin"].colour, ls="--", lw=1.2, label=KINDS["dense_twin"].title)
        if len(twins) > 1:
            axis.axhspan(min(twins), max(twins), color=KINDS["dense_twin"].colour, alpha=0.15, lw=0)
    axis.axhline(0, color="black", lw=1.0, label=f"base model ({base:.3f})")
    above.axhline(zero, color="#b22222", lw=1.2, label=f"all zeroed (+{zero:.2f})")
    above.set_ylim(zero * 0.97, zero * 1.03)
    above.set_yticks([zero], [f"{zero:.1f}"])
    highest = max([row["delta_ce"] for row in rows], default=1.0)
    lowest = min([0.0, *(row["delta_ce"] for row in rows)])
    axis.set_ylim(lowest - 0.03 * highest, 1.08 * highest)
    _k_axis(axis, ks)
    axis.set_xlabel("active experts per token, K")
    axis.set_ylabel("rise in cross-entropy (nats per token)")
    _broken(above, axis)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    save_figure(figure, path)


def _shares(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, layout="constrained")
    for (kind, others), line in _lines(rows).items():
        points = [row for k in sorted(line) for row in line[k]]
        style: dict[str, Any] = {"marker": KINDS[kind].marker, "color": KINDS[kind].colour}
        for axis, name in zip(axes, SHARES, strict=True):
            shown = [row for row in points if row.get(name) is not None]
            at, rises, errors = ([row.get(key) or 0.0 for row in shown] for key in (name, "delta_ce", "delta_ce_se"))
            label = _label(kind, others) if axis is axes[0] else None
            axis.errorbar(at, rises, errors, ls="none", ms=6, capsize=2, lw=0.8, zorder=3, label=label, **style)
            for row in shown:
                beside = (-13, 3) if kind == "skip_transcoder" else (5, 3)  # the plain transcoder's labels are close on the right
                where = row[name], row["delta_ce"]
                axis.annotate(str(row["k"]), where, xytext=beside, textcoords="offset points", fontsize=7, color="#555555")
    twins = [row["delta_ce"] for row in rows if row["kind"] == "dense_twin"]
    for axis, share in zip(axes, (0.0, 1.0), strict=True) if twins else ():
        label = KINDS["dense_twin"].title if axis is axes[0] else None
        axis.scatter([share] * len(twins), twins, s=80, zorder=3, marker="*", color=KINDS["dense_twin"].colour, label=label)
    shares_axes(axes)
    axes[0].set_title("numbers at the points: K", fontsize=8, color="#555555", loc="right")
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    save_figure(figure, path)


def _label(kind: str, others: str) -> str:
    return ", ".join(text for text in (KINDS[kind].title, others) if text)


def _middle(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _k_axis(axis: Axes, ks: list[int]) -> None:
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(ks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.set_xlim(ks[0] / 1.15, ks[-1] * 1.15)


def _broken(above: Axes, below: Axes) -> None:
    """Mark the y axis as broken between the two panels."""
    above.spines[["top", "right", "bottom"]].set_visible(False)
    below.spines[["top", "right"]].set_visible(False)
    above.tick_params(bottom=False)
    below.grid(alpha=0.3)
    marks: dict[str, Any] = {
        "marker": [(-1, -0.6), (1, 0.6)],
        "markersize": 8,
        "linestyle": "none",
        "color": "black",
        "mec": "black",
        "clip_on": False,
    }
    above.plot([0], [0], transform=above.transAxes, **marks)
    below.plot([0], [1], transform=below.transAxes, **marks)

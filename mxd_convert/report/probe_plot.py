"""The plot of linear probes: F1 of each class by family of units, with its interval."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from mxd_convert.recipe.kinds import KINDS
from mxd_convert.report.plots import save_figure

_NEURON, _WHOLE = ("#b5403a", "v"), ("#000000", "|")
_MORE = (("#4477aa", "P"), ("#888888", "X"), ("#aa3377", "<"), ("#66ccee", ">"))  # for a second family of the same kind
_CHANCE: dict[str, Any] = {"color": "#555555", "linewidth": 1, "linestyle": (0, (2, 2))}
_ROW = 0.15  # inches per family; each class has two more rows as space
_MAX_CHARACTERS = 40  # characters shown of a class's name


def plot_probe(path: Path, content: dict[str, Any]) -> None:
    """Write the plot of a probe.json's content."""
    families, classes = list(content["families"]), content["data"]["classes"]
    rows = {(row["class"], row["family"]): row for row in content["results"]}
    whole = {family for family in families if content["families"][family]["whole_vector"]}
    styles = _styles(content["families"])
    pitch = len(families) + 2
    figure, axis = plt.subplots(figsize=(7.2, 1.5 + _ROW * pitch * len(classes)), layout="constrained")
    for number, label in enumerate(classes):
        middle = -number * pitch
        if number % 2:
            axis.axhspan(middle - pitch / 2, middle + pitch / 2, color="#f4f4f4", linewidth=0, zorder=0)
        chance, reach = rows[label, families[0]]["chance"], (len(families) + 0.6) / 2
        axis.plot([chance, chance], [middle - reach, middle + reach], **_CHANCE, zorder=1)
        for row_number, (family, (colour, marker)) in enumerate(styles.items()):
            row, y = rows[label, family], middle + (len(families) - 1) / 2 - row_number
            axis.plot([row["f1_low"], row["f1_high"]], [y, y], color=colour, linewidth=1.3, clip_on=False, zorder=2)
            axis.plot(row["f1"], y, color=colour, **_marker(marker), clip_on=False, zorder=3)
    names = [f"{_plain(label)}\n{counts['test']} documents" for label, counts in classes.items()]
    axis.set_yticks([-number * pitch for number in range(len(classes))], names, fontsize=9)
    axis.set_ylim(-(len(classes) - 0.5) * pitch, pitch / 2)
    axis.set_xlim(0, 1)
    axis.set_xlabel(f"F1 on {content['results'][0]['test_documents']:,} test documents, with 95 % intervals")
    axis.tick_params(axis="y", length=0)
    axis.grid(alpha=0.35, axis="x", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    handles = [Line2D([], [], color=colour, linewidth=1.3, **_marker(marker)) for colour, marker in styles.values()]
    legend = [_plain(family if family in whole else f"best {family}") for family in families]
    figure.legend(
        [*handles, Line2D([], [], **_CHANCE)],
        [*legend, "all called positive"],
        loc="outside upper left",
        ncols=3,
        fontsize=8.5,
        frameon=False,
    )
    axis.set_title(f"{_plain(content['checkpoint']['name'])} on {_plain(content['data']['path'])}", fontsize=10, loc="left")
    save_figure(figure, path)


def _styles(families: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return (colour, marker) of each family: its kind's, as in the plots of a sweep, or another if that is taken."""
    more = itertools.cycle(_MORE)
    styles: dict[str, tuple[str, str]] = {}
    for family, about in families.items():
        kind = about["kind"]
        style = _WHOLE if about["whole_vector"] else _NEURON if kind == "neuron" else _style(kind)
        styles[family] = style if style[1] and style not in styles.values() else next(more)
    return styles


def _marker(marker: str) -> dict[str, Any]:
    thin = marker == "|"
    return {"marker": marker, "markersize": 8 if thin else 5, "markeredgewidth": 2 if thin else 0}


def _plain(label: str) -> str:
    """Return an untrusted name on one line, shortened, with `$` escaped, which matplotlib would read as mathematics."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in label).split())
    return (line if len(line) <= _MAX_CHARACTERS else line[: _MAX_CHARACTERS - 1] + "…").replace("$", r"\$")


def _style(kind: str) -> tuple[str, str]:
    """Return colour and marker of a kind; empty strings for anything else, such as a folder with layers of several kinds."""
    return (KINDS[kind].colour, KINDS[kind].marker) if kind in KINDS else ("", "")

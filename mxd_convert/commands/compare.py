"""`compare`: the reports of two checkpoints side by side."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mxd_convert.checkpoint.read import REPORT, read_config, read_report
from mxd_convert.errors import InputError
from mxd_convert.recipe.load import read_recipe_yaml
from mxd_convert.report.difference import FIGURES, difference
from mxd_convert.report.plots import plot_shares
from mxd_convert.report.schema import Report

_WHOLE = ("ce_base", "ce_converted", "delta_ce", "kl", "top1_agreement", "compounding", "recovered_zero", "recovered_mean")
_LAYER = ("delta_ce", "recovered_zero", "recovered_mean", "fvu", "fvu_in_place_local", "l0", "dead_fraction")
_WITHOUT_ERROR = ("dead_fraction_se",)
_SHARES = ("gate_share", "hidden_share", "product_share", "expert_share", "identity_share", "routing_necessity")


def compare(one: str | Path, other: str | Path, plot: str | Path | None = None) -> dict[str, Any]:
    """Compare the reports of two checkpoints, figure by figure.

    Args:
        one: Folder of a converted checkpoint.
        other: Folder of the checkpoint to compare it with.
        plot: PNG file to write: the rise in cross-entropy of each checkpoint against the gate and hidden shares of its layers.

    Returns:
        A dict with `same_base`, `same_eval_text`, `settings` (the recipe keys that differ), `whole` (figures of the model and their
        standard errors), `differences` (`other` minus `one` in delta_ce and kl: value, standard error, whether it is paired over
        documents and within noise), `layers` (figures by layer index, with standard errors) and `verdicts`. Every figure is a
        list of two values, with None if a report lacks it.

    Raises:
        InputError: A checkpoint has no complete report.
    """
    reports = [_report(Path(folder)) for folder in (one, other)]
    recipes = [_recipe(Path(folder)) for folder in (one, other)]
    if plot is not None:
        names = [Path(folder).resolve().name for folder in (one, other)]
        plot_shares(dict(zip(names, reports, strict=True)) if names[0] != names[1] else _numbered(names, reports), Path(plot))
    settings = {}
    for key in sorted(recipes[0].keys() | recipes[1].keys()):
        values = [recipe.get(key) for recipe in recipes]
        if values[0] != values[1]:
            settings[key] = values
    measured = [_at(report, "fidelity", "layers") for report in reports]
    indices = {index for found in measured if isinstance(found, Mapping) for index in found}
    sections = [(key, "fidelity") for name in _LAYER for key in (name, f"{name}_se") if key not in _WITHOUT_ERROR]
    sections += [(name, "reliance") for name in _SHARES]
    layers = {
        index: {name: [_at(report, section, "layers", index, name) for report in reports] for name, section in sections}
        for index in sorted(indices, key=_in_order)
    }
    texts = [[_at(report, "data", "eval", "fingerprint"), _at(report, "fidelity", "tokens")] for report in reports]
    return {
        "same_base": _same(*([_at(report, "base", "sha256")] for report in reports)),
        "same_eval_text": _same(*texts),
        "settings": settings,
        "whole": {key: [_at(report, "fidelity", key) for report in reports] for name in _WHOLE for key in (name, f"{name}_se")},
        "differences": {
            name: None if (found := difference(reports[0], reports[1], name)) is None else found.to_dict() for name in FIGURES
        },
        "layers": layers,
        "verdicts": [_at(report, "reliance", "sentence") or _at(report, "reliance", "verdict") for report in reports],
    }


def _numbered(names: list[str], reports: list[Report]) -> dict[str, Report]:
    """Return the reports by name, for names that are equal."""
    return {f"{name} ({number})": report for number, (name, report) in enumerate(zip(names, reports, strict=True), 1)}


def _at(content: Any, *keys: str) -> Any:
    """Return the value at a path of fields and keys, or None if it is missing."""
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else getattr(content, key, None)
    return content


def _same(one: list[Any], other: list[Any]) -> bool:
    """Return whether the values are all known and equal."""
    return None not in one and one == other


def _in_order(index: str) -> tuple[bool, int, str]:
    return not index.isdecimal(), len(index), index


def _report(folder: Path) -> Report:
    read_config(folder)
    report = read_report(folder)
    if report is None:
        raise InputError(
            f"{folder}: has no {REPORT}, so there are no figures to compare. Checkpoints written by `mxd-convert run` have one."
        )
    for section in ("data", "fidelity", "reliance"):
        if getattr(report, section) is None or (section == "data" and report.data is not None and report.data.eval is None):
            raise InputError(
                f"{folder / REPORT}: has no {section}, so there are no figures to compare. `mxd-convert eval` measures the checkpoint."
            )
    return report


def _recipe(folder: Path) -> dict[str, Any]:
    """Return the recipe of a checkpoint as dotted keys and values, without the `output` section."""
    path = folder / "recipe.yaml"
    content = read_recipe_yaml(path) if path.is_file() else {}
    content.pop("output", None)
    return _flat(content)


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found

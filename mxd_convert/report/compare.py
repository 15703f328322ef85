"""`compare`: two checkpoints' reports side by side."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mxd_convert.checkpoint import REPORT, read_config
from mxd_convert.errors import InputError

_WHOLE = ("ce_base", "ce_converted", "delta_ce", "kl", "top1_agreement", "compounding", "recovered_zero")
_LAYER = ("delta_ce", "fvu", "fvu_in_place_local", "l0", "dead_fraction")
_SHARES = ("gate_share", "identity_share", "routing_necessity")


def compare(one: str | Path, other: str | Path) -> dict[str, Any]:
    """The reports of two checkpoints, figure by figure: [of one, of the other], None where one has not got it.

    Returns {"same_base", "same_eval_text", "settings", "whole", "layers", "verdicts"}; settings: the recipe's keys that differ.
    Raises InputError where one has no report.
    """
    reports = [_report(Path(folder)) for folder in (one, other)]
    recipes = [_recipe(Path(folder)) for folder in (one, other)]
    settings = {}
    for key in sorted(recipes[0].keys() | recipes[1].keys()):
        values = [recipe.get(key) for recipe in recipes]
        if values[0] != values[1]:
            settings[key] = values
    indices = sorted({index for report in reports for index in report["fidelity"]["layers"]}, key=int)
    layers = {
        index: {
            **{name: [report["fidelity"]["layers"].get(index, {}).get(name) for report in reports] for name in _LAYER},
            **{name: [report["reliance"]["layers"].get(index, {}).get(name) for report in reports] for name in _SHARES},
        }
        for index in indices
    }
    return {
        "same_base": reports[0]["base"]["sha256"] == reports[1]["base"]["sha256"],
        "same_eval_text": _fingerprint(reports[0]) == _fingerprint(reports[1]),
        "settings": settings,
        "whole": {name: [report["fidelity"].get(name) for report in reports] for name in _WHOLE},
        "layers": layers,
        "verdicts": [report["reliance"].get("sentence", report["reliance"]["verdict"]) for report in reports],
    }


def _fingerprint(report: Mapping[str, Any]) -> tuple[Any, Any]:
    return report["data"]["eval"]["fingerprint"], report["fidelity"]["tokens"]


def _report(folder: Path) -> dict[str, Any]:
    read_config(folder)
    path = folder / REPORT
    if not path.is_file():
        raise InputError(f"{folder}: has no {REPORT}, so nothing to compare; only checkpoints that `run` has finished have one")
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        assert report["fidelity"]["layers"]
        assert report["reliance"]["verdict"]
    except (ValueError, KeyError, TypeError, AssertionError, UnicodeDecodeError):
        raise InputError(f"{path}: not a readable report; download it or convert again") from None
    return report


def _recipe(folder: Path) -> dict[str, Any]:
    """The keys of a checkpoint's recipe, written with dots, without those of its output."""
    path = folder / "recipe.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
        content.pop("output", None)
        return _flat(content)
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        raise InputError(f"{path}: not a readable recipe; download it or convert again") from None


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found

"""The difference of two reports in a figure, with its standard error.

Two evaluations of the same text are paired: the error is that of the difference per document, which is much smaller than the
errors of both figures.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mxd_convert.evaluation.by_document import ratio
from mxd_convert.report.schema import ByDocument, Report

NOISE = 2.0  # standard errors; a smaller difference is within noise
_VALUES: dict[str, Callable[[ByDocument], list[float]]] = {
    "delta_ce": lambda found: [after - before for before, after in zip(found.ce_base, found.ce_converted, strict=False)],
    "kl": lambda found: found.kl,
    "top1_agreement": lambda found: found.top1_agreement,
}
FIGURES = tuple(_VALUES)


@dataclass(frozen=True)
class Difference:
    """The second report's figure minus the first's. paired: whether over the same documents. The error is None if unknown."""

    value: float
    standard_error: float | None
    paired: bool

    @property
    def within_noise(self) -> bool | None:
        """Return whether the difference is smaller than NOISE standard errors; None if its error is unknown."""
        return None if self.standard_error is None else abs(self.value) < NOISE * self.standard_error

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "within_noise": self.within_noise}


def difference(one: Report, other: Report, name: str) -> Difference | None:
    """Return the difference of two reports in one of FIGURES; None if a report lacks it."""
    before, after = (known(getattr(report.fidelity, name, None)) for report in (one, other))
    if before is None or after is None:
        return None
    value = after - before
    if (error := _paired_error(one, other, name)) is not None:
        return Difference(value, error, paired=True)
    return Difference(value, _hypot(getattr(report.fidelity, f"{name}_se") for report in (one, other)), paired=False)


def known(value: Any) -> float | None:
    """Return a figure of a report as a float; None if it isn't a finite number. A report may come from anyone."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else None  # False for NaN


def _hypot(errors: Iterable[Any]) -> float | None:
    """Return the error of a difference of two independent figures; None if one of their errors is unknown."""
    found = [error for value in errors if (error := known(value)) is not None and error >= 0]
    return math.hypot(*found) if len(found) == 2 else None


def behind_best(rows: Mapping[str, Mapping[str, Any]], reports: Mapping[str, Report]) -> dict[str, dict[str, Any]]:
    """Return how far each run's rise in cross-entropy is behind the lowest, by name: value, standard error, within noise.

    Args:
        rows: the runs' rows of a sweep, by name.
        reports: their reports, from which documents are paired.
    """
    rises = {name: row["delta_ce"] for name, row in rows.items() if row.get("delta_ce") is not None}
    if not rises:
        return {}
    best = min(rises, key=lambda name: rises[name])
    found = {}
    for name, rise in rises.items():
        error = _paired_error(reports[best], reports[name], "delta_ce") if {best, name} <= reports.keys() else None
        paired = error is not None
        if error is None:
            error = _hypot(rows[one].get("delta_ce_se") for one in (best, name))
        behind = Difference(rise - rises[best], 0.0 if name == best else error, paired)
        found[name] = {"behind_best": behind.value, "behind_best_se": behind.standard_error}
        found[name]["within_noise_of_best"] = True if name == best else behind.within_noise
    return found


def _paired_error(one: Report, other: Report, name: str) -> float | None:
    """Return the standard error of the difference per document; None for reports of different texts, or without documents."""
    texts = [report.data.eval.fingerprint if report.data and report.data.eval else None for report in (one, other)]
    found = [report.fidelity.by_document if report.fidelity else None for report in (one, other)]
    if texts[0] is None or texts[0] != texts[1] or found[0] is None or found[1] is None or found[0].tokens != found[1].tokens:
        return None
    first, second = (_VALUES[name](documents) for documents in (found[0], found[1]))
    if not len(first) == len(second) == len(found[0].tokens):
        return None
    tokens_D = torch.tensor(found[0].tokens, dtype=torch.float64)
    values_D = (torch.tensor(second, dtype=torch.float64) - torch.tensor(first, dtype=torch.float64)) * tokens_D
    return ratio(values_D, tokens_D)[1]

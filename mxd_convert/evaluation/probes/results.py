"""The results of linear probes: a row for each class and family of units, and the best units of each class."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mxd_convert.errors import InputError
from mxd_convert.evaluation.probes.fit import Ranked, Split, WholeVector, active_units, column, probe_units, scores
from mxd_convert.evaluation.probes.pooling import Array, Matrix

TOP = 10  # units listed per class
Family = Mapping[int, Matrix]  # pooled coefficients of one kind of units, by layer


def probe_families(
    families: Mapping[str, Family],
    kinds: Mapping[str, str],
    classes: list[str],
    labels_D: Array,
    split: Split,
    units: str,
    seed: int,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Fit probes of every family for every class.

    Args:
        families: pooled coefficients of each family of units, by name.
        kinds: kind of layer of each family.
        classes: names of the classes.
        labels_D: class of each document, as an index into `classes`.
        split: training documents, test documents, and folds.
        units: name of the checkpoint's own family, whose units are also probed all together.
        seed: seed of the bootstrap.
        advance: called after each family.

    Returns:
        "families", "results", "mean_f1" and "top_experts" of probe.json (docs/probing.md).

    Raises:
        InputError: no unit of a family separates some class from the rest.
    """
    results: list[dict[str, Any]] = []
    top: list[dict[str, Any]] = []
    about: dict[str, Any] = {}

    def add(family: str, label: int, unit: Ranked | None, cv_f1: float, predicted_D: Array) -> None:
        positive_D = labels_D[split.test] == label
        results.append(
            {
                "class": classes[label],
                "family": family,
                "layer": None if unit is None else unit.layer,
                "unit": None if unit is None else unit.unit,
                "train_documents": len(split.train),
                "test_documents": len(split.test),
                "test_in_class": int(positive_D.sum()),
                "candidates": about[family]["active"],
                "cv_f1": cv_f1,
                **scores(positive_D, predicted_D, seed),
            }
        )

    for family, layers in families.items():
        total, active = sum(matrix.shape[1] for matrix in layers.values()), active_units(layers, split.train)
        about[family] = {"kind": kinds[family], "layers": list(layers), "units": total, "active": active, "whole_vector": False}
        try:
            found = probe_units(layers, labels_D, split, len(classes))
        except InputError as error:
            raise InputError(f"{family}: {error}") from None
        for label, (ranked, predicted_D) in enumerate(found):
            add(family, label, ranked[0], ranked[0].cv_f1, predicted_D)
            if family == units:
                top += _top(ranked, layers, labels_D, split, label, classes[label])
        advance()
    whole = whole_vector_of(units)
    vector = WholeVector.of(families[units], split.train)
    about[whole] = {**about[units], "active": vector.units, "whole_vector": True}
    for label in range(len(classes)):
        model, cv_f1 = vector.fit(labels_D[split.train] == label, split.fold_D)
        add(whole, label, None, cv_f1, model.predict(vector.coordinates[split.test]).astype(bool))
    advance()
    means = {family: float(np.mean([row["f1"] for row in results if row["family"] == family])) for family in about}
    results.sort(key=lambda row: classes.index(row["class"]))  # stable: the families keep their order
    return {"families": about, "results": results, "mean_f1": means, "top_experts": top}


def whole_vector_of(units: str) -> str:
    """Return the name of the regression on all units of a family."""
    return f"all {units}s"


def _top(ranked: list[Ranked], layers: Family, labels_D: Array, split: Split, label: int, name: str) -> list[dict[str, Any]]:
    """Return a row for each of a class's best units, with its figures inside and outside the class on the training documents."""
    inside_D = labels_D[split.train] == label
    rows = []
    for rank, unit in enumerate(ranked[:TOP], 1):
        values_D = column(layers[unit.layer], unit.unit)[split.train]
        rows.append(
            {
                "class": name,
                "rank": rank,
                "layer": unit.layer,
                "unit": unit.unit,
                "cv_f1": unit.cv_f1,
                "mean_in_class": float(values_D[inside_D].mean()),
                "mean_elsewhere": float(values_D[~inside_D].mean()),
                "active_in_class": float((values_D[inside_D] > 0).mean()),
                "active_elsewhere": float((values_D[~inside_D] > 0).mean()),
            }
        )
    return rows

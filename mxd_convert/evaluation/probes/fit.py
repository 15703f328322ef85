"""Probes: how well one unit, or all of them, tells the documents of one class from the rest.

Everything is chosen on the training part: `rank_units` and `WholeVector.fit` are given no other labels. The test part is predicted once,
by what they chose, and scored. Shape suffixes: D documents, C classes, N units (of all layers, one after the other), R resamples.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.model_selection import StratifiedKFold, train_test_split

from mxd_convert.errors import InputError
from mxd_convert.evaluation.probes.pooling import Array, Matrix

TEST_SHARE = 0.3
FOLDS = 5
CANDIDATES = 32  # units a class that are cross-validated
RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)  # of LogisticRegression's C, for vectors of mean squared length 1
FEWEST_ACTIVE = 5  # training documents on which a unit must be active to have a place in the whole vector
_COLUMNS = 4096


@dataclass(frozen=True)
class Split:
    """Which documents train and which test; `fold_D`: the fold of each training document."""

    train: Array
    test: Array
    fold_D: Array


def split_documents(labels_D: Array, seed: int) -> Split:
    """A stratified split into training and test part, and of the training part into folds."""
    train, test = train_test_split(np.arange(len(labels_D)), test_size=TEST_SHARE, stratify=labels_D, random_state=seed)
    fold_D = np.empty(len(train), dtype=np.int64)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    for number, (_, held_out) in enumerate(folds.split(train, labels_D[train])):
        fold_D[held_out] = number
    return Split(train, test, fold_D)


@dataclass(frozen=True)
class Ranked:
    """A unit and the F1 of its probe on the training documents, each predicted by a probe that was fitted without its fold."""

    layer: int
    unit: int
    cv_f1: float


def rank_units(
    layers: Mapping[int, Matrix], labels_D: Array, fold_D: Array, classes: int, most: int = CANDIDATES
) -> list[list[Ranked]]:
    """For each class, the `most` units that tell it best from the rest by a cheap score, ordered by cross-validated F1, best first.

    layers: pooled coefficients of the training documents. labels_D: their classes, from 0. The cheap score is the F1 of the threshold
    half-way between the means in the class and outside it.
    """
    offsets = np.cumsum([0, *(matrix.shape[1] for matrix in layers.values())])
    scores_CN = np.concatenate([_separation(matrix, labels_D, classes) for matrix in layers.values()], axis=1)
    indices = list(layers)
    ranked = []
    for label, score_N in enumerate(scores_CN):
        best = np.argsort(-score_N, kind="stable")[:most]
        found = []
        for number in best[score_N[best] > 0]:
            place = int(np.searchsorted(offsets, number, side="right")) - 1
            layer, unit = indices[place], int(number - offsets[place])
            predicted_D = cross_validated(column(layers[layer], unit), labels_D == label, fold_D)
            found.append(Ranked(layer, unit, float(f1_score(labels_D == label, predicted_D))))
        ranked.append(sorted(found, key=lambda unit: -unit.cv_f1))
    return ranked


def probe_units(layers: Mapping[int, Matrix], labels_D: Array, split: Split, classes: int) -> list[tuple[list[Ranked], Array]]:
    """For each class, the units ranked on the training part, and what the first of them says of the test documents, (D) bool.

    Raises InputError where no unit is active on the training part.
    """
    train = {index: _rows(matrix, split.train) for index, matrix in layers.items()}
    ranked = rank_units(train, labels_D[split.train], split.fold_D, classes)
    if not all(ranked):
        raise InputError("none of the units tells any two of the training documents apart; give other documents, or more tokens")
    found = []
    for label, units in enumerate(ranked):
        values_D = column(layers[units[0].layer], units[0].unit)
        positive_D = labels_D[split.train] == label
        found.append((units, predict_one(values_D[split.train], positive_D, values_D[split.test])))
    return found


def active_units(layers: Mapping[int, Matrix], rows: Array) -> int:
    """How many units tell any two of the given documents apart."""
    return sum(
        int((np.ptp(values, axis=0) > 0).sum()) for matrix in layers.values() for _, values in _chunks(_rows(matrix, rows))
    )


def _rows(matrix: Matrix, rows: Array) -> Matrix:
    """Some documents' coefficients, sparse ones by column, which is how they are read from here on."""
    return matrix[rows].tocsc() if scipy.sparse.issparse(matrix) else matrix[rows]


def column(matrix: Matrix, unit: int) -> Array:
    """One unit's coefficients, (D)."""
    return np.asarray(matrix[:, [unit]].todense() if scipy.sparse.issparse(matrix) else matrix[:, unit]).ravel()


def predict_one(train_D: Array, positive_D: Array, test_D: Array) -> Array:
    """The test documents that a logistic regression on one feature, fitted to the training documents, takes for the class; (D) bool.

    The feature is standardised by the training documents; the class and the rest weigh the same.
    """
    mean, deviation = train_D.mean(dtype=np.float64), train_D.std(dtype=np.float64) or 1.0
    probe = LogisticRegression(class_weight="balanced", solver="newton-cholesky")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # next to its optimum this solver now and then hands over to another
        probe.fit((train_D[:, None] - mean) / deviation, positive_D)
    return np.asarray(probe.predict((test_D[:, None] - mean) / deviation), dtype=bool)


def cross_validated(values_D: Array, positive_D: Array, fold_D: Array) -> Array:
    """What one unit's probe says of every document when fitted on the other folds, (D) bool."""
    predicted_D = np.empty(len(values_D), dtype=bool)
    for fold in range(FOLDS):
        held_out = fold_D == fold
        predicted_D[held_out] = predict_one(values_D[~held_out], positive_D[~held_out], values_D[held_out])
    return predicted_D


class WholeVector:
    """L2 logistic regression on all units of all layers at once, standardised by the training documents.

    With more units than documents its solution lies in the span of the training documents, so it is fitted on coordinates in that
    span: the same model, in at most as many dimensions as there are training documents. Units active on few of them are left out:
    their scale is not known. layers: pooled coefficients of all documents, of which the test documents' only meet the fitted model.
    """

    def __init__(self, layers: Mapping[int, Matrix], train: Array) -> None:
        gram_DD, self.units = _gram(layers, train)
        values, vectors = np.linalg.eigh(gram_DD[train])
        kept = values > 1e-6 * max(values.max(), 1e-30)  # below is rounding
        self.coordinates = gram_DD @ (vectors[:, kept] / np.sqrt(values[kept]))
        self.train = train

    def fit(self, positive_D: Array, fold_D: Array) -> tuple[Any, float]:
        """(the model, its cross-validated F1) for the training documents' labels, with the C that has the best cross-validated F1."""
        x = self.coordinates[self.train]
        best_f1, best = -1.0, STRENGTHS[0]
        for strength in STRENGTHS:
            predicted_D = np.empty(len(x), dtype=bool)
            for fold in range(FOLDS):
                held_out = fold_D == fold
                predicted_D[held_out] = _regression(strength).fit(x[~held_out], positive_D[~held_out]).predict(x[held_out])
            cv_f1 = float(f1_score(positive_D, predicted_D))
            if cv_f1 > best_f1:
                best_f1, best = cv_f1, strength
        return _regression(best).fit(x, positive_D), best_f1


def scores(positive_D: Array, predicted_D: Array, seed: int) -> dict[str, float]:
    """F1 and balanced accuracy on the test documents, each with a 95 % bootstrap interval, and the F1 of calling every one positive."""
    low, high = INTERVAL
    figures = {}
    samples = _bootstrap(positive_D, predicted_D, seed)
    for name, score in (("f1", f1_score), ("balanced_accuracy", balanced_accuracy_score)):
        figures[name] = float(score(positive_D, predicted_D))
        figures[f"{name}_low"], figures[f"{name}_high"] = map(float, np.percentile(samples[name], (low, high)))
    share = float(positive_D.mean())
    return {**figures, "chance": 2 * share / (1 + share)}


def _bootstrap(positive_D: Array, predicted_D: Array, seed: int) -> dict[str, Array]:
    """Both scores on resamples of the test documents, drawn from the class and from the rest as many as there are.

    Drawing documents with replacement and counting those called positive is drawing that count from a binomial.
    """
    rng = np.random.default_rng(seed)
    inside, outside = int(positive_D.sum()), int((~positive_D).sum())
    hits_R = rng.binomial(inside, (positive_D & predicted_D).sum() / inside, RESAMPLES)
    false_R = rng.binomial(outside, (~positive_D & predicted_D).sum() / outside, RESAMPLES)
    return {
        "f1": 2 * hits_R / (hits_R + false_R + inside),
        "balanced_accuracy": (hits_R / inside + 1 - false_R / outside) / 2,
    }


def _regression(strength: float) -> Any:
    return LogisticRegression(C=strength, class_weight="balanced", max_iter=1000)


def _separation(matrix: Matrix, labels_D: Array, classes: int) -> Array:
    """The cheap score of every unit for every class, (C, N); 0 for units that are the same on all documents."""
    scores_CN = np.zeros((classes, matrix.shape[1]))
    inside_CD = (labels_D == np.arange(classes)[:, None]).astype(np.float32)
    counts_C1 = inside_CD.sum(1, keepdims=True)
    for start, values_DN in _chunks(matrix):
        sums_CN = inside_CD.astype(np.float64) @ values_DN
        mean_CN, others_CN = sums_CN / counts_C1, (sums_CN.sum(0) - sums_CN) / (len(labels_D) - counts_C1)
        for label in range(classes):
            inside_N, outside_N = mean_CN[label], others_CN[label]
            called_DN = ((values_DN > (inside_N + outside_N) / 2) == (inside_N > outside_N)).astype(np.float32)
            f1_N = 2 * (inside_CD[label] @ called_DN) / (called_DN.sum(0) + counts_C1[label])
            differs_N = np.abs(inside_N - outside_N) > 1e-9 * (np.abs(inside_N) + np.abs(outside_N))
            scores_CN[label, start : start + len(f1_N)] = np.where(differs_N, f1_N, 0.0)
    return scores_CN


def _chunks(matrix: Matrix) -> Iterator[tuple[int, Array]]:
    """(first unit, coefficients as a dense array) of some thousand units at a time."""
    by_column = matrix.tocsc() if scipy.sparse.issparse(matrix) else matrix
    for start in range(0, matrix.shape[1], _COLUMNS):
        chunk = by_column[:, start : start + _COLUMNS]
        yield start, np.asarray(chunk.todense() if scipy.sparse.issparse(chunk) else chunk)


def _gram(layers: Mapping[int, Matrix], train: Array) -> tuple[Array, int]:
    """(inner products of all documents with the training documents, how many units they are over), the latter's mean square 1."""
    documents = next(iter(layers.values())).shape[0]
    gram_DD, units = np.zeros((documents, len(train))), 0
    for matrix in layers.values():
        for _, values in _chunks(matrix):
            known = values[:, (values[train] != 0).sum(0) >= FEWEST_ACTIVE]
            mean, deviation = known[train].mean(0), known[train].std(0)
            varies = deviation > 1e-6 * np.abs(mean)
            standard = (known[:, varies] - mean[varies]) / deviation[varies]
            gram_DD += standard @ standard[train].T
            units += standard.shape[1]
    return gram_DD / max(units, 1), units

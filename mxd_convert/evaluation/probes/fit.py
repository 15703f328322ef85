"""Linear probes: how well one unit, or all units, separate the documents of one class from the rest.

All choices are made on the training split: `rank_units` and `WholeVector.fit` receive no other labels. The chosen probes predict
the test split once. A unit is an expert, a latent or a neuron.
Shape suffixes: D documents, C classes, N units (of all layers, concatenated), R resamples.
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

TEST_SHARE = 0.3  # of the documents
FOLDS = 5  # of cross-validation
CANDIDATES = 32  # cross-validated units per class
RESAMPLES = 1000  # of the bootstrap
INTERVAL = (2.5, 97.5)  # percentiles
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)  # values of C in LogisticRegression, for vectors of mean squared length 1
MIN_ACTIVE = 5  # training documents on which a unit must be active to be in the whole vector
_COLUMNS = 4096  # units converted to a dense array at a time


@dataclass(frozen=True)
class Split:
    """Indices of training and test documents, and the fold of each training document (`fold_D`)."""

    train: Array
    test: Array
    fold_D: Array


def split_documents(labels_D: Array, seed: int) -> Split:
    """Split documents into training and test documents, and the former into folds, both stratified by class."""
    train, test = train_test_split(np.arange(len(labels_D)), test_size=TEST_SHARE, stratify=labels_D, random_state=seed)
    fold_D = np.empty(len(train), dtype=np.int64)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    for number, (_, held_out) in enumerate(folds.split(train, labels_D[train])):
        fold_D[held_out] = number
    return Split(train, test, fold_D)


@dataclass(frozen=True)
class Ranked:
    """A unit, and the cross-validated F1 of its probe on the training documents."""

    layer: int
    unit: int
    cv_f1: float


def rank_units(
    layers: Mapping[int, Matrix], labels_D: Array, fold_D: Array, classes: int, most: int = CANDIDATES
) -> list[list[Ranked]]:
    """Return the best units of each class by cross-validated F1, best first.

    Only the `most` best units by a fast score are cross-validated. The score is the F1 of a threshold half-way between the means
    inside and outside the class.

    Args:
        layers: pooled coefficients of the training documents, by layer index.
        labels_D: class of each training document, from 0.
        fold_D: fold of each training document.
        classes: number of classes.
        most: units to cross-validate per class.
    """
    offsets = np.cumsum([0, *(matrix.shape[1] for matrix in layers.values())])
    scores_CN = np.concatenate([_separation(matrix, labels_D, classes) for matrix in layers.values()], axis=1)
    indices = list(layers)
    ranked = []
    for label, score_N in enumerate(scores_CN):
        best = np.argsort(-score_N, kind="stable")[:most]
        found = []
        for number in best[score_N[best] > 0]:
            i = int(np.searchsorted(offsets, number, side="right")) - 1
            layer, unit = indices[i], int(number - offsets[i])
            predicted_D = cross_validated(column(layers[layer], unit), labels_D == label, fold_D)
            found.append(Ranked(layer, unit, float(f1_score(labels_D == label, predicted_D))))
        ranked.append(sorted(found, key=lambda unit: -unit.cv_f1))
    return ranked


def probe_units(layers: Mapping[int, Matrix], labels_D: Array, split: Split, classes: int) -> list[tuple[list[Ranked], Array]]:
    """Rank units for each class on the training documents, and predict the test documents with the best one, (D) bool.

    Raises InputError if no unit separates some class from the rest.
    """
    train = {index: _rows(matrix, split.train) for index, matrix in layers.items()}
    ranked = rank_units(train, labels_D[split.train], split.fold_D, classes)
    if not all(ranked):
        raise InputError("no unit separates the classes on the training documents. Give other documents, or more tokens.")
    found = []
    for label, units in enumerate(ranked):
        values_D = column(layers[units[0].layer], units[0].unit)
        positive_D = labels_D[split.train] == label
        found.append((units, predict_one(values_D[split.train], positive_D, values_D[split.test])))
    return found


def active_units(layers: Mapping[int, Matrix], rows: Array) -> int:
    """Return the number of units whose coefficients differ between the given documents."""
    return sum(
        int((np.ptp(values, axis=0) > 0).sum()) for matrix in layers.values() for _, values in _chunks(_rows(matrix, rows))
    )


def _rows(matrix: Matrix, rows: Array) -> Matrix:
    """Return the coefficients of some documents. Sparse ones are in CSC format, because they are read by column."""
    return matrix[rows].tocsc() if scipy.sparse.issparse(matrix) else matrix[rows]


def column(matrix: Matrix, unit: int) -> Array:
    """Return one unit's coefficients as a dense array, (D)."""
    return np.asarray(matrix[:, [unit]].todense() if scipy.sparse.issparse(matrix) else matrix[:, unit]).ravel()


def predict_one(train_D: Array, positive_D: Array, test_D: Array) -> Array:
    """Fit a logistic regression on one feature to the training documents. Return its predictions of the test documents, (D) bool.

    The feature is standardised on the training documents. The class and the rest have the same total weight.
    """
    mean, deviation = train_D.mean(dtype=np.float64), train_D.std(dtype=np.float64) or 1.0
    probe = LogisticRegression(class_weight="balanced", solver="newton-cholesky")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near the optimum, this solver sometimes falls back to another
        probe.fit((train_D[:, None] - mean) / deviation, positive_D)
    return np.asarray(probe.predict((test_D[:, None] - mean) / deviation), dtype=bool)


def cross_validated(values_D: Array, positive_D: Array, fold_D: Array) -> Array:
    """Return one unit's prediction of every document, (D) bool, each by a probe fitted on the other folds."""
    predicted_D = np.empty(len(values_D), dtype=bool)
    for fold in range(FOLDS):
        held_out = fold_D == fold
        predicted_D[held_out] = predict_one(values_D[~held_out], positive_D[~held_out], values_D[held_out])
    return predicted_D


@dataclass(frozen=True)
class WholeVector:
    """An L2 logistic regression on all units of all layers, standardised on the training documents.

    Its solution lies in the span of the training documents. It is fitted on coordinates in that span, which gives the same model
    in at most as many dimensions as there are training documents. Units active on fewer than MIN_ACTIVE of these are left out,
    because their scale is unknown. layers: pooled coefficients of all documents; those of test documents are used for prediction
    only.
    """

    coordinates: Array
    units: int
    train: Array

    @classmethod
    def of(cls, layers: Mapping[int, Matrix], train: Array) -> "WholeVector":
        """Return the vector of pooled coefficients, by layer index, of all documents. train: indices of training documents."""
        gram_DD, units = _gram(layers, train)
        values, vectors = np.linalg.eigh(gram_DD[train])
        kept = values > 1e-6 * max(values.max(), 1e-30)  # smaller eigenvalues are rounding errors
        return cls(gram_DD @ (vectors[:, kept] / np.sqrt(values[kept])), units, train)

    def fit(self, positive_D: Array, fold_D: Array) -> tuple[Any, float]:
        """Fit the regression to the training documents with the best C by cross-validated F1. Return the model and that F1."""
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
    """Return F1 and balanced accuracy with 95 % bootstrap intervals, and "chance", the F1 of calling every document positive."""
    low, high = INTERVAL
    figures = {}
    samples = _bootstrap(positive_D, predicted_D, seed)
    for name, score in (("f1", f1_score), ("balanced_accuracy", balanced_accuracy_score)):
        figures[name] = float(score(positive_D, predicted_D))
        figures[f"{name}_low"], figures[f"{name}_high"] = map(float, np.percentile(samples[name], (low, high)))
    share = float(positive_D.mean())
    return {**figures, "chance": 2 * share / (1 + share)}


def _bootstrap(positive_D: Array, predicted_D: Array, seed: int) -> dict[str, Array]:
    """Return both scores on stratified resamples of the test documents, (R).

    The number of positive predictions among documents drawn with replacement is binomial, so it is drawn directly.
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
    """Return the fast score of every unit for every class, (C, N); 0 for units with the same mean inside and outside."""
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
    """Yield (first unit, dense coefficients) for _COLUMNS units at a time."""
    by_column = matrix.tocsc() if scipy.sparse.issparse(matrix) else matrix
    for start in range(0, matrix.shape[1], _COLUMNS):
        chunk = by_column[:, start : start + _COLUMNS]
        yield start, np.asarray(chunk.todense() if scipy.sparse.issparse(chunk) else chunk)


def _gram(layers: Mapping[int, Matrix], train: Array) -> tuple[Array, int]:
    """Return inner products of all documents with the training documents, divided by the number of units, and that number."""
    documents = next(iter(layers.values())).shape[0]
    gram_DD, units = np.zeros((documents, len(train))), 0
    for matrix in layers.values():
        for _, values in _chunks(matrix):
            known = values[:, (values[train] != 0).sum(0) >= MIN_ACTIVE]
            mean, deviation = known[train].mean(0), known[train].std(0)
            varies = deviation > 1e-6 * np.abs(mean)
            standard = (known[:, varies] - mean[varies]) / deviation[varies]
            gram_DD += standard @ standard[train].T
            units += standard.shape[1]
    return gram_DD / max(units, 1), units

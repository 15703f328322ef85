"""Streamed variances: the fraction of variance unexplained (FVU), and the number of directions in which rows vary.

Shape suffixes: B tokens, G groups of documents, O output width, P pairs of tokens.
"""

import math

import torch
from torch import Tensor

from mxd_convert.evaluation.by_document import Estimate, ratio
from mxd_convert.evaluation.moments import CONSTANT
from mxd_convert.layers.losses import fraction_of_variance_unexplained

MAX_GROUPS = 128  # of documents, for the standard error of an FVU: with that many, its own error is a sixteenth
MAX_PAIRS = 1024  # pairs of tokens per batch from which dimensions are estimated


class Variance:
    """The FVU of outputs against targets, streamed over batches, with its standard error.

    Targets are shifted by their mean over the first batch, so that a large mean costs no digits. documents: number of documents;
    0 for an FVU without standard error. Neighbouring documents share a group if there are more than MAX_GROUPS.
    """

    def __init__(self, width: int, device: torch.device, documents: int = 0) -> None:
        self.tokens, self.documents = 0, documents
        self.groups = max(1, min(documents, MAX_GROUPS))
        self.shift_O: Tensor | None = None
        # per group: sums of the shifted targets; tokens, squared error, squared norm of the shifted targets
        self.sums_GO = torch.zeros(self.groups, width, dtype=torch.float64, device=device)
        self.sums_3G = torch.zeros(3, self.groups, dtype=torch.float64, device=device)

    def add(self, output_BO: Tensor, target_BO: Tensor, document_B: Tensor | None = None) -> None:
        """Add a batch of outputs and their targets, float64. document_B: the document of each token."""
        if not len(target_BO):
            return
        if self.shift_O is None:
            self.shift_O = target_BO.mean(0)
        self.tokens += len(target_BO)
        centred_BO = target_BO - self.shift_O
        error_B, norm_B = (output_BO - target_BO).square().sum(-1), centred_BO.square().sum(-1)
        sums_3B = torch.stack([torch.ones_like(error_B), error_B, norm_B])
        if document_B is None or not self.documents:
            self.sums_GO[0] += centred_BO.sum(0)
            self.sums_3G[:, 0] += sums_3B.sum(-1)
        else:
            group_B = document_B * self.groups // self.documents
            self.sums_GO.index_add_(0, group_B, centred_BO)
            self.sums_3G.index_add_(1, group_B, sums_3B)

    def fvu(self) -> Estimate:
        """Return the squared error divided by the variance of the targets, both summed over outputs, and its standard error.

        Both are None for targets that are constant or not finite.
        """
        if not self.tokens:
            return None, None
        tokens_G, error_G, norm_G = self.sums_3G
        moved_O = self.sums_GO.sum(0) / self.tokens  # from the shift to the mean
        variance_G = norm_G - 2 * self.sums_GO @ moved_O + tokens_G * moved_O.square().sum()
        square = (self.mean_O().square().sum() * self.tokens).clamp_min(1e-300)
        value = fraction_of_variance_unexplained(error_G.sum(), norm_G.sum(), self.sums_GO.sum(0), self.tokens)
        if variance_G.sum() <= CONSTANT * square or not math.isfinite(value):
            return None, None
        return value, ratio(error_G, variance_G)[1]

    def mean_O(self) -> Tensor:
        """Return the mean target; zeros before the first token."""
        moved_O = self.sums_GO.sum(0) / max(self.tokens, 1)
        return moved_O if self.shift_O is None else self.shift_O + moved_O


class Dimensions:
    """The number of directions in which rows vary: the participation ratio tr(S)^2 / tr(S^2) of their covariance S, streamed.

    It is r for rows that vary equally in r directions. S, (O, O), is never formed. The difference d of two independent rows,
    divided by sqrt(2), has mean 0 and covariance S. So |d|^2 has mean tr(S), and the squared inner product of two such
    differences tr(S^2).
    """

    def __init__(self, device: torch.device) -> None:
        self.squares, self.pairs = torch.zeros((), dtype=torch.float64, device=device), 0
        self.crossed, self.crossings = torch.zeros((), dtype=torch.float64, device=device), 0

    def add(self, rows_BO: Tensor) -> None:
        """Add a batch of rows from several texts. Each pair takes one row from the first half and one from the second."""
        pairs = min(len(rows_BO) // 2, MAX_PAIRS)
        half = len(rows_BO) // 2
        difference_PO = (rows_BO[:pairs] - rows_BO[half : half + pairs]).double() / 2**0.5
        inner_PP = difference_PO @ difference_PO.T
        self.squares += inner_PP.diagonal().sum()
        self.pairs += pairs
        self.crossed += inner_PP.square().sum() - inner_PP.diagonal().square().sum()
        self.crossings += pairs * (pairs - 1)

    def value(self) -> float | None:
        """Return the participation ratio: 0 if nothing varies, None if a row is not finite."""
        if not self.crossed.isfinite():
            return None
        if self.crossed <= 0:
            return 0.0
        return ((self.squares / self.pairs).square() / (self.crossed / self.crossings)).item()

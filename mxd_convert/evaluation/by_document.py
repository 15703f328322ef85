"""Sums per document, and the standard errors of figures that are ratios of two sums.

Tokens of one document are not independent, so errors are clustered: the unit is the document. A figure `sum_d n_d / sum_d m_d`
has the residuals `r_d = n_d - figure * m_d`, and its squared standard error is `D / (D - 1) * sum_d r_d^2 / (sum_d m_d)^2`, with D
the number of documents (Cameron and Miller, A Practitioner's Guide to Cluster-Robust Inference, 2015, section II).
Shape suffixes: D documents, P tokens.
"""

import math

import torch
from torch import Tensor

Estimate = tuple[float | None, float | None]  # a figure and its standard error; None if it can't be calculated


def ratio(numerator_D: Tensor, denominator_D: Tensor) -> Estimate:
    """Return the ratio of two sums over documents, and its standard error.

    Documents with 0 in both don't count. The ratio is None for a denominator of 0 or a result that is not finite; its standard
    error also for fewer than two documents.
    """
    total = denominator_D.sum().item()
    value = numerator_D.sum().item() / total if total else math.nan
    if not math.isfinite(value):
        return None, None
    documents = int(((numerator_D != 0) | (denominator_D != 0)).sum())
    if documents < 2:
        return value, None
    residual_D = numerator_D - value * denominator_D
    return value, math.sqrt(documents / (documents - 1) * residual_D.square().sum().item()) / abs(total)


class Sums:
    """Sums over the tokens of each document, in float64, by name."""

    def __init__(self, documents: int, device: torch.device) -> None:
        self.documents, self.device = documents, device
        self._sums: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def __getitem__(self, name: str) -> Tensor:
        """Return the sums of a name, (D); zeros for a name without tokens."""
        return self._sums.get(name, torch.zeros(self.documents, dtype=torch.float64, device=self.device))

    def add(self, name: str, value_P: Tensor, document_P: Tensor) -> None:
        """Add the values of some tokens to the sums of their documents."""
        if name not in self._sums:
            self._sums[name] = torch.zeros(self.documents, dtype=torch.float64, device=self.device)
        self._sums[name].index_add_(0, document_P, value_P.double())

    def mean(self, name: str, tokens: str = "tokens") -> Estimate:
        """Return the mean of a name per token, and its standard error. tokens: the name of the numbers of tokens."""
        return ratio(self[name], self[tokens])

"""Figures of each kind of token: text, special tokens, BOS, and the first position of each block.

BOS and first positions are attention sinks in many models. They don't train the layers by default, so their errors are reported
apart. Shape suffixes: P tokens, O output width.
"""

from typing import Any

import torch
from torch import Tensor

from mxd_convert.data.blocks import TOKEN_KINDS
from mxd_convert.evaluation.by_document import Sums, ratio


class TokenKinds:
    """Sums over the tokens of each kind. documents: their number."""

    def __init__(self, documents: int, device: torch.device) -> None:
        self.sums = Sums(documents, device)

    def add(self, values: dict[str, Tensor], kind_P: Tensor, document_P: Tensor) -> None:
        """Add the values of some tokens, by name, with the kind and the document of each."""
        values = {"tokens": torch.ones_like(kind_P), **values}
        for number, kind in enumerate(TOKEN_KINDS):
            chosen_P = kind_P == number
            for name, value_P in values.items():
                self.sums.add(f"{kind}/{name}", value_P[chosen_P], document_P[chosen_P])

    def add_errors(self, output_PO: Tensor, target_PO: Tensor, kind_P: Tensor, document_P: Tensor) -> None:
        """Add the squared errors of a layer's outputs, and the squares of its targets."""
        errors = {"error": (output_PO - target_PO).square().sum(-1), "square": target_PO.square().sum(-1)}
        self.add(errors, kind_P, document_P)

    def tokens(self, kind: str) -> int:
        """Return the number of tokens of a kind."""
        return int(self.sums[f"{kind}/tokens"].sum())

    def of_model(self) -> dict[str, Any]:
        """Return tokens, rise in cross-entropy and KL of the predictions at each kind of token that the text has."""
        return {kind: self._of_predictions(kind) for kind in TOKEN_KINDS if self.tokens(kind)}

    def _of_predictions(self, kind: str) -> dict[str, Any]:
        tokens_D = self.sums[f"{kind}/tokens"]
        rise = ratio(self.sums[f"{kind}/converted"] - self.sums[f"{kind}/base"], tokens_D)
        kl = ratio(self.sums[f"{kind}/kl"], tokens_D)
        return {"tokens": self.tokens(kind), "delta_ce": rise[0], "delta_ce_se": rise[1], "kl": kl[0], "kl_se": kl[1]}

    def of_layer(self) -> dict[str, Any]:
        """Return, for each kind of token that the text has, its number, its error and the size of the MLP's output.

        relative_squared_error: squared error over squared norm of the MLP's output. norm: root mean square of that norm, relative to
        that of text.
        """
        size = {kind: ratio(self.sums[f"{kind}/square"], self.sums[f"{kind}/tokens"])[0] for kind in TOKEN_KINDS}
        found = {}
        for kind in TOKEN_KINDS:
            if not self.tokens(kind):
                continue
            error, se = ratio(self.sums[f"{kind}/error"], self.sums[f"{kind}/square"])
            ours, text = size[kind], size["text"]
            norm = (ours / text) ** 0.5 if ours is not None and text else None
            found[kind] = {
                "tokens": self.tokens(kind),
                "relative_squared_error": error,
                "relative_squared_error_se": se,
                "norm": norm,
            }
        return found

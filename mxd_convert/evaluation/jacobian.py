"""Jacobian faithfulness: the change of a layer's output along a small step, against the change of the MLP's own output.

A layer may have the same outputs as the MLP and still compute them in another way. Changes are central differences,
`f(x + d) - f(x - d)` with |d| = STEP |x|: derivatives would miss the switching of experts. Directions are `data`, towards the
input of another token, and `random`, uniform over the sphere (after Anthropic's report on sparse mixtures of linear transforms,
https://transformer-circuits.pub/2025/bulk-update/index.html).
Shape suffixes: P tokens, I input width, O output width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mxd_convert.evaluation.by_document import Sums

STEP = 0.05  # of the input's norm
DIRECTIONS = ("data", "random")


class Jacobian:
    """The faithfulness of one layer, streamed over tokens."""

    def __init__(self, documents: int, device: torch.device) -> None:
        self.sums = Sums(documents, device)

    def add(
        self,
        x_PI: Tensor,
        document_P: Tensor,
        layer: Callable[[Tensor], Tensor],
        mlp: Callable[[Tensor], Tensor],
        seed: int,
    ) -> None:
        """Add a batch of tokens.

        Args:
            x_PI: inputs of the MLP in the base model.
            document_P: the document of each token.
            layer: maps inputs (P, I) to the layer's outputs.
            mlp: maps them to the MLP's outputs.
            seed: of the directions, another for every batch.
        """
        if len(x_PI) < 2:
            return
        norm_P1 = x_PI.norm(dim=-1, keepdim=True)
        for name, direction_PI in zip(DIRECTIONS, _directions(x_PI, seed), strict=True):
            step_PI = direction_PI * (STEP * norm_P1 / direction_PI.norm(dim=-1, keepdim=True).clamp_min(1e-30))
            ours, theirs = ((f(x_PI + step_PI) - f(x_PI - step_PI)).double() for f in (layer, mlp))
            length = ours.norm(dim=-1) * theirs.norm(dim=-1)
            moved_P = length > 0  # no cosine is defined for a change of 0
            self.sums.add(f"{name}/error", (ours - theirs).square().sum(-1), document_P)
            self.sums.add(f"{name}/change", theirs.square().sum(-1), document_P)
            cosine_P = (ours * theirs).sum(-1)[moved_P] / length[moved_P]
            self.sums.add(f"{name}/cosine", cosine_P, document_P[moved_P])
            self.sums.add(f"{name}/moved", torch.ones_like(cosine_P), document_P[moved_P])

    def report(self) -> dict[str, dict[str, Any]]:
        """Return the mean cosine and relative squared error of each direction, with their standard errors."""
        found = {}
        for name in DIRECTIONS:
            cosine, cosine_se = self.sums.mean(f"{name}/cosine", f"{name}/moved")
            error, error_se = self.sums.mean(f"{name}/error", f"{name}/change")
            found[name] = {
                "cosine": cosine,
                "cosine_se": cosine_se,
                "relative_squared_error": error,
                "relative_squared_error_se": error_se,
            }
        return found


def _directions(x_PI: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return for each token the direction to another token's input, and a random one. The same seed gives the same for any layer."""
    generator = torch.Generator().manual_seed(seed)
    order_P = torch.randperm(len(x_PI), generator=generator)
    other_P = torch.empty_like(order_P)
    other_P[order_P] = order_P.roll(1)  # a cycle through all tokens: none is its own partner
    noise_PI = torch.randn(x_PI.shape, generator=generator, dtype=torch.float32)
    return x_PI[other_P.to(x_PI.device)] - x_PI, noise_PI.to(x_PI)

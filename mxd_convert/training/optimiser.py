"""AdamW without weight decay, its schedule, and the constraint on the experts folded into the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from mxd_convert.layers import MxD

DECAY_SHARE = 0.2  # of the steps, at the end of a trapezoid


def rate_factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """The share of the peak learning rate at `step` (from 0) of `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return min(1.0, (steps - step) / max(1.0, DECAY_SHARE * steps))  # trapezoid


class Optimiser:
    """One fused AdamW over all layers (no weight decay, as in the paper)."""

    def __init__(self, layers: Iterable[MxD], lr: float, steps: int, warmup: int, schedule: str) -> None:
        self.layers = list(layers)
        self.lr, self.steps, self.warmup, self.schedule = lr, steps, warmup, schedule
        parameters: list[nn.Parameter] = [p for layer in self.layers for p in layer.parameters() if p.requires_grad]
        self.adam = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)

    def rate(self, step: int) -> float:
        return self.lr * rate_factor(step, self.steps, self.warmup, self.schedule)

    def step(self, step: int) -> None:
        """One update from the gradients at hand; rows of C keep unit norm and their gradient's component along it is removed."""
        for group in self.adam.param_groups:
            group["lr"] = self.rate(step)
        for layer in self.layers:
            layer.project_gradient()
        self.adam.step()
        for layer in self.layers:
            layer.normalise_experts()
        self.adam.zero_grad(set_to_none=True)

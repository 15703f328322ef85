"""AdamW without weight decay, its schedule, and the constraint on the experts, in one step."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from mxd_convert.layers import Trainable
from mxd_convert.layers.trainable import normalise, project

GPU_CHUNK_ELEMENTS = 2**25  # elements of a parameter per chunk on a GPU
CHUNK_ELEMENTS = 400_000  # the same on a CPU: 6.4 MB with gradient and moments, which stay in its cache
DECAY_SHARE = 0.2  # share of the steps in which a trapezoid decays, at the end


def rate_factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """Return the factor on the peak learning rate at `step` (from 0) of `steps`."""
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
    """AdamW over all layers (no weight decay, as in the paper), with the constraint on the experts in the same pass.

    Experts are updated in chunks of rows that stay in a CPU's cache: the gradient's component along each row is removed, AdamW
    takes its step, and the row is normalised again. Rows that have never been active don't change.

    Args:
        layers: by index.
        lr: peak learning rate.
        steps: of the whole schedule.
        warmup: steps of warm-up.
        schedule: constant, linear, cosine or trapezoid.
        moments: fp32, or bf16 to save memory (8 bytes per parameter with the weight, instead of 12). Updates of the second moment
            are smaller than bfloat16's precision, so it is rounded stochastically.
        seed: of the stochastic rounding, together with the step.
        defer: compute the gradients of experts and gate weights chunk by chunk, never whole. Without it they are in `.grad`,
            where those of other processes can be added.
    """

    def __init__(
        self,
        layers: Mapping[int, Trainable],
        lr: float,
        steps: int,
        warmup: int,
        schedule: str,
        moments: str = "fp32",
        seed: int = 0,
        defer: bool = True,
    ) -> None:
        self.layers = list(layers.values())
        self.lr, self.steps, self.warmup, self.schedule, self.seed = lr, steps, warmup, schedule, seed
        self.experts = {layer.experts for layer in self.layers if layer.experts is not None and layer.unit_norm}
        # the seed of a parameter's rounding, which must not depend on how layers are grouped
        self.keys = {p: (index, number) for index, layer in layers.items() for number, p in enumerate(layer.parameters())}
        self.parameters: list[nn.Parameter] = [p for p in self.keys if p.requires_grad]
        for layer in self.layers if defer else ():
            layer.defer_row_gradients()
        self.sinks = {parameter: sink for layer in self.layers for parameter, sink in layer.sinks.items()}
        dtype = torch.bfloat16 if moments == "bf16" else None
        self.moments = {p: (torch.zeros_like(p, dtype=dtype), torch.zeros_like(p, dtype=dtype)) for p in self.parameters}

    def rate(self, step: int) -> float:
        """Return the learning rate of `step`, from 0."""
        return self.lr * rate_factor(step, self.steps, self.warmup, self.schedule)

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Update all parameters from their gradients, then clear these. step: from 0."""
        whole: list[_Chunk] = []  # parameters that need no chunks
        for parameter in self.parameters:
            sink, gradient = self.sinks.get(parameter), parameter.grad
            if gradient is None and (sink is None or sink.empty()):
                continue
            moments = self.moments[parameter]
            row_by_row = parameter in self.experts or moments[0].dtype != parameter.dtype or not (sink is None or sink.empty())
            if gradient is not None and not row_by_row:
                whole.append((parameter.data, gradient, *moments))
                continue
            generator = None if moments[0].dtype == parameter.dtype else self._generator(parameter, step)
            for first, last in _chunks(parameter):
                rows = slice(first, last)
                terms = [] if gradient is None else [gradient[rows]]
                if sink is not None and not sink.empty():
                    terms.append(sink.rows(first, last))
                made = terms[0] if len(terms) == 1 else terms[0] + terms[1]
                chunk = parameter.data[rows], made, moments[0][rows], moments[1][rows]
                self._step_chunk(chunk, step, parameter in self.experts, generator)
            if sink is not None:
                sink.clear()
        self._adamw(whole, step)
        for parameter in self.parameters:
            parameter.grad = None

    def _step_chunk(self, chunk: "_Chunk", step: int, unit_norm: bool, generator: torch.Generator | None) -> None:
        weight, gradient, first, second = chunk
        if unit_norm:
            project(gradient, weight)
        if generator is None:
            self._adamw([chunk], step)
        else:
            exact = first.float(), second.float()
            self._adamw([(weight, gradient, *exact)], step)
            first.copy_(exact[0])
            second.copy_(_rounded_stochastically(exact[1], generator))
        if unit_norm:
            normalise(weight, second.amax(-1) > 0)

    def _adamw(self, chunks: "list[_Chunk]", step: int) -> None:
        if not chunks:
            return
        weights, gradients, firsts, seconds = (list(tensors) for tensors in zip(*chunks, strict=True))
        adamw(
            weights,
            gradients,
            firsts,
            seconds,
            [],
            [torch.tensor(float(step), device=weight.device) for weight in weights],  # adamw adds 1 itself
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.rate(step),
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )

    def _generator(self, parameter: nn.Parameter, step: int) -> torch.Generator:
        state = np.random.SeedSequence([self.seed, step, *self.keys[parameter]]).generate_state(1, np.uint64)
        return torch.Generator(parameter.device).manual_seed(int(state[0]))

    def tensors(self, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
        """Return the moments as named tensors, for a saved state. names: of the parameters."""
        return {
            f"{names[parameter]}/{kind}": tensor
            for parameter, moments in self.moments.items()
            for kind, tensor in zip(_KINDS, moments, strict=True)
        }

    def restore(self, names: Mapping[nn.Parameter, str], tensors: Mapping[str, Tensor]) -> None:
        """Copy the moments of a saved state into the optimiser. names: of the parameters."""
        for parameter, moments in self.moments.items():
            for kind, tensor in zip(_KINDS, moments, strict=True):
                tensor.copy_(tensors[f"{names[parameter]}/{kind}"])


_Chunk = tuple[Tensor, Tensor, Tensor, Tensor]  # weight, gradient, first and second moment
_KINDS = ("exp_avg", "exp_avg_sq")


def _chunks(parameter: Tensor) -> Iterator[tuple[int, int | None]]:
    """Yield ranges of rows: small enough for the cache on a CPU, and for little memory on a GPU. (0, None) is all rows."""
    rows = max(1, (CHUNK_ELEMENTS if parameter.device.type == "cpu" else GPU_CHUNK_ELEMENTS) // max(1, parameter[0].numel()))
    if rows >= len(parameter):
        yield 0, None
        return
    for first in range(0, len(parameter), rows):
        yield first, min(first + rows, len(parameter))


def _rounded_stochastically(exact: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16, up or down at random such that the expectation is exact."""
    noise = torch.randint(0, 1 << 16, exact.shape, dtype=torch.int32, device=exact.device, generator=generator)
    return ((exact.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()

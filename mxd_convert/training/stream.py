"""Blocks of text through the base model, their activations shuffled over tokens, a batch at a time.

A buffer of a few steps is harvested at once and its tokens are dealt out to those steps at random, so that a batch holds tokens of many
more documents than it has blocks. What a step sees is a function of the seed and the step alone: a run that goes on in the middle of a
buffer harvests that buffer again.
"""

import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mxd_convert.base_model.capture import harvest
from mxd_convert.base_model.families import Site
from mxd_convert.base_model.swap import replaced
from mxd_convert.data.blocks import Blocks, block_order

BUFFER_BYTES = 2**28
FORWARD_TOKENS = 4096  # that the base reads at a time
LEAST_STEPS, MOST_STEPS = 4, 16


def buffer_steps(step_tokens: int, sites: Iterable[Site]) -> int:
    """How many steps' activations are shuffled together: as many as fit into 256 MiB in float32, from 4 to 16.

    sites: of all layers of the conversion, also where they are trained in groups, so that grouping changes no result.
    """
    a_step = 4 * step_tokens * sum(site.d_in + site.d_out for site in sites)
    return min(MOST_STEPS, max(LEAST_STEPS, BUFFER_BYTES // a_step))


@dataclass(frozen=True)
class Batch:
    """What a step trains on: by layer index (x_BI, y_BO); and which tokens count, (B) bool."""

    activations: dict[int, tuple[Tensor, Tensor]]
    counted_B: Tensor


@dataclass(frozen=True)
class Source:
    """Where activations come from.

    below: modules that stand in for MLPs of the base while inputs are harvested, by path (layers already converted, in sequential
    order). teacher: targets are the base's own outputs, from a forward without these. process: (index, number) of those that share
    out every batch.
    """

    base: nn.Module
    sites: list[Site]
    blocks: Blocks
    rows_a_step: int
    steps: int
    buffer_steps: int
    seed: int
    mask_bos: bool
    below: dict[str, nn.Module]
    teacher: bool
    process: tuple[int, int] = (0, 1)


class Activations:
    """Gives the batch of any step; quick where steps are asked for in order. `seconds`: spent in the base model, and on data."""

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source, self.device = source, device
        self.seconds = {"base": 0.0, "data": 0.0}
        self._first = -1  # step that the buffer begins with
        self._bounds = np.zeros(0, dtype=np.int64)
        self._counted = torch.zeros(0, dtype=torch.bool)
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def batch(self, step: int) -> Batch:
        """The step's activations, views of the buffer in the base's dtype: valid until the next step outside the buffer is asked for."""
        first = step // self.source.buffer_steps * self.source.buffer_steps
        if first != self._first:
            self._fill(first)
        tokens = slice(*self._bounds[step - first : step - first + 2].tolist())
        activations = {index: (inputs[tokens], outputs[tokens]) for index, (inputs, outputs) in self._buffers.items()}
        return Batch(activations, self._counted[tokens])

    @torch.no_grad()
    def read(self, rows: Any, indices: Iterable[int]) -> Batch:
        """The activations of some layers on some blocks of the text, in its order; in every process all of them."""
        ids_BT = self.source.blocks.take(rows)
        counted_B = self.source.blocks.counted(ids_BT, self.source.mask_bos).flatten().to(self.device)
        wanted = set(indices)
        seen = self._seen(ids_BT, [site for site in self.source.sites if site.index in wanted])
        return Batch({index: (x.to(self.device), y.to(self.device)) for index, (x, y) in seen.items()}, counted_B)

    @torch.no_grad()
    def _fill(self, first: int) -> None:
        source = self.source
        start = time.perf_counter()
        steps = min(source.buffer_steps, source.steps - first)
        rows = block_order(len(source.blocks), first * source.rows_a_step, steps * source.rows_a_step, source.seed)
        process, processes = source.process
        places, self._bounds = _deal(len(rows), source.blocks.context, steps, first, source.seed, process, processes)
        mine = rows[process::processes]
        a_forward = max(1, min(-(-source.rows_a_step // processes), FORWARD_TOKENS // source.blocks.context))
        self._counted = torch.zeros(places.size, dtype=torch.bool, device=self.device)
        self.seconds["data"] += time.perf_counter() - start
        for begin in range(0, len(mine), a_forward):
            start = time.perf_counter()
            ids_BT = source.blocks.take(mine[begin : begin + a_forward])
            place = torch.from_numpy(places[begin : begin + a_forward].flatten()).to(self.device)
            self._counted[place] = source.blocks.counted(ids_BT, source.mask_bos).flatten().to(self.device)
            self.seconds["data"] += time.perf_counter() - start
            self._harvest(ids_BT, place, places.size)
        self._first = first

    def _harvest(self, ids_BT: Tensor, place: Tensor, size: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # so that the layers' step before is not taken for the base's time
        start = time.perf_counter()
        seen = self._seen(ids_BT, self.source.sites)
        for index in list(seen):
            inputs, outputs = seen[index]
            if index not in self._buffers or len(self._buffers[index][0]) != size:
                self._buffers[index] = (self._empty(size, inputs), self._empty(size, outputs))
            for buffer, tensor in zip(self._buffers[index], (inputs, outputs), strict=True):
                buffer[place] = tensor.to(self.device)
            del seen[index], inputs, outputs
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds["base"] += time.perf_counter() - start

    def _seen(self, ids_BT: Tensor, sites: list[Site]) -> dict[int, tuple[Tensor, Tensor]]:
        """Inputs and targets of a forward, (tokens, I) and (tokens, O), where the base left them."""
        source = self.source
        ids_BT = ids_BT.to(self.device)  # accelerate moves it on where the base is spread
        with ExitStack() as stack:
            if source.below:
                stack.enter_context(replaced(source.base, source.below))
            seen = harvest(source.base, sites, ids_BT)
        targets = harvest(source.base, sites, ids_BT) if source.teacher and source.below else seen
        return {index: (seen[index].inputs.flatten(0, 1), targets[index].outputs.flatten(0, 1)) for index in seen}

    def _empty(self, size: int, like: Tensor) -> Tensor:
        return torch.empty(size, like.shape[1], dtype=like.dtype, device=self.device)


def _deal(
    rows: int, context: int, steps: int, first: int, seed: int, process: int, processes: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Where each token of this process's rows goes in its buffer, (rows, context), and the bounds of the steps there.

    The deal is over the tokens of all processes: which step a token belongs to does not depend on their number.
    """
    slots = np.random.default_rng([seed, first, 1]).permutation(rows * context).reshape(rows, context)[process::processes]
    order = slots.flatten().argsort()
    places = np.empty(order.size, dtype=np.int64)
    places[order] = np.arange(order.size)
    bounds = np.searchsorted(slots.flatten()[order], np.arange(steps + 1) * (rows // steps) * context)
    return places.reshape(slots.shape), bounds

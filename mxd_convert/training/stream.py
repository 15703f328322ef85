"""Batches of activations of the base model, shuffled over tokens.

A buffer of a few steps is harvested at once and its tokens are assigned to those steps at random, so that a batch has tokens of
many more documents than it has blocks. A batch depends only on the seed and the step. A run that resumes in the middle of a
buffer harvests that buffer again.
"""

import functools
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mxd_convert.base_model.capture import apply_mlp, harvest
from mxd_convert.base_model.families import Site
from mxd_convert.base_model.swap import replaced
from mxd_convert.data.blocks import Blocks, block_order
from mxd_convert.recipe.schema import figure_mask
from mxd_convert.training.derivatives import EVERY, Moved, move

BUFFER_BYTES = 2**28  # of a buffer, in float32
FORWARD_TOKENS = 4096  # per forward of the base
MIN_STEPS, MAX_STEPS = 4, 16  # of a buffer


def buffer_steps(step_tokens: int, sites: Iterable[Site]) -> int:
    """Return how many steps share a buffer: as many as fit into 256 MiB in float32, from 4 to 16.

    sites: of all layers of the conversion, also if they are trained in groups, so that grouping changes no result.
    """
    a_step = 4 * step_tokens * sum(site.d_in + site.d_out for site in sites)
    return min(MAX_STEPS, max(MIN_STEPS, BUFFER_BYTES // a_step))


@dataclass(frozen=True)
class Batch:
    """The activations of a step, (x_BI, y_BO) by layer index; which tokens count, and which are in figures of layers, (B) bool."""

    activations: dict[int, tuple[Tensor, Tensor]]
    counted_B: Tensor
    figures_B: Tensor


@dataclass(frozen=True)
class Source:
    """Where activations come from: base model, text and the size of a step.

    Attributes:
        rows_a_step: blocks per step.
        steps: steps of the pass.
        buffer_steps: steps that share a shuffled buffer.
        below: modules that replace MLPs of the base while inputs are harvested, by path: in sequential order, the layers
            converted so far.
        teacher: whether targets are the base's own outputs, from a forward without `below`.
        process: index and number of the processes that share each batch.
    """

    base: nn.Module
    sites: list[Site]
    blocks: Blocks
    rows_a_step: int
    steps: int
    buffer_steps: int
    seed: int
    mask: str
    below: dict[str, nn.Module]
    teacher: bool
    process: tuple[int, int] = (0, 1)


class Activations:
    """The batch of any step, fastest if steps are read in order.

    seconds: time spent so far in the base model (`base`) and on reading text (`data`).
    """

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source, self.device = source, device
        self.seconds = {"base": 0.0, "data": 0.0}
        self._first = -1  # first step of the buffer
        self._bounds = np.zeros(0, dtype=np.int64)
        self._counted = self._figures = torch.zeros(0, dtype=torch.bool)
        # position of the token towards whose input a token takes a step; -1 for no step
        self._partners = torch.zeros(0, dtype=torch.int64)
        self._moved: tuple[int, dict[int, Moved]] = (-1, {})  # step and its moved inputs
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def batch(self, step: int) -> Batch:
        """Return the batch of a step: views of the buffer, in the base's dtype, valid until the buffer is refilled."""
        first = step // self.source.buffer_steps * self.source.buffer_steps
        if first != self._first:
            self._fill(first)
        tokens = slice(*self._bounds[step - first : step - first + 2].tolist())
        activations = {index: (inputs[tokens], outputs[tokens]) for index, (inputs, outputs) in self._buffers.items()}
        return Batch(activations, self._counted[tokens], self._figures[tokens])

    @torch.no_grad()
    def moved(self, step: int) -> dict[int, Moved]:
        """Return the moved inputs of a step by layer index, for the matching of derivatives. Several stages may ask for them."""
        if self._moved[0] != step:
            batch = self.batch(step)
            begin = int(self._bounds[step - self._first])
            partner_B = self._partners[begin : begin + len(batch.counted_B)]
            rows_S = (batch.counted_B & (partner_B >= 0) & self._counted[partner_B]).nonzero().squeeze(1)
            moved = {}
            for site in self.source.sites:
                x_BI, y_BO = batch.activations[site.index]
                x_SI, mlp = x_BI[rows_S], functools.partial(self._mlp, site)
                y_SO = mlp(x_SI) if self.source.teacher and self.source.below else y_BO[rows_S]
                moved[site.index] = move(x_SI, self._buffers[site.index][0][partner_B[rows_S]], y_SO, rows_S, mlp)
            self._moved = step, moved
        return self._moved[1]

    def _mlp(self, site: Site, x_SI: Tensor) -> Tensor:
        return apply_mlp(self.source.base, site, x_SI.unsqueeze(0)).squeeze(0).to(self.device)

    @torch.no_grad()
    def read(self, rows: Any, indices: Iterable[int]) -> Batch:
        """Return the activations of the layers `indices` on the blocks `rows`, unshuffled, and all of them in every process."""
        ids_BT = self.source.blocks.take(rows)
        masks = self._masks(rows)
        wanted = set(indices)
        seen = self._seen(ids_BT, [site for site in self.source.sites if site.index in wanted])
        return Batch({index: (x.to(self.device), y.to(self.device)) for index, (x, y) in seen.items()}, *masks)

    def _masks(self, rows: Any) -> tuple[Tensor, Tensor]:
        """Return which tokens of some blocks count in the loss, and which are in figures, as flat tensors."""
        masks = self.source.mask, figure_mask(self.source.mask)
        counted_B, figures_B = (self.source.blocks.counted(rows, mask).flatten().to(self.device) for mask in masks)
        return counted_B, counted_B & figures_B

    @torch.no_grad()
    def _fill(self, first: int) -> None:
        source = self.source
        start = time.perf_counter()
        steps = min(source.buffer_steps, source.steps - first)
        rows = block_order(len(source.blocks), first * source.rows_a_step, steps * source.rows_a_step, source.seed)
        process, processes = source.process
        positions, partners, self._bounds = _deal(len(rows), source.blocks.context, steps, first, source.seed, process, processes)
        self._partners = torch.from_numpy(partners).to(self.device)
        mine = rows[process::processes]
        a_forward = max(1, min(-(-source.rows_a_step // processes), FORWARD_TOKENS // source.blocks.context))
        self._counted, self._figures = torch.zeros(2, positions.size, dtype=torch.bool, device=self.device)
        self.seconds["data"] += time.perf_counter() - start
        for begin in range(0, len(mine), a_forward):
            start = time.perf_counter()
            ids_BT = source.blocks.take(mine[begin : begin + a_forward])
            position = torch.from_numpy(positions[begin : begin + a_forward].flatten()).to(self.device)
            self._counted[position], self._figures[position] = self._masks(mine[begin : begin + a_forward])
            self.seconds["data"] += time.perf_counter() - start
            self._harvest(ids_BT, position, positions.size)
        self._first = first

    def _harvest(self, ids_BT: Tensor, position: Tensor, size: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # otherwise the previous step of the layers would count as the base's time
        start = time.perf_counter()
        seen = self._seen(ids_BT, self.source.sites)
        for index in list(seen):
            inputs, outputs = seen[index]
            if index not in self._buffers or len(self._buffers[index][0]) != size:
                self._buffers[index] = (self._empty(size, inputs), self._empty(size, outputs))
            for buffer, tensor in zip(self._buffers[index], (inputs, outputs), strict=True):
                buffer[position] = tensor.to(self.device)
            del seen[index], inputs, outputs
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds["base"] += time.perf_counter() - start

    def _seen(self, ids_BT: Tensor, sites: list[Site]) -> dict[int, tuple[Tensor, Tensor]]:
        """Return inputs and targets of a forward, (tokens, I) and (tokens, O), on the device of each of the base's layers."""
        source = self.source
        ids_BT = ids_BT.to(self.device)  # accelerate moves it further if the base is spread over devices
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
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return where the tokens of this process's rows are in the buffer, and how the steps are bounded.

    The tokens of all processes are permuted together, so that neither the step of a token nor its partner depends on the number of
    processes.

    Returns:
        The position in the buffer of each token, (rows, context); at each position that of the token's partner, another token of its
        block, or -1 for a token without one; and the bounds of the steps.
    """
    random = np.random.default_rng([seed, first, 1])
    slots = random.permutation(rows * context).reshape(rows, context)
    shifts = random.integers(1, max(2, context), rows)
    slots, shifts = slots[process::processes], shifts[process::processes]
    order = slots.flatten().argsort()
    positions = np.empty(order.size, dtype=np.int64)
    positions[order] = np.arange(order.size)
    bounds = np.searchsorted(slots.flatten()[order], np.arange(steps + 1) * (rows // steps) * context)
    positions = positions.reshape(slots.shape)
    turned = (np.arange(context) + shifts[:, None]) % context
    partners = np.empty(order.size, dtype=np.int64)
    partners[positions] = np.where(slots % EVERY == 0, np.take_along_axis(positions, turned, 1), -1)
    return positions, partners, bounds

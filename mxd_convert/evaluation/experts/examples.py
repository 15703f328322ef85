"""Figures of the coefficients of a range of experts, their top contexts, and examples by quantile.

All of it is exact, over all tokens that count. Work is vectorised over experts and tokens.
Shapes: n experts of the range, P pairs of an expert and a token on which it fires.
"""

from dataclasses import dataclass

import numpy as np

from mxd_convert.data.blocks import Blocks
from mxd_convert.evaluation.experts.firings import Array, Pairs, mixed, rank_within

BINS = 40  # histogram bins, from 0 to an expert's largest coefficient
TOP = 20  # top contexts per expert
BANDS, EACH = 5, 4  # quantile bands per expert, and examples per band
BEFORE, AFTER = 24, 8  # tokens shown before and after an example's token
DUPLICATE_TOKENS = 8  # tokens, the example's included: contexts that end in the same DUPLICATE_TOKENS tokens are duplicates
_CANDIDATES = 8 * TOP  # blocks with the largest coefficients, searched for distinct top contexts


@dataclass(frozen=True)
class Figures:
    """Figures of each expert's positive coefficients, (n): count, mean, largest, 99th percentile; histogram (n, BINS)."""

    count: Array
    mean: Array
    largest: Array
    p99: Array
    histogram: Array


@dataclass(frozen=True)
class Examples:
    """Positions of example tokens, block * context + offset in the block (-1: empty), and the coefficients around them.

    top: (n, TOP), the largest coefficient first. bands: (n, BANDS, EACH), the lowest quantile first. bounds: (n, BANDS, 2),
    smallest and largest coefficient of each band. top_heat, bands_heat: (..., BEFORE + 1 + AFTER), the expert's coefficient on
    each surrounding token, 0 outside the block.
    """

    top: Array
    top_heat: Array
    bands: Array
    bands_heat: Array
    bounds: Array


def figures(pairs: Pairs) -> Figures:
    """Return the figures of each expert; zeros for experts that never fire."""
    count = pairs.count
    fires = count > 0
    value = pairs.value.astype(np.float64)
    mean, largest, p99 = (np.zeros(len(count)) for _ in range(3))
    if fires.any():
        start = pairs.start[:-1][fires]
        mean[fires] = np.add.reduceat(value, start) / count[fires]
        largest[fires] = np.maximum.reduceat(value, start)
        rising = value[np.lexsort((value, pairs.expert))]
        rank = start + 0.99 * (count[fires] - 1)  # interpolates linearly, like np.quantile
        low = np.floor(rank).astype(np.int64)
        high = np.minimum(low + 1, start + count[fires] - 1)
        p99[fires] = rising[low] + (rank - low) * (rising[high] - rising[low])
    bins = np.minimum((value / np.maximum(largest[pairs.expert], 1e-30) * BINS).astype(np.int64), BINS - 1)
    histogram = np.bincount(pairs.expert * BINS + bins, minlength=len(count) * BINS).reshape(-1, BINS)
    return Figures(count, mean, largest, p99, histogram)


def examples(pairs: Pairs, blocks: Blocks, seed: int = 0) -> Examples:
    """Return each expert's top contexts and examples by quantile.

    Top contexts come from different blocks, and no two end in the same DUPLICATE_TOKENS tokens. A band is a fifth of an expert's firings, by
    size of the coefficient. Its examples are drawn by a hash of seed, expert and position.
    """
    falling = np.lexsort((pairs.position, -pairs.value, pairs.expert))
    top = _top(pairs, falling, blocks)
    bands, bounds = _bands(pairs, falling, seed)
    return Examples(top, _heat(pairs, top, blocks), bands, _heat(pairs, bands, blocks), bounds)


def _top(pairs: Pairs, falling: Array, blocks: Blocks) -> Array:
    expert, position = pairs.expert[falling], pairs.position[falling]
    keep = _first(expert * len(blocks) + position // blocks.context)
    expert, position = expert[keep], position[keep]
    keep = np.flatnonzero(rank_within(expert) < _CANDIDATES)
    expert, position = expert[keep], position[keep]
    keep = _first(mixed(_recent(position, blocks) + expert.astype(np.uint64), seed=1))
    return _table(expert[keep], position[keep], len(pairs.count), TOP)


def _first(key: Array) -> Array:
    """Return the index of the first occurrence of each value of `key`, ascending."""
    return np.sort(np.unique(key, return_index=True)[1])


def _recent(position: Array, blocks: Blocks) -> Array:
    """Return a hash (uint64) of the last DUPLICATE_TOKENS tokens of the block up to each position, which is included."""
    block, offset = np.divmod(position, blocks.context)
    around = offset[:, None] + np.arange(-DUPLICATE_TOKENS + 1, 1)
    inside = around >= 0
    ids = blocks.ids[block[:, None], np.maximum(around, 0)].astype(np.int64) + 1
    ids = np.where(inside, ids, 0)
    digest = np.zeros(len(position), dtype=np.uint64)
    for column in ids.T:
        digest = mixed(digest + column.astype(np.uint64), seed=2)
    return digest


def _bands(pairs: Pairs, falling: Array, seed: int) -> tuple[Array, Array]:
    count = pairs.count
    expert, position, value = pairs.expert[falling], pairs.position[falling], pairs.value[falling]
    rising = count[expert] - 1 - rank_within(expert)
    band = rising * BANDS // np.maximum(count[expert], 1)
    group = expert * BANDS + band
    bounds = np.zeros((len(count) * BANDS, 2))
    begins = np.flatnonzero(np.diff(group, prepend=-1))  # values fall within an expert, so bands are contiguous
    ends = np.flatnonzero(np.diff(group, append=-1))
    bounds[group[begins]] = np.stack([value[ends], value[begins]], -1)
    chance = mixed(mixed(position, seed=seed + 3) + (pairs.first + expert).astype(np.uint64), seed=4)
    order = np.lexsort((chance, group))
    group, position, value = group[order], position[order], value[order]
    keep = rank_within(group) < EACH
    group, position, value = group[keep], position[keep], value[keep]
    order = np.lexsort((position, -value, group))  # within a band, the largest first
    table = _table(group[order], position[order], len(bounds), EACH)
    return table.reshape(-1, BANDS, EACH), bounds.reshape(-1, BANDS, 2)


def _table(group: Array, position: Array, groups: int, columns: int) -> Array:
    """Return the first positions of each group as rows, (groups, columns), filled with -1. Equal groups are adjacent."""
    table = np.full((groups, columns), -1, dtype=np.int64)
    column = rank_within(group)
    keep = column < columns
    table[group[keep], column[keep]] = position[keep]
    return table


def _heat(pairs: Pairs, position: Array, blocks: Blocks) -> Array:
    """Return the experts' coefficients around positions (n, ...), as (n, ..., BEFORE + 1 + AFTER)."""
    tokens = len(blocks) * blocks.context
    around = position[..., None] + np.arange(-BEFORE, AFTER + 1)
    inside = (position[..., None] >= 0) & (around // blocks.context == position[..., None] // blocks.context)
    expert = np.arange(len(position)).reshape(-1, *[1] * (around.ndim - 1))
    wanted = expert * tokens + np.maximum(around, 0)
    if len(pairs.value) == 0:
        return np.zeros(around.shape, dtype=np.float32)
    there = pairs.expert * tokens + pairs.position  # ascending
    found = np.minimum(np.searchsorted(there, wanted), len(there) - 1)
    return np.where(inside & (there[found] == wanted), pairs.value[found], np.float32(0))

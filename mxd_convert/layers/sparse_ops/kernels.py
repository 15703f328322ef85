"""The sparse primitives in Triton, for GPUs, with the names, shapes and results of `reference.py`.

Sums are taken in float32 (float64 for float64 inputs), in a fixed order and without atomics, so runs are reproducible to the
bit. Pairs of weight 0 are skipped, and their rows are not read. Programs of the same block of D are launched consecutively, so
the slice of rows that they read (N x BLOCK_D, or B x BLOCK_D) can stay in the L2 cache. No call synchronises with the GPU.

Further shape suffixes: R experts of a range, C groups of experts, Q pieces of long segments.
"""

import math
from typing import Any

import torch
from torch import Tensor

from mxd_convert.layers.sparse_ops import reference
from mxd_convert.layers.sparse_ops.reference import Routing

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton doesn't support macOS
    AVAILABLE = False
else:
    AVAILABLE = True

TILE_ELEMENTS = 4096  # elements in flight per program: 32 per thread, eight 16-byte loads in float32
GATHER_BLOCK = 256  # columns of D when few rows are read: the slice of all rows fits in L2 (22 MB for 21,490 rows in float32)
SEGMENT_BLOCK = 512  # columns of D when many segments are summed: most have few pairs, so fewer programs are faster
MAX_TILE_PAIRS = 64  # most pairs per tile
PIECE = 256  # most pairs that one program sums; an expert's further pairs are split into pieces of this size
SELECTED_FROM = 4096  # most values searched in one stage; longer rows take two
MAX_VALUES = 8192  # most values that one program can search


def route(weights_BK: Tensor, indices_BK: Tensor, n_experts: int) -> Routing:
    """Return the pairs sorted by expert. The sort is stable, so sums are always taken in the same order."""
    sorted_M, pairs_M = indices_BK.flatten().int().sort(stable=True)  # int32 takes half the passes of int64
    experts_N1 = torch.arange(n_experts + 1, device=sorted_M.device, dtype=sorted_M.dtype)
    starts_N1 = torch.searchsorted(sorted_M, experts_N1)  # bincount would synchronise with the GPU
    return Routing(pairs_M // max(indices_BK.shape[1], 1), weights_BK.flatten()[pairs_M], starts_N1)


def top_k(gate_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row, unordered, as (values, indices), (B, K). Exact; ties are broken reproducibly.

    For many experts the search has two stages, as in the reference. Groups are of adjacent experts, so that candidates are
    read in whole memory sectors. Their size makes both searches about sqrt(N K) long, and reading the gate dominates the time.
    """
    (tokens, n_experts), group = gate_BN.shape, 1
    if n_experts > SELECTED_FROM:
        group = triton.next_power_of_2(math.isqrt(n_experts // max(k, 1)))
    groups = triton.cdiv(n_experts, group)
    if gate_BN.numel() == 0 or not 0 < k <= groups or max(groups, k * group) > MAX_VALUES:
        return reference.top_k(gate_BN, k)
    bits_BN = _bits(gate_BN.contiguous())
    infinity = int(_bits(torch.tensor(math.inf, dtype=gate_BN.dtype)))
    keys = {"INFINITY": infinity, "LARGEST": torch.iinfo(bits_BN.dtype).max, "BITS": torch.iinfo(bits_BN.dtype).bits}
    indices_BK = torch.empty((tokens, k), dtype=torch.int64, device=gate_BN.device)
    if group == 1:
        _launch(_select, (tokens,), bits_BN, None, indices_BK, n_experts, k, **_width(n_experts, 1), **keys)
        return gate_BN.gather(1, indices_BK), indices_BK
    maxima_BC, groups_BK = bits_BN.new_empty((tokens, groups)), torch.empty_like(indices_BK)
    tile = {"GROUP": group, "BLOCK_C": max(1, TILE_ELEMENTS // group)}
    grid = tokens, triton.cdiv(groups, tile["BLOCK_C"])
    _launch(_group_maxima, grid, bits_BN, maxima_BC, n_experts, groups, **tile, **keys)
    _launch(_select, (tokens,), maxima_BC, None, groups_BK, groups, k, **_width(groups, 1), **keys)
    _launch(_select, (tokens,), bits_BN, groups_BK, indices_BK, n_experts, k, **_width(k * group, group), **keys)
    return gate_BN.gather(1, indices_BK), indices_BK


def sum_rows(weights_BK: Tensor, indices_BK: Tensor, rows_ND: Tensor) -> Tensor:
    """Return `sum_k weights[b, k] * rows[indices[b, k]]`, (B, D)."""
    (tokens, k), width = indices_BK.shape, rows_ND.shape[1]
    sums_BD = rows_ND.new_empty((tokens, width)) if k else rows_ND.new_zeros((tokens, width))
    if sums_BD.numel() and k:
        blocks = _blocks(width, k, GATHER_BLOCK)
        grid = tokens, triton.cdiv(width, blocks["BLOCK_D"])
        inputs = weights_BK.contiguous(), indices_BK.contiguous(), rows_ND.contiguous()
        _launch(_sum_rows, grid, *inputs, sums_BD, k, width, **blocks, ACC=_accumulator(rows_ND))
    return sums_BD


def row_products(left_BD: Tensor, indices_BK: Tensor, rows_ND: Tensor) -> Tensor:
    """Return the dot products `<left[b], rows[indices[b, k]]>`, (B, K)."""
    (tokens, k), width = indices_BK.shape, rows_ND.shape[1]
    products_BK = left_BD.new_empty((tokens, k))
    if products_BK.numel():
        blocks = _blocks(width, k, GATHER_BLOCK)
        grid = tokens, triton.cdiv(k, blocks["TILE"])
        inputs = left_BD.contiguous(), indices_BK.contiguous(), rows_ND.contiguous()
        _launch(_row_products, grid, *inputs, products_BK, k, width, **blocks, ACC=_accumulator(rows_ND))
    return products_BK


def sum_by_expert(routing: Routing, source_BD: Tensor, first: int = 0, last: int | None = None) -> Tensor:
    """Return each expert's sum of `weight * source[token]` over its pairs, (last - first, D).

    Covers experts `first` to `last - 1`; None means N. Rows of experts without pairs are 0.

    One program sums the first PIECE pairs of an expert, which are nearly always all. Further pairs are split into pieces, which
    an earlier launch sums; the program adds these partial sums in order. This balances the load for any distribution of pairs.
    """
    starts_R1 = routing.starts_N1[first : None if last is None else last + 1].contiguous()
    experts, width, pairs = max(0, len(starts_R1) - 1), source_BD.shape[1], len(routing.tokens_M)
    if pairs == 0 or experts == 0 or width == 0:
        return source_BD.new_zeros((experts, width))
    sums_RD = source_BD.new_empty((experts, width))
    inputs = starts_R1, routing.tokens_M.contiguous(), routing.weights_M.contiguous(), source_BD.contiguous()
    blocks = _blocks(width, PIECE, SEGMENT_BLOCK)
    size = {"D": width, "PIECE": PIECE, **blocks, "ACC": _accumulator(source_BD)}
    columns = triton.cdiv(width, blocks["BLOCK_D"])
    most = pairs // PIECE  # upper bound on the further pieces: reading the exact number would synchronise with the GPU
    if most == 0:
        _launch(_sum_segments, (experts, columns), *inputs, None, None, sums_RD, **size)
        return sums_RD
    before_R1 = starts_R1.new_zeros(experts + 1)
    before_R1[1:] = ((starts_R1.diff() - 1).clamp_min(0) // PIECE).cumsum(0)
    owners_Q = torch.searchsorted(before_R1[1:], torch.arange(most, device=starts_R1.device), right=True)
    partials_QD = torch.empty((most, width), device=source_BD.device, dtype=torch.promote_types(source_BD.dtype, torch.float32))
    _launch(_sum_pieces, (most, columns), *inputs, before_R1, owners_Q, partials_QD, experts, **size)
    _launch(_sum_segments, (experts, columns), *inputs, before_R1, partials_QD, sums_RD, **size)
    return sums_RD


def _bits(numbers: Tensor) -> Tensor:
    return numbers.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.element_size()])


def _width(values: int, group: int) -> dict[str, int]:
    width = triton.next_power_of_2(values)
    return {"WIDTH": width, "GROUP": group, "num_warps": max(1, width // 1024)}


def _blocks(width: int, pairs: int, widest: int) -> dict[str, int]:
    """Return the tile of a program, pairs x columns, and its number of warps."""
    block = min(triton.next_power_of_2(width), widest)
    tile = min(triton.next_power_of_2(pairs), TILE_ELEMENTS // block, MAX_TILE_PAIRS)
    return {"BLOCK_D": block, "TILE": tile, "num_warps": max(1, min(4, block * tile // 1024))}


def _accumulator(rows: Tensor) -> Any:
    return tl.float64 if rows.dtype == torch.float64 else tl.float32


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    with torch.cuda.device_of(arguments[0]):  # the tensors need not be on the current device
        kernel[grid](*arguments, **options)


if AVAILABLE:

    @triton.jit
    def _weighted_sum(
        begin, end, weights, indices, rows, columns, D: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr
    ):
        """Return the sum of `weights[p] * rows[indices[p], columns]` over pairs p from `begin` to `end - 1`, (BLOCK_D)."""
        totals = tl.zeros((TILE, BLOCK_D), ACC)
        for start in range(begin, end, TILE):
            pairs = start + tl.arange(0, TILE)
            weight = tl.load(weights + pairs, mask=pairs < end, other=0.0).to(ACC)
            index = tl.load(indices + pairs, mask=pairs < end, other=0).to(tl.int64)
            wanted = (weight != 0)[:, None] & (columns < D)[None, :]
            row = tl.load(rows + index[:, None] * D + columns[None, :], mask=wanted, other=0.0)
            totals += weight[:, None] * row.to(ACC)
        return tl.sum(totals, axis=0)

    @triton.jit
    def _sum_rows(
        weights, indices, rows, sums,
        K: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = _weighted_sum(0, K, weights + token * K, indices + token * K, rows, columns, D, TILE, BLOCK_D, ACC)
        tl.store(sums + token * D + columns, total.to(sums.dtype.element_ty), mask=columns < D)

    @triton.jit
    def _row_products(
        left, indices, rows, products,
        K: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        pairs = tl.program_id(1) * TILE + tl.arange(0, TILE)
        index = tl.load(indices + token * K + pairs, mask=pairs < K, other=0).to(tl.int64)
        totals = tl.zeros((TILE, BLOCK_D), ACC)
        for start in range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            a = tl.load(left + token * D + columns, mask=columns < D, other=0.0).to(ACC)
            wanted = (pairs < K)[:, None] & (columns < D)[None, :]
            b = tl.load(rows + index[:, None] * D + columns[None, :], mask=wanted, other=0.0).to(ACC)
            totals += a[None, :] * b
        total = tl.sum(totals, axis=1)
        tl.store(products + token * K + pairs, total.to(products.dtype.element_ty), mask=pairs < K)

    @triton.jit
    def _sum_pieces(
        starts, tokens, weights, source, before, owners, partials, experts,
        D: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        """Sum the further pieces of all experts, one per program. before: number of further pieces of all earlier experts."""
        piece = tl.program_id(0).to(tl.int64)
        expert = tl.load(owners + piece)
        if expert < experts:
            begin = tl.load(starts + expert) + (piece - tl.load(before + expert) + 1) * PIECE
            end = tl.minimum(begin + PIECE, tl.load(starts + expert + 1))
            columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
            total = _weighted_sum(begin, end, weights, tokens, source, columns, D, TILE, BLOCK_D, ACC)
            tl.store(partials + piece * D + columns, total, mask=columns < D)

    @triton.jit
    def _sum_segments(
        starts, tokens, weights, source, before, partials, sums,
        D: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        expert = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        begin = tl.load(starts + expert)
        end = tl.minimum(begin + PIECE, tl.load(starts + expert + 1))
        total = _weighted_sum(begin, end, weights, tokens, source, columns, D, TILE, BLOCK_D, ACC)
        if before is not None:
            for piece in range(tl.load(before + expert), tl.load(before + expert + 1)):
                total += tl.load(partials + piece * D + columns, mask=columns < D, other=0.0)
        tl.store(sums + expert * D + columns, total.to(sums.dtype.element_ty), mask=columns < D)

    @triton.jit
    def _keys(bits, INFINITY: tl.constexpr, LARGEST: tl.constexpr, BITS: tl.constexpr):
        """Return integers that sort like the floats with these bits, NaN last. The mapping is its own inverse, except for NaN."""
        wide = bits.to(tl.int64 if BITS == 64 else tl.int32)
        keys = tl.where(wide < 0, wide ^ LARGEST, wide)
        return tl.where((wide & LARGEST) > INFINITY, LARGEST, keys)

    @triton.jit
    def _group_maxima(
        gate, maxima, N, C,
        GROUP: tl.constexpr, BLOCK_C: tl.constexpr, INFINITY: tl.constexpr, LARGEST: tl.constexpr, BITS: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        groups = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        bits = tl.load(gate + token * N + columns, mask=columns < N, other=0)
        keys = tl.where(columns < N, _keys(bits, INFINITY, LARGEST, BITS), -LARGEST - 1)
        largest = tl.max(keys, axis=1)
        largest = tl.where(largest < 0, largest ^ LARGEST, largest)  # back to a float's bits; the key of NaN is a NaN's bits
        tl.store(maxima + token * C + groups, largest.to(maxima.dtype.element_ty), mask=groups < C)

    @triton.jit
    def _select(
        values, groups, chosen, N, K,
        WIDTH: tl.constexpr, GROUP: tl.constexpr, INFINITY: tl.constexpr, LARGEST: tl.constexpr, BITS: tl.constexpr,
    ):  # fmt: skip
        """Store the indices of the K largest values of a row, or, with `groups`, of the members of these groups.

        The K-th largest value is found bit by bit, by counting. This is much less work than a sort, for any K.
        """
        token = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, WIDTH)
        valid = columns < N
        if groups is not None:
            member = columns < K * GROUP
            group = tl.load(groups + token * K + columns // GROUP, mask=member, other=0).to(tl.int32)
            columns = group * GROUP + columns % GROUP
            valid = member & (columns < N)
        bits = tl.load(values + token * N + columns, mask=valid, other=0)
        keys = tl.where(valid, _keys(bits, INFINITY, LARGEST, BITS), -LARGEST - 1)  # padding sorts below -inf
        least = tl.where(tl.sum((keys >= 0).to(tl.int32), axis=0) >= K, 0, -LARGEST - 1).to(keys.dtype)
        step = tl.full((), LARGEST // 2 + 1, keys.dtype)
        for _ in range(BITS - 1):
            enough = tl.sum((keys >= least + step).to(tl.int32), axis=0) >= K
            least = tl.where(enough, least + step, least)
            step = step >> 1
        above, equal = keys > least, keys == least
        both = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), axis=0)  # two counts, from 1, in one scan
        slot = tl.where(above, both & 0xFFFF, tl.sum(above.to(tl.int32), axis=0) + (both >> 16)) - 1
        tl.store(chosen + token * K + slot, columns.to(tl.int64), mask=(above | equal) & (slot < K))

"""Columns of the largest values of each row, on a CPU, by numpy's partition.

It uses vector instructions. On one thread the two stages of `reference.top_k` are 1.5 to 10 times as fast with it as torch's top-k
(benchmarks/top_k.py). Shape suffixes: B rows, N columns, K chosen.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

MIN_VALUES = 2**16  # per thread
PACKED_COLUMNS = 2**16  # that fit into half of a key


def largest(values_BN: Tensor, k: int) -> Tensor:
    """Return the columns of the k largest values of each row, unordered, (B, K) int64. Exact; 1 <= k <= N."""
    values_BN = values_BN.detach()
    if values_BN.dtype == torch.bfloat16 and values_BN.shape[1] <= PACKED_COLUMNS:
        return _largest_packed(values_BN, k)
    array = (values_BN.float() if values_BN.dtype in (torch.bfloat16, torch.float16) else values_BN).numpy()
    columns_BK = torch.empty(len(array), k, dtype=torch.int64)
    out, first = columns_BK.numpy(), array.shape[1] - k

    def select(rows: slice) -> None:
        out[rows] = np.argpartition(array[rows], first, axis=1)[:, first:]

    _over_rows(select, *array.shape)
    return columns_BK


def _largest_packed(values_BN: Tensor, k: int) -> Tensor:
    """Do the same for bfloat16: a value's 16 bits and its column's make one integer, and values of those are partitioned."""
    bits_BN = values_BN.contiguous().view(torch.int16)
    bits_BN = (bits_BN >> 15).bitwise_and_(0x7FFF).bitwise_xor_(bits_BN)  # negative numbers in the order of integers
    columns_N = torch.arange(values_BN.shape[1], dtype=torch.int32)
    keys = bits_BN.int().bitwise_left_shift_(16).bitwise_or_(columns_N).numpy()
    columns_BK = torch.empty(len(keys), k, dtype=torch.int64)
    out, first = columns_BK.numpy(), keys.shape[1] - k

    def select(rows: slice) -> None:
        keys[rows].partition(first, axis=1)
        np.bitwise_and(keys[rows, first:], 0xFFFF, out=out[rows])

    _over_rows(select, *keys.shape)
    return columns_BK


def _over_rows(select: Callable[[slice], None], rows: int, columns: int) -> None:
    """Call `select` on slices of the rows, in as many threads as torch uses. numpy itself uses one."""
    threads = min(torch.get_num_threads(), rows * columns // MIN_VALUES)
    if threads <= 1:
        select(slice(0, rows))
        return
    size = -(-rows // threads)
    list(_pool(torch.get_num_threads()).map(select, [slice(start, start + size) for start in range(0, rows, size)]))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="selection")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads

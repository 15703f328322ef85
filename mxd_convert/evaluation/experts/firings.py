"""The firings of a layer's experts over a whole text: streamed to files, sorted by expert, and read back for a range of experts.

Memory is bounded by the number of experts and by the pairs of one expert, at 8 bytes per token on which it fires.
Shapes: P pairs of an expert and a token on which it fires.
"""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_PIECE = 2**20  # pairs sorted at a time
_ZEROS = 2**20  # bytes written at a time
_RECORD = np.dtype([("expert", np.int32), ("position", np.uint32), ("value", np.float32)])


@dataclass(frozen=True)
class Pairs:
    """The pairs of experts `first` to `last` - 1, sorted by expert, then by position.

    expert: (P), counted from `first`. position: (P), block * context + offset in the block. value: (P), the positive coefficient.
    start: (last - first + 1), the index of each expert's first pair, and P at the end.
    """

    first: int
    last: int
    expert: Array
    position: Array
    value: Array
    start: Array

    @property
    def count(self) -> Array:
        """Return the number of tokens on which each expert fires."""
        return np.diff(self.start)


class Firings:
    """All pairs of a layer, in files in `folder`: `add` them, `sort` them, then `read` them."""

    def __init__(self, folder: Path, raw: BinaryIO, n_experts: int) -> None:
        self.folder, self._raw = folder, raw
        self.count_N = np.zeros(n_experts, dtype=np.int64)

    @classmethod
    def create(cls, folder: Path, n_experts: int) -> "Firings":
        """Create the folder and open the file for pairs in the order of the text."""
        folder.mkdir(parents=True)
        return cls(folder, (folder / "raw").open("wb"), n_experts)

    def add(self, experts: Array, positions: Array, values: Array) -> None:
        """Append pairs, arrays of (P), in the order of the text."""
        records = np.empty(len(experts), dtype=_RECORD)
        records["expert"], records["position"], records["value"] = experts, positions, values
        self._raw.write(records.tobytes())  # unlike tofile, write raises OSError if the disk is full
        self.count_N += np.bincount(experts, minlength=len(self.count_N))

    def sort(self) -> None:
        """Sort the pairs by expert on disk, _PIECE at a time. An expert's pairs keep the order of the text."""
        self._raw.close()
        self.start = np.concatenate([[0], np.cumsum(self.count_N)])
        total = max(1, int(self.start[-1]))  # an empty file can't be mapped
        self._position = _array(self.folder / "position", np.uint32, total)
        self._value = _array(self.folder / "value", np.float32, total)
        filled_N = self.start[:-1].copy()
        with (self.folder / "raw").open("rb") as raw:
            while len(records := np.fromfile(raw, dtype=_RECORD, count=_PIECE)):
                records = records[by_expert(records["expert"], len(filled_N))]
                slot = filled_N[records["expert"]] + rank_within(records["expert"])
                self._position[slot], self._value[slot] = records["position"], records["value"]
                filled_N += np.bincount(records["expert"], minlength=len(filled_N))
        (self.folder / "raw").unlink()

    def read(self, first: int, last: int) -> Pairs:
        """Return the pairs of experts `first` to `last` - 1."""
        where = slice(int(self.start[first]), int(self.start[last]))
        count = self.count_N[first:last]
        expert = np.repeat(np.arange(last - first), count)
        start = self.start[first : last + 1] - self.start[first]
        return Pairs(first, last, expert, self._position[where].astype(np.int64), np.array(self._value[where]), start)

    def ranges(self, experts: int, pairs: int) -> Iterator[tuple[int, int]]:
        """Yield ranges (first, last) of experts that together cover all.

        A range has at most `pairs` pairs, or is a single expert. It doesn't cross a multiple of `experts`.
        """
        first = 0
        while first < len(self.count_N):
            end = min(first - first % experts + experts, len(self.count_N))
            fits = int(np.searchsorted(self.start, self.start[first] + pairs, side="right")) - 1
            last = min(end, max(first + 1, fits))
            yield first, last
            first = last


def reserve(path: Path, size: int) -> None:
    """Write a file of `size` zero bytes, fully allocated on disk. Raises OSError if the disk is full.

    Call it before the file is mapped into memory: writing to a sparse file's mapping kills the process (SIGBUS) if the disk is
    full.
    """
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:  # some systems and file systems don't support it
            if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV):
                raise
            for start in range(0, size, _ZEROS):
                file.write(bytes(min(_ZEROS, size - start)))


def _array(path: Path, dtype: Any, length: int) -> Array:
    """Return a new file mapped as a writable array of zeros."""
    reserve(path, length * np.dtype(dtype).itemsize)
    return np.memmap(path, dtype=dtype, mode="r+", shape=(length,))


def by_expert(experts: Array, n_experts: int) -> Array:
    """Return the stable order that sorts pairs by expert."""
    return np.argsort(experts.astype(np.uint16) if n_experts <= 2**16 else experts, kind="stable")  # 16-bit keys get a radix sort


def rank_within(group: Array) -> Array:
    """Return each element's rank within its group, from 0. Equal groups are adjacent."""
    if len(group) == 0:
        return np.zeros(0, dtype=np.int64)
    begins = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    return np.arange(len(group)) - np.repeat(begins, np.diff(np.concatenate([begins, [len(group)]])))


def mixed(values: Array, seed: int) -> Array:
    """Return a hash (uint64, splitmix64) of each integer, which depends on the integer and the seed only."""
    x = (values.astype(np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

"""Which experts of a layer fired where, over a whole text: streamed to files, sorted by expert there, and read back a few experts at a time.

Memory is bounded by the number of experts and by what one of them holds, 8 bytes for each token on which it fires. P: pairs of an
expert and a token on which it fires.
"""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_PIECE = 2**20  # pairs that are sorted into place at a time
_ZEROS = 2**20  # bytes that are written at a time
_RECORD = np.dtype([("expert", np.int32), ("position", np.uint32), ("value", np.float32)])


@dataclass(frozen=True)
class Pairs:
    """The pairs of experts `first` to `last` - 1, by expert and then by position: arrays of length P.

    expert counts from `first`. position: block * context + place in the block. value: the coefficient, positive. start: where each
    expert's pairs begin, and the end of the last one's.
    """

    first: int
    last: int
    expert: Array
    position: Array
    value: Array
    start: Array

    @property
    def count(self) -> Array:
        """On how many tokens each expert fires."""
        return np.diff(self.start)


class Firings:
    """All pairs of a layer, in files in `folder`. `add` them, then `sort`, then read them."""

    def __init__(self, folder: Path, n_experts: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.count_N = np.zeros(n_experts, dtype=np.int64)
        self._raw = (folder / "raw").open("wb")

    def add(self, experts: Array, positions: Array, values: Array) -> None:
        """Pairs (P) in the order of the text."""
        records = np.empty(len(experts), dtype=_RECORD)
        records["expert"], records["position"], records["value"] = experts, positions, values
        self._raw.write(records.tobytes())  # unlike tofile, it says that the disk is full
        self.count_N += np.bincount(experts, minlength=len(self.count_N))

    def sort(self) -> None:
        """Puts every pair in its expert's place, a piece at a time; within an expert the order of the text stays."""
        self._raw.close()
        self.start = np.concatenate([[0], np.cumsum(self.count_N)])
        total = max(1, int(self.start[-1]))  # an empty file can't be mapped
        self._position = _array(self.folder / "position", np.uint32, total)
        self._value = _array(self.folder / "value", np.float32, total)
        filled_N = self.start[:-1].copy()
        with (self.folder / "raw").open("rb") as raw:
            while len(records := np.fromfile(raw, dtype=_RECORD, count=_PIECE)):
                records = records[by_expert(records["expert"], len(filled_N))]
                place = filled_N[records["expert"]] + rank_within(records["expert"])
                self._position[place], self._value[place] = records["position"], records["value"]
                filled_N += np.bincount(records["expert"], minlength=len(filled_N))
        (self.folder / "raw").unlink()

    def read(self, first: int, last: int) -> Pairs:
        """The pairs of experts `first` to `last` - 1."""
        where = slice(int(self.start[first]), int(self.start[last]))
        count = self.count_N[first:last]
        expert = np.repeat(np.arange(last - first), count)
        start = self.start[first : last + 1] - self.start[first]
        return Pairs(first, last, expert, self._position[where].astype(np.int64), np.array(self._value[where]), start)

    def ranges(self, experts: int, pairs: int) -> Iterator[tuple[int, int]]:
        """All experts in ranges (first, last) that cross no multiple of `experts` and hold at most so many pairs, or a single expert."""
        first = 0
        while first < len(self.count_N):
            end = min(first - first % experts + experts, len(self.count_N))
            fits = int(np.searchsorted(self.start, self.start[first] + pairs, side="right")) - 1
            last = min(end, max(first + 1, fits))
            yield first, last
            first = last


def reserve(path: Path, size: int) -> None:
    """Make a file of `size` zero bytes, all of them taken from the disk. Raises OSError where it is full.

    To be called before a file is mapped into memory and written to: in a file of holes, a full disk ends the process (SIGBUS).
    """
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:  # not on every system, nor on every file system
            if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV):
                raise
            for start in range(0, size, _ZEROS):
                file.write(bytes(min(_ZEROS, size - start)))


def _array(path: Path, dtype: Any, length: int) -> Array:
    """A new file as an array of zeros to write into."""
    reserve(path, length * np.dtype(dtype).itemsize)
    return np.memmap(path, dtype=dtype, mode="r+", shape=(length,))


def by_expert(experts: Array, n_experts: int) -> Array:
    """The order that puts pairs of one expert together, and leaves the rest as it is."""
    return np.argsort(experts.astype(np.uint16) if n_experts <= 2**16 else experts, kind="stable")  # of 16 bits: a radix sort


def rank_within(group: Array) -> Array:
    """The place of each element among those of its group, from 0; groups lie together."""
    if len(group) == 0:
        return np.zeros(0, dtype=np.int64)
    begins = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    return np.arange(len(group)) - np.repeat(begins, np.diff(np.concatenate([begins, [len(group)]])))


def mixed(values: Array, seed: int) -> Array:
    """Pseudo-random uint64 of integers (splitmix64): the same in every run, whatever comes before or after."""
    x = (values.astype(np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

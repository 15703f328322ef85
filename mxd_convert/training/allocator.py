"""The C library's allocator, told to keep what training frees."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
_MOST, _USUAL = 2**31 - 1, 2**23


@contextmanager
def kept_memory() -> Iterator[None]:
    """Within it, freed memory stays with the process instead of going back to the system; afterwards what is free goes back.

    A step frees and asks again for the same hundreds of megabytes; by default glibc maps them anew each time, and the page faults
    cost more than filling the pages (benchmarks/RESULTS.md). Does nothing where the C library is another.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, _MOST)
    libc.mallopt(_TRIM_THRESHOLD, _MOST)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _USUAL)
        libc.mallopt(_TRIM_THRESHOLD, _USUAL)
        libc.malloc_trim(0)

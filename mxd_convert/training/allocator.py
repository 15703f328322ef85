"""Settings of the C library's allocator that keep freed memory during training."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
_MAX_BYTES, _DEFAULT_BYTES = 2**31 - 1, 2**23  # bytes


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory in the process within the context, and return it to the system afterwards.

    A step frees and allocates the same hundreds of megabytes. By default glibc maps them again each time, and the page faults
    cost more than filling the pages (benchmarks/RESULTS.md). Does nothing with another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, _MAX_BYTES)
    libc.mallopt(_TRIM_THRESHOLD, _MAX_BYTES)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _DEFAULT_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, _DEFAULT_BYTES)
        libc.malloc_trim(0)

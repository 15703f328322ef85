"""The C library's allocator, told to keep what training frees."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
_MOST = 2**31 - 1


def keep_freed_memory() -> None:
    """Lets freed memory stay with the process instead of going back to the system.

    A step frees and asks again for the same hundreds of megabytes; by default glibc maps them anew each time, and the page faults
    cost more than filling the pages (benchmarks/RESULTS.md). Does nothing where the C library is another.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _MOST)
        libc.mallopt(_TRIM_THRESHOLD, _MOST)

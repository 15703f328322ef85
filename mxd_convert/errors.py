"""The one exception for what a user can put right, and the translation of a full disk into it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INTERRUPTED = 130  # exit status
INTERRUPTED_AND_TOLD = -130  # by another process
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(ValueError):
    """The user's input is at fault: the message names the thing, the value and the fix in a line or two (exit status 2).

    told: whether another process of the same run says it.
    """

    told = False


class Stopped(KeyboardInterrupt):
    """A run was told to stop, by Ctrl-C or SIGTERM, and has saved its state. told: as above."""

    told = False


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that there is no space left, however it was wrapped (safetensors and shutil report it in words)."""
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return True
    return any(f"os error {code}" in str(error) or f"[Errno {code}]" in str(error) for code in _NO_SPACE)


@contextmanager
def disk_guard(folder: Path) -> Iterator[None]:
    """Turns 'no space left' below into an InputError that names `folder`."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise InputError(
            f"{folder}: no space left on the disk. Free some space and give the same command again: it goes on from its last saved state."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory has run out, on a device or in the process (torch's CPU allocator says so in words)."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "Cannot allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(word in str(error) for word in words)
    )


@contextmanager
def memory_guard(message: str) -> Iterator[None]:
    """Turns 'out of memory' below into an InputError that says what to lower."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(message) from error

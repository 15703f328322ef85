"""`InputError`, the exception for errors that the user can fix, and guards that raise it for a full disk or exhausted memory."""

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INTERRUPTED = 130  # exit status
INTERRUPTED_AND_REPORTED = -130  # the same, if another process of the run has reported it
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad allocation",
    "bad_alloc",
    "failed to allocate",
    "unable to allocate",
    "failed to map segment",
    "can't start new thread",
    "resource temporarily unavailable",
)


class InputError(ValueError):
    """An error that the user can fix. The message names the input, its value and the fix in one or two lines (exit status 2).

    reported_elsewhere: whether another process of the same run reports the error.
    """

    reported_elsewhere = False


class NotFinite(InputError):
    """A loss or parameter that is not finite. Other runs of the same sweep can continue."""


class Stopped(KeyboardInterrupt):
    """A run that was stopped by Ctrl-C or SIGTERM and has saved its state. told: as for `InputError`."""

    reported_elsewhere = False


def first_line(error: BaseException, most: int = 300) -> str:
    """Return the first line of an error's message, or its type if the message is empty, cut to `most` characters."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= most else line[: most - 3] + "..."


def is_disk_full(error: BaseException) -> bool:
    """Return whether `error` reports a full disk. safetensors and shutil report it only in the message."""
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return True
    message = str(error)
    return any(
        text in message
        for code in _NO_SPACE
        for text in (f"os error {code}", f"[Errno {code}]", f"No space left on device ({code})")
    )


@contextmanager
def disk_guard(folder: Path) -> Iterator[None]:
    """Raise an InputError that names `folder` if the block fails because the disk is full."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not is_disk_full(error):
            raise
        raise InputError(
            f"{folder}: no space left on the disk. Free some space and run the same command again."
            " A run resumes from its last saved state."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` reports exhausted memory, on a device or in the process. torch reports it only in the message."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError | OSError | ImportError) and any(text in message for text in _NO_MEMORY)


def address_space() -> int | None:
    """Return the limit on this process's address space in bytes (`ulimit -v`), or None if there is no limit."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


@contextmanager
def memory_guard(message: str) -> Iterator[None]:
    """Raise an InputError with `message` if the block runs out of memory."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not is_out_of_memory(error):
            raise
        raise InputError(message) from error

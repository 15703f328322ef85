"""The one exception for what a user can put right, and the translation of a full disk and of used-up memory into it."""

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INTERRUPTED = 130  # exit status
INTERRUPTED_AND_TOLD = -130  # by another process
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
    """The user's input is at fault: the message names the thing, the value and the fix in a line or two (exit status 2).

    told: whether another process of the same run says it.
    """

    told = False


class NotFinite(InputError):
    """A loss or a parameter of a run is not finite: of several runs, the others may go on."""


class Stopped(KeyboardInterrupt):
    """A run was told to stop, by Ctrl-C or SIGTERM, and has saved its state. told: as above."""

    told = False


def first_line(error: BaseException, most: int = 300) -> str:
    """Return the first line of an error's message, or its name where it has none; cut at `most` characters."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= most else line[: most - 3] + "..."


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that there is no space left, however it was wrapped (safetensors and shutil report it in words)."""
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return True
    words = str(error)
    return any(
        said in words
        for code in _NO_SPACE
        for said in (f"os error {code}", f"[Errno {code}]", f"No space left on device ({code})")
    )


@contextmanager
def disk_guard(folder: Path) -> Iterator[None]:
    """Turn 'no space left' below into an InputError that names `folder`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not is_disk_full(error):
            raise
        raise InputError(
            f"{folder}: no space left on the disk. Free some space and give the same command again;"
            " a run resumes from its last saved state."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory has run out, on a device or in the process (torch and the loader say so in words)."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError | OSError | ImportError) and any(word in words for word in _NO_MEMORY)


def address_space() -> int | None:
    """Return the bytes of address space that this process may take (`ulimit -v`); None without a limit."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


@contextmanager
def memory_guard(message: str) -> Iterator[None]:
    """Turn 'out of memory' below into an InputError that says what to lower."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not is_out_of_memory(error):
            raise
        raise InputError(message) from error

"""The one exception for what a user can put right, and the translation of a full disk into it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(ValueError):
    """The user's input is at fault: the message names the thing, the value and the fix in a line or two (exit status 2)."""


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that there is no space left, however it was wrapped (safetensors reports it in words)."""
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return True
    return any(f"os error {code}" in str(error) for code in _NO_SPACE)


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

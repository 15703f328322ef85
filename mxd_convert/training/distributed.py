"""Several processes that work on one run (torchrun, accelerate launch): where one fails all of them end, and it is told once."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mxd_convert.errors import InputError

_LOST = ("connection closed", "connection reset", "broken pipe", "connection refused", "remote process exited", "socket timeout")


@contextmanager
def once_a_machine() -> Iterator[None]:
    """Before the processes know each other: all of a machine find the same, so its first one tells it."""
    try:
        yield
    except InputError as error:
        error.told = os.environ.get("LOCAL_RANK", "0") != "0"
        raise


@contextmanager
def agreed(processes: int, process: int) -> Iterator[None]:
    """Where one of the processes fails within it, all of them do: the others with its InputError, marked as told.

    Nothing within it may wait for another process.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    words = _gathered(processes, None if failed is None else str(failed))
    first = next((number for number, word in enumerate(words) if word is not None), None)
    if isinstance(failed, InputError):
        failed.told = words.index(str(failed)) < process
    if failed is not None:
        raise failed
    if first is not None:
        theirs = InputError(str(words[first]))
        theirs.told = True
        raise theirs


def _gathered(processes: int, word: str | None) -> list[str | None]:
    if processes == 1:
        return [word]
    from accelerate.utils import gather_object

    found: list[str | None] = gather_object([word])
    return found


def part() -> None:
    """Ends this process's ties to the others, at the end of a run that went well: left to the interpreter's exit, gloo's threads may abort it."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def lost_guard(processes: int) -> Iterator[None]:
    """Turns the errors of talking to a process that is no more into an InputError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or processes == 1 or not _is_lost(error):
            raise
        raise InputError(
            f"another process of this run has ended before its time ({str(error).splitlines()[0]:.120}); put right what it says, and give"
            " the same command again: it goes on from its last saved state"
        ) from error


def _is_lost(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _LOST)

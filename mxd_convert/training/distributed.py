"""Errors of a run with several processes (torchrun, accelerate launch): all of them exit, and one reports the error."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mxd_convert.errors import InputError

_LOST = ("connection closed", "connection reset", "broken pipe", "connection refused", "remote process exited", "socket timeout")


@contextmanager
def once_per_machine() -> Iterator[None]:
    """Mark InputErrors as reported on all local ranks but 0: before the process group exists, all find the same errors."""
    try:
        yield
    except InputError as error:
        error.reported_elsewhere = os.environ.get("LOCAL_RANK", "0") != "0"
        raise


@contextmanager
def agreed(processes: int, process: int) -> Iterator[None]:
    """Raise in all processes if one of them fails in the context: in the others as an InputError that is marked as reported.

    Code in the context must not wait for another process.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    messages = _gathered(processes, None if failed is None else str(failed))
    first = next((number for number, message in enumerate(messages) if message is not None), None)
    if isinstance(failed, InputError):
        failed.reported_elsewhere = messages.index(str(failed)) < process
    if failed is not None:
        raise failed
    if first is not None:
        theirs = InputError(str(messages[first]))
        theirs.reported_elsewhere = True
        raise theirs


def _gathered(processes: int, message: str | None) -> list[str | None]:
    """Return the messages of all processes, by rank."""
    if processes == 1:
        return [message]
    from accelerate.utils import gather_object

    found: list[str | None] = gather_object([message])
    return found


def destroy_process_group() -> None:
    """Destroy the process group after a successful run, because gloo's threads may otherwise abort the interpreter's exit."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def connection_guard(processes: int) -> Iterator[None]:
    """Turn communication errors caused by the exit of another process into an InputError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or processes == 1 or not _is_lost(error):
            raise
        raise InputError(
            f"another process of this run exited early ({str(error).splitlines()[0]:.120}). Fix the error that it reports and give the"
            " same command again: the run resumes from its last saved state."
        ) from error


def _is_lost(error: Exception) -> bool:
    """Return whether an error says that the connection to another process was lost."""
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _LOST)

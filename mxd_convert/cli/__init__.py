"""The command line: parses, calls the public face, prints. No logic. One file a group of commands.

`main` is the one place where what went wrong becomes a line and an exit status. It imports the commands itself, so that signals are
caught from the start.
"""

import importlib
import os
import sys
import time
import traceback
from pathlib import Path

from mxd_convert.checkpoint.registration import is_our_program
from mxd_convert.cli.signals import Signals
from mxd_convert.errors import (
    INTERRUPTED,
    INTERRUPTED_AND_TOLD,
    InputError,
    address_space,
    first_line,
    is_disk_full,
    is_out_of_memory,
)
from mxd_convert.escaping import printable

__all__ = ["main"]

# files of this room, in the order of `--help`
COMMANDS = (
    *("init", "plan", "run", "sweep", "evaluate", "verify", "revert", "edit", "label"),
    *("generate", "inspect", "compare", "measure_steering", "probe", "dashboard"),
    *("export", "export_onnx", "push", "pull", "list", "delta", "apply"),
)
LEAST_ADDRESS_SPACE = 3 * 2**29  # bytes; with less, the BLAS of scipy waits for memory for ever as it is imported
OTHERS_SPEAK = 10.0  # seconds in which another process says what is wrong, and its end ends this one
_RESUMABLE = ("run", "push", "pull", "sweep")


def main() -> None:
    """The program. Exit status: 0 done, 1 a check failed, 2 the input is at fault, 130 interrupted (resumable)."""
    exhausted = False
    with Signals() as signals:
        try:
            status = _run()
        except BaseException as error:
            signals.handled, exhausted = True, is_out_of_memory(error)
            status = _explain(INTERRUPTED_BY_SIGNAL if signals.received else error, signals)
        signals.handled = True
        try:
            sys.stdout.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):  # the reader has closed the pipe
                status = status or INTERRUPTED
            else:
                _say(f"standard output can't be written ({error.strerror}); what was done is done")
                status = status or 2
    # after an interruption inside code that was made from a string (imports make named tuples and data classes so), CPython ends the
    # process by SIGINT, whatever its status is, unless another string is run
    exec("")  # noqa: S102
    if exhausted and is_our_program():  # what other packages do at the end would fail too, with tracebacks
        os._exit(status)
    sys.exit(status)


INTERRUPTED_BY_SIGNAL = KeyboardInterrupt()  # whatever an interrupted import or library made of the interruption


def _run() -> int:
    if (limit := address_space()) is not None:
        _prepare_for(limit)
    # the commands are imported here: it takes a while, and may itself be interrupted or run out of memory
    from mxd_convert.cli.app import app, prepare_streams

    for name in COMMANDS:
        importlib.import_module(f"mxd_convert.cli.{name}")
    prepare_streams()
    status = app(standalone_mode=False)
    if status in (INTERRUPTED, INTERRUPTED_AND_TOLD):  # typer turns Ctrl-C into the first
        error = KeyboardInterrupt()
        error.told = status == INTERRUPTED_AND_TOLD  # type: ignore[attr-defined]
        raise error
    return int(status or 0)


def _prepare_for(limit: int) -> None:
    """Refuse a limit of address space that the imports would not survive, and start no thread that isn't needed.

    Python waits for ever for a thread that runs out of memory as it starts; that of tqdm only updates bars that stand still.
    """
    if limit < LEAST_ADDRESS_SPACE:
        raise InputError(
            f"the address space is limited to {limit / 2**30:.2f} GiB (`ulimit -v`), and torch and scipy take"
            f" {LEAST_ADDRESS_SPACE / 2**30:g} GiB before any work; raise the limit"
        )
    from tqdm import tqdm

    tqdm.monitor_interval = 0


def _explain(error: BaseException, signals: Signals) -> int:
    """Says what went wrong in a line or two. Returns the exit status."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 2
    if _debug():
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":  # the latter is typer's
        return _interrupted(error)
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # typer's own, of a mistake in the options themselves
        if os.environ.get("LOCAL_RANK", "0") == "0":
            error.show()
        return int(error.exit_code)
    if isinstance(error, InputError) and error.told:
        # torchrun ends all processes with the first, which must be the one that speaks; if none does, this one
        signals.restore()
        time.sleep(OTHERS_SPEAK)
    _say(_message(error))
    return 2


def _interrupted(error: BaseException) -> int:
    if getattr(error, "told", False):
        time.sleep(OTHERS_SPEAK / 10)  # what the process that tells it says is short
        return INTERRUPTED
    without = ", without --fresh," if "--fresh" in sys.argv else ""
    resumes = any(word in _RESUMABLE for word in sys.argv[1:3])
    _say("interrupted" + (f"; the same command{without} resumes where it stopped" if resumes else ""))
    return INTERRUPTED


def _message(error: BaseException) -> str:
    if isinstance(error, InputError):
        return str(error)
    if is_out_of_memory(error):
        return f"out of memory ({first_line(error, 120)}); free some, close other programs, or ask for less (fewer tokens, smaller batches)"
    if is_disk_full(error):
        where = f"{getattr(error, 'filename', None) or 'the disk'}: "
        return f"{where}no space left ({first_line(error, 120)}); free some and give the same command again"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: can't be used ({error.strerror or first_line(error)})"
    trace = traceback.extract_tb(error.__traceback__)
    ours = next((frame for frame in reversed(trace) if "mxd_convert" in frame.filename), trace[-1] if trace else None)
    where = f" ({Path(ours.filename).name}, line {ours.lineno})" if ours is not None else ""
    return (
        f"unexpected error{where}: {type(error).__name__}: {first_line(error)}\n"
        "This should not happen: please report it, with what `mxd-convert --debug` shows before the same command"
    )


def _say(message: str) -> None:
    try:
        print(f"mxd-convert: {printable(message, lines=True)}", file=sys.stderr, flush=True)
    except UnicodeEncodeError:
        print(f"mxd-convert: {message.encode('ascii', 'replace').decode()}", file=sys.stderr, flush=True)
    except OSError:  # the reader has closed the pipe
        pass


def _debug() -> bool:
    app = sys.modules.get("mxd_convert.cli.app")
    return app is not None and app.settings.debug

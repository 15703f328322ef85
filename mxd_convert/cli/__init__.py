"""Command line: one file per command, which parses the options, calls the public function and prints the result.

`main` turns every exception into a message on stderr and an exit status. It imports the commands itself, so that signals are
handled from the start.
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
    INTERRUPTED_AND_REPORTED,
    InputError,
    address_space,
    first_line,
    is_disk_full,
    is_out_of_memory,
)
from mxd_convert.escaping import printable

__all__ = ["main"]

# modules of this package, in the order of `--help`
COMMANDS = (
    *("init", "plan", "run", "sample", "sweep", "evaluate", "verify", "revert", "edit", "label"),
    *("generate", "inspect", "compare", "measure_steering", "probe", "dashboard"),
    *("export", "export_onnx", "push", "pull", "list", "delta", "apply"),
)
MIN_ADDRESS_SPACE = 3 * 2**29  # bytes; with less, importing scipy hangs, because its BLAS waits for memory
SECONDS_FOR_THE_OTHERS = 10.0  # seconds to wait for another process to report its error; its exit also ends this process
_RESUMABLE = ("run", "push", "pull", "sample", "sweep")


def main() -> None:
    """Run the program and exit.

    Exit status: 0 success, 1 a check failed, 2 an error, 130 interrupted (resumable).
    """
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
            if isinstance(error, BrokenPipeError):  # the reader closed the pipe
                status = status or INTERRUPTED
            else:
                _say(f"standard output can't be written ({error.strerror}). The command itself has finished.")
                status = status or 2
    # After an interruption inside `exec` (imports use it for named tuples and data classes), CPython kills the process by SIGINT
    # instead of returning the exit status, unless another string is executed.
    exec("")  # noqa: S102
    if exhausted and is_our_program():  # exit handlers of other packages would run out of memory too and print tracebacks
        os._exit(status)
    sys.exit(status)


INTERRUPTED_BY_SIGNAL = KeyboardInterrupt()  # replaces the exception that an interrupted import or library raised instead


def _run() -> int:
    if (limit := address_space()) is not None:
        _prepare_for(limit)
    # Imports are slow, and may themselves be interrupted or run out of memory, so they are inside the error handling of `main`.
    from mxd_convert.cli.app import app, prepare_streams

    for name in COMMANDS:
        importlib.import_module(f"mxd_convert.cli.{name}")
    prepare_streams()
    status = app(standalone_mode=False)
    if status in (INTERRUPTED, INTERRUPTED_AND_REPORTED):  # Typer turns Ctrl-C into INTERRUPTED
        error = KeyboardInterrupt()
        error.reported_elsewhere = status == INTERRUPTED_AND_REPORTED  # type: ignore[attr-defined]
        raise error
    return int(status or 0)


def _prepare_for(limit: int) -> None:
    """Raise InputError if the address space is too small for the imports, and disable tqdm's monitor thread.

    Python hangs if a thread runs out of memory while it starts. The monitor only refreshes stalled bars.
    """
    if limit < MIN_ADDRESS_SPACE:
        raise InputError(
            f"the address space is limited to {limit / 2**30:.2f} GiB (`ulimit -v`), but loading torch and scipy takes"
            f" {MIN_ADDRESS_SPACE / 2**30:g} GiB. Raise the limit."
        )
    from tqdm import tqdm

    tqdm.monitor_interval = 0


def _explain(error: BaseException, signals: Signals) -> int:
    """Print what went wrong in one or two lines, and return the exit status."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 2
    if _debug():
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":  # Abort is Typer's
        return _interrupted(error)
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # Typer's own errors: wrong options
        if os.environ.get("LOCAL_RANK", "0") == "0":
            error.show()
        return int(error.exit_code)
    if isinstance(error, InputError) and error.reported_elsewhere:
        # torchrun ends all processes when the first one exits. Wait, so that the process with the error reports it; report it
        # here if none has.
        signals.restore()
        time.sleep(SECONDS_FOR_THE_OTHERS)
    _say(_message(error))
    return 2


def _interrupted(error: BaseException) -> int:
    if getattr(error, "reported_elsewhere", False):
        time.sleep(SECONDS_FOR_THE_OTHERS / 10)  # the other process only prints one line
        return INTERRUPTED
    without = ", without --fresh," if "--fresh" in sys.argv else ""
    resumes = any(argument in _RESUMABLE for argument in sys.argv[1:3])
    _say("interrupted" + (f". The same command{without} resumes where it stopped." if resumes else ""))
    return INTERRUPTED


def _message(error: BaseException) -> str:
    if isinstance(error, InputError):
        return str(error)
    if is_out_of_memory(error):
        return f"out of memory ({first_line(error, 120)}). Close other programs, or use fewer tokens or smaller batches."
    if is_disk_full(error):
        where = f"{getattr(error, 'filename', None) or 'the disk'}: "
        return f"{where}no space left ({first_line(error, 120)}). Free some space and run the same command again."
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: can't be used ({error.strerror or first_line(error)})"
    trace = traceback.extract_tb(error.__traceback__)
    ours = next((frame for frame in reversed(trace) if "mxd_convert" in frame.filename), trace[-1] if trace else None)
    where = f" ({Path(ours.filename).name}, line {ours.lineno})" if ours is not None else ""
    return (
        f"unexpected error{where}: {type(error).__name__}: {first_line(error)}\n"
        "This is a bug. Please report it with the traceback, which `mxd-convert --debug COMMAND` prints."
    )


def _say(message: str) -> None:
    try:
        print(f"mxd-convert: {printable(message, lines=True)}", file=sys.stderr, flush=True)
    except UnicodeEncodeError:
        print(f"mxd-convert: {message.encode('ascii', 'replace').decode()}", file=sys.stderr, flush=True)
    except OSError:  # the reader closed the pipe
        pass


def _debug() -> bool:
    app = sys.modules.get("mxd_convert.cli.app")
    return app is not None and app.settings.debug

"""Turn Ctrl-C, SIGTERM and SIGHUP into an exception, so that a command cleans up before it exits."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from mxd_convert.checkpoint.registration import is_our_program

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE = 3  # number of signals after which the process exits without cleaning up


class Signals:
    """A context manager in which the first signal raises KeyboardInterrupt and later ones are ignored during the clean-up.

    It has no effect outside the main thread. Signals that the parent process ignores stay ignored. Under a launcher such as
    torchrun, which ends its processes by SIGTERM, only Ctrl-C is handled.

    Attributes:
        received: Number of signals received.
        handled: Set by `main` when the exception has reached it; nothing is raised afterwards.
    """

    def __init__(self) -> None:
        self.received = 0
        self.handled = self._lost = False
        self._before: dict[int, Any] = {}
        self._hook = sys.unraisablehook

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            wanted: tuple[signal.Signals, ...] = _ENDING[:1] if "LOCAL_RANK" in os.environ else _ENDING
            wanted = tuple(number for number in wanted if signal.getsignal(number) != signal.SIG_IGN)
            self._before = {number: signal.signal(number, self._end) for number in wanted}
            self._hook, sys.unraisablehook = sys.unraisablehook, self._again
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if is_our_program():  # the command has finished; ignore signals while the interpreter exits
            for number in self._before:
                signal.signal(number, signal.SIG_IGN)
        else:
            self.restore()

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            sys.unraisablehook = self._hook
        self._before = {}

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.received += 1
        if self.received > _PATIENCE:
            os._exit(130)
        if not self.handled and (self.received == 1 or self._lost):
            self._lost = False
            raise KeyboardInterrupt

    def _again(self, caught: Any) -> None:
        """Raise the interruption again if Python swallowed it in a destructor or callback."""
        if isinstance(caught.exc_value, KeyboardInterrupt) and self.received and not self.handled:
            self._lost = True
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            self._hook(caught)

"""Ctrl-C, SIGTERM and SIGHUP end a command as an exception, so that it cleans up behind itself."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from mxd_convert.checkpoint.registration import is_our_program

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE = 3  # signals after which the process ends without cleaning up


class Signals:
    """A context manager, in which the first of these signals raises KeyboardInterrupt, and more are ignored while it cleans up.

    received: how many have come. handled: set once the interruption has reached `main`; nothing is raised any more.

    Without effect outside the main thread. Signals that the parent process ignores stay ignored; where a launcher started the program
    (torchrun), which ends all processes by SIGTERM, that one keeps its meaning.
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
        if is_our_program():  # all is done: what comes while the interpreter ends changes nothing
            for number in self._before:
                signal.signal(number, signal.SIG_IGN)
        else:
            self.restore()

    def restore(self) -> None:
        """Give the signals back the meaning that they had before."""
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
        """Raise the interruption again where Python could only note it: in a destructor or a callback."""
        if isinstance(caught.exc_value, KeyboardInterrupt) and self.received and not self.handled:
            self._lost = True
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            self._hook(caught)

"""Commands in forked processes: everything is imported once, and every command starts as good as new within milliseconds.

A child that takes too long, or too much memory, is ended. What a child wrote goes to files of its folder.
"""

import contextlib
import faulthandler
import fcntl
import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from unittest import mock

from robustness.programs import program

PRELOADED = ("mxd_convert.cli", "mxd_convert.commands.run", "mxd_convert.modeling.modeling_mxd", "mxd_convert.onnx", "datasets")
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "PYTHONMALLOC": "malloc"}
SECONDS = 45.0
MOST_BYTES = 3 * 2**30  # resident, above the server's own
ADDRESSES = 6 * 2**30  # bytes of address space above the server's own: a healthy command takes up to 3 GiB that it never touches
GRACE = 1.0  # seconds in which a child that took too long shows where it is
ENDING = (signal.SIGINT, signal.SIGTERM)
KEPT_OUTPUT = 2**22  # bytes that are read of what a child wrote


@dataclass(frozen=True)
class Work:
    """A command: arguments of the program, or a function of ours with its arguments. folder: where it runs."""

    arguments: tuple[str, ...]
    folder: Path
    function: Callable[[list[str]], int] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    addresses: int = ADDRESSES
    largest_file: int | None = None  # bytes that a file may grow to
    piped: bool = False  # output through pipes and not to files, which the fault would reach too


@dataclass(frozen=True)
class Outcome:
    """How it ended. status: negative for a signal, None where it took too long. peak: resident bytes above the server's own.

    orphans: whether processes that it had started were still there.
    """

    status: int | None
    seconds: float
    peak: int
    out: bytes
    err: bytes
    orphans: bool = False


@dataclass
class Child:
    work: Work
    pid: int
    descriptor: int  # becomes readable when the process ends
    started: float
    pipes: tuple[int, int] | None = None  # of its output


def logs_of(folder: Path) -> tuple[Path, Path]:
    """Where a child's stdout and stderr go: beside its folder."""
    return folder.with_name(f"{folder.name}.out"), folder.with_name(f"{folder.name}.err")


def in_large_pages() -> None:
    """Start this script again with its memory in large pages, in which a fork takes a third of the time."""
    if any(os.environ.get(name) != value for name, value in LARGE_PAGES.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **LARGE_PAGES})


def preload(names: Iterable[str] = PRELOADED) -> None:
    """Import modules in this process, so that children have them. Some can't be imported by themselves; children then do it."""
    import torch

    torch.set_num_threads(1)
    with mock.patch.object(sys, "argv", ["mxd-convert"]):  # by which the package knows its own program
        for name in names:
            if name not in sys.modules:
                with contextlib.suppress(BaseException):
                    importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, every page


def start(work: Work) -> Child:
    """Fork a process that does the work."""
    sys.stdout.flush()
    sys.stderr.flush()
    for log in logs_of(work.folder):
        log.unlink(missing_ok=True)
    pipes = (_pipe(), _pipe()) if work.piped else None
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until the child can take them
    pid = os.fork()
    if not pid:
        _child(work, None if pipes is None else tuple(write for _, write in pipes))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    for _, write in pipes or ():
        os.close(write)
    return Child(work, pid, os.pidfd_open(pid), time.perf_counter(), pipes and (pipes[0][0], pipes[1][0]))


def _pipe() -> tuple[int, int]:
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 2**20)  # more than a command with a limit on its files writes
    os.set_blocking(read, False)
    return read, write


def wait(children: list[Child], seconds: float = SECONDS) -> Iterator[tuple[Child, Outcome]]:
    """Yield those children that end, or are ended, first."""
    oldest = min(child.started for child in children)
    left = max(oldest + seconds - time.perf_counter(), 0.0)
    ended, _, _ = select.select([child.descriptor for child in children], [], [], left)
    for child in list(children):
        late = time.perf_counter() - child.started >= seconds
        if child.descriptor in ended or late:
            children.remove(child)
            yield child, _end(child, child.descriptor not in ended)


def signal_to(child: Child, number: int, to_group: bool = False) -> None:
    """Send a signal to a child, or to it and to all processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if to_group else os.kill)(child.pid, number)


def run(work: Work, seconds: float = SECONDS) -> Outcome:
    """Do the work in a child and wait for it."""
    return next(iter(wait([start(work)], seconds)))[1]


def _end(child: Child, late: bool) -> Outcome:
    if late:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGUSR1)  # faulthandler shows where it is
            select.select([child.descriptor], [], [], GRACE)
            os.killpg(child.pid, signal.SIGKILL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - child.started
    orphans = end_group(child.pid)
    os.close(child.descriptor)
    out, err = (_read(path) for path in logs_of(child.work.folder)) if child.pipes is None else map(_drained, child.pipes)
    peak = usage.ru_maxrss * 1024 - resident()
    return Outcome(None if late else os.waitstatus_to_exitcode(status), seconds, peak, out, err, orphans)


def end_group(group: int) -> bool:
    """End the processes that a child has left behind. Returns whether there were any."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    alive = any(_is_of(path, group) for path in Path("/proc").glob("[0-9]*"))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    return alive


def _is_of(process: Path, group: int) -> bool:
    with contextlib.suppress(OSError):
        state, _, of, *_ = (process / "stat").read_text().rpartition(")")[2].split()
        return int(of) == group and state not in "ZX"
    return False


def _drained(pipe: int) -> bytes:
    with open(pipe, "rb", buffering=0) as file:
        return file.read() or b""


def _read(path: Path) -> bytes:
    if not path.is_file():  # ended before it began
        return b""
    with path.open("rb") as file:
        head = file.read(KEPT_OUTPUT)
        file.seek(max(path.stat().st_size - KEPT_OUTPUT, len(head)))
        return head + file.read()


def resident() -> int:
    """Return the resident bytes of this process that a child begins with: not those of files, which it maps when it needs them."""
    _, everything, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (everything - of_files) * resource.getpagesize()


def addresses() -> int:
    """Return the bytes of address space that this process has taken."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _child(work: Work, pipes: tuple[int, ...] | None) -> None:
    status = 70
    try:
        os.setsid()
        flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
        for number, target in zip((1, 2), pipes or [os.open(path, flags, 0o666) for path in logs_of(work.folder)], strict=True):
            os.dup2(target, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False, encoding="utf-8", errors="strict") for number in (1, 2))
        faulthandler.enable(file=2)
        faulthandler.register(signal.SIGUSR1, file=2)
        most = addresses() + work.addresses
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if work.largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (work.largest_file, work.largest_file))
        for number in ENDING:
            signal.signal(number, _defer)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        os.environ.update(work.environment)
        tempfile.tempdir = None  # the server's own, which a child's TMPDIR may differ from
        os.chdir(work.folder)
        status = _status(work)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _defer(number: int, frame: FrameType | None) -> None:
    """Send a signal again when 20 ms of work are done: it came before the program had its handlers, which a process of its own begins with."""

    def again(alarm: int, frame: FrameType | None) -> None:
        if signal.getsignal(number) is _defer:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGVTALRM, again)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.02)


def _status(work: Work) -> int:
    try:
        return (work.function or program)(list(work.arguments))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1


def modules_of(work: Work, seconds: float = 300.0) -> tuple[Outcome, list[str]]:
    """Do the work; return with it the modules that it imported, for `preload`."""
    listing = work.folder.with_name(f"{work.folder.name}.modules")

    def listed(arguments: list[str]) -> int:
        status = _status(work)
        listing.write_text(json.dumps(sorted(sys.modules)))
        return status

    outcome = run(replace(work, function=listed), seconds)
    return outcome, json.loads(listing.read_text()) if listing.is_file() else []

"""The program and Python scripts in processes of their own, without waiting for imports.

A server that has imported everything forks a process for every command, so each is as good as new. Use `subprocess` only where the
import, the interpreter's end or settings that are read on import are what is tested; `Programs.run_anew` does so.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

PRELOADED = ["mxd_convert.cli", "mxd_convert.hub", "mxd_convert.commands.run", "mxd_convert.modeling.modeling_mxd", "datasets"]
SECONDS = 180


@dataclass
class Done:
    status: int | None
    """None if a signal ended the process."""
    out: str
    err: str


@dataclass
class Work:
    """What a process does."""

    arguments: list[str]
    """Of the program; or `python`, a script and the script's arguments."""
    cwd: str | None = None
    prepare: Callable[[], None] | None = None
    """Called in the process first."""
    largest_file: int | None = None
    """Bytes to which a file may grow, as if the disk were full then."""
    addresses: int | None = None
    """Bytes of address space that it may take, above what it has."""
    environment: dict[str, str] = field(default_factory=dict)


class Running:
    """A process that was started. folder: where its output is written."""

    def __init__(self, process: multiprocessing.Process, folder: Path) -> None:
        self.process, self.folder = process, folder

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def ended(self) -> bool:
        return not self.process.is_alive()

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Done:
        self.process.join(SECONDS)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running after {SECONDS} s: " + (self.folder / "err").read_text())
        status = self.process.exitcode
        out, err = ((self.folder / name).read_text() for name in ("out", "err"))
        return Done(None if status is not None and status < 0 else status, out, err)


class Programs:
    """Starts processes. home: a folder for their output.

    environment: settings of every process. The server imports everything with the settings of the first `Programs`, since Python has
    one such server per process.
    """

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        self.home, self.environment, self.number = home, environment, 0
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)

    def start(self, *arguments: object, **options: object) -> Running:
        """Start a process; options are those of Work."""
        work = Work([str(argument) for argument in arguments], **options)
        self.number += 1
        folder = self.home / f"process-{self.number}"
        folder.mkdir(parents=True)
        work.environment = {**self.environment, "COLUMNS": "150", **work.environment}
        with mock.patch.dict(os.environ, self.environment):  # for the server, if this is its first process
            process = self.context.Process(target=_run, args=(work, str(folder)))
            process.start()
        return Running(process, folder)

    def run(self, *arguments: object, **options: object) -> Done:
        """Start a process and wait for its end; options are those of Work."""
        return self.start(*arguments, **options).wait()

    def run_anew(self, *arguments: object, **environment: str) -> Done:
        """Run the same in a process that imports everything, with further settings."""
        words = [str(argument) for argument in arguments]
        command = [sys.executable, *words[1:]] if words[0] == "python" else [sys.executable, "-m", "mxd_convert.cli", *words]
        environment = {**os.environ, **self.environment, **environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
        return Done(done.returncode, done.stdout, done.stderr)


def _run(work: Work, folder: str) -> None:
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(work.environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.chdir(work.cwd or folder)
    if work.prepare is not None:
        work.prepare()
    if work.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (work.largest_file, work.largest_file))
    if work.addresses is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + work.addresses
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        if work.arguments[0] == "python":
            sys.argv = work.arguments[1:]
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            sys.argv = ["mxd-convert", *work.arguments]
            from mxd_convert import cli

            cli.main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    else:
        status = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

"""Processes of their own that talk to the Hub on loopback: the real program and the real client, with nothing replaced.

The Hub's client reads where the Hub is when it is imported, and the tests' own process must not know. A server that has imported everything
once forks a fresh process for every command, so each is as good as new and none waits for imports.
"""

import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

PRELOADED = ["mxd_convert.cli", "mxd_convert.hub", "mxd_convert.commands.run", "mxd_convert.modeling.modeling_mxd", "datasets"]
SECONDS = 180


@dataclass
class Done:
    status: int | None  # None: killed
    out: str
    err: str


@dataclass
class Work:
    """What a process is to do. arguments: of the program, or `python` and a script with its own."""

    arguments: list[str]
    cwd: str | None = None
    verified: bool = True  # whether a push verifies first, which takes longer than all the rest
    largest_file: int | None = None  # bytes that a file may grow to, as if the disk were full then
    addresses: int | None = None  # bytes of address space that it may take, above what it has
    environment: dict[str, str] = field(default_factory=dict)


class Clients:
    """home: where the client keeps its cache. A token is given to a process by HF_TOKEN, or not at all."""

    def __init__(self, url: str, home: Path) -> None:
        self.home, self.number = home, 0
        self.environment = {
            "HF_ENDPOINT": url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)

    def start(self, work: Work, token: str | None) -> tuple[multiprocessing.Process, Path]:
        self.number += 1
        place = self.home / f"process-{self.number}"
        place.mkdir(parents=True)
        work.environment = {**self.environment, "COLUMNS": "150", **work.environment, **({"HF_TOKEN": token} if token else {})}
        with mock.patch.dict(os.environ, self.environment):  # for the server, if this is its first process
            process = self.context.Process(target=_run, args=(work, str(place)))
            process.start()
        return process, place

    def run(self, *arguments: object, token: str | None = None, **options: object) -> Done:
        """A command in a process of its own; options: those of Work."""
        return self.wait(*self.start(Work([str(argument) for argument in arguments], **options), token))

    def run_anew(self, *arguments: object, **environment: str) -> Done:
        """The same in a process that imports everything anew, with settings that are read on import."""
        words = [str(argument) for argument in arguments]
        command = [sys.executable, *words[1:]] if words[0] == "python" else [sys.executable, "-m", "mxd_convert.cli", *words]
        environment = {**os.environ, **self.environment, **environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    @staticmethod
    def wait(process: multiprocessing.Process, place: Path) -> Done:
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            raise AssertionError(f"not done after {SECONDS} s: " + (place / "err").read_text())
        status = process.exitcode
        return Done(
            None if status is not None and status < 0 else status, (place / "out").read_text(), (place / "err").read_text()
        )


def _run(work: Work, place: str) -> None:
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(work.environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{place}/{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.chdir(work.cwd or place)
    if not work.verified:
        from mxd_convert.checkpoint.verify import Verification
        from mxd_convert.commands import push as pushing

        pushing.verify = lambda folder, base=None: Verification(folder, [])
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

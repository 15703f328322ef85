"""The long commands, ready to be disturbed: where they run, what they may leave, what undisturbed runs make."""

import itertools
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from robustness import hub, server
from robustness.fixtures import Fixtures
from robustness.programs import brief_program
from robustness.results import Result, differences, leftovers, result_of, stable
from robustness.verdict import refusal

PATIENCE = 300.0  # seconds of one command
OUT = "out"
FIRST_LINES = "import sys; sys.argv = ['mxd-convert']; import mxd_convert.cli"
"""What Python runs before the program catches signals and errors."""


@dataclass(frozen=True)
class Command:
    """A command as it is given in its own folder. {n} in an argument: the number of the try, for names on the Hub."""

    arguments: tuple[str, ...]
    copies: tuple[str, ...] = ()  # folders of the fixtures that it changes, copied beside
    resumes: tuple[str, ...] = ()  # what an interrupted one may leave for the next
    result: str = OUT  # folder that holds its result
    stdout: bool = False  # whether its result is what it prints
    pulled: str = ""  # repository on the Hub that holds its result


def commands(made: Fixtures) -> dict[str, Command]:
    x, text = str(made.checkpoint), str(made.text)
    data = ("--data", text, "--tokens", "512")
    steer = (
        "measure-steering",
        x,
        "--data",
        text,
        "--tokens",
        "256",
        "--count",
        "2",
        "--samples",
        "2",
        "--new-tokens",
        "4",
        "--contexts",
        "4",
    )
    return {
        "run": Command(("run", "recipe.yaml"), resumes=("out.partial",)),
        "sweep": Command(("sweep", "recipe.yaml", "--set", "layer.k=2,4", "-o", OUT), resumes=(OUT, "out.partial")),
        "eval": Command(("eval", x, *data, "--json"), stdout=True),
        "eval --record": Command(("eval", "converted", *data, "--record"), copies=("converted",), result="converted"),
        "verify": Command(("verify", x, "--json"), stdout=True),
        "dashboard": Command(("dashboard", x, *data, "-o", OUT)),
        "probe": Command(("probe", x, "--data", str(made.labelled), "-o", OUT)),
        "measure-steering": Command((*steer, "-o", OUT)),
        "export-onnx": Command(("export-onnx", x, OUT, "--data", text, "--tokens", "64")),
        "export": Command(("export", x, OUT, "--to", "sparsify", *data)),
        "delta": Command(("delta", x, OUT)),
        "apply": Command(("apply", str(made.delta), OUT)),
        "revert": Command(("revert", x, "--layers", "2", "-o", OUT)),
        "edit": Command(("edit", x, "--ablate", "0:1", "-o", OUT)),
        "push": Command(("push", x, "alice/x{n}"), pulled="alice/x{n}"),
        "pull": Command(("pull", "alice/made", OUT), resumes=("out.partial",)),
    }


@dataclass
class Try:
    """A folder where a command runs, and what it should come to."""

    prepared: "Prepared"
    number: int
    folder: Path

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple(argument.replace("{n}", str(self.number)) for argument in self.prepared.command.arguments)

    @property
    def scratch(self) -> Path:
        """Where temporary files go that are not beside the output."""
        return self.folder.with_name(f"{self.folder.name}.tmp")

    def environment(self) -> dict[str, str]:
        return {"TMPDIR": str(self.scratch)}

    def work(self, **limits: int) -> server.Work:
        return server.Work(self.arguments, self.folder, brief_program, self.environment(), **{"addresses": 2**38, **limits})

    def again(self) -> server.Outcome:
        """The same command, undisturbed."""
        return server.run(self.work(), PATIENCE)

    def result(self, out: bytes = b"") -> Result:
        command = self.prepared.command
        if not command.pulled:
            return result_of(self.folder / command.result, out if command.stdout else b"")
        target = self.folder.with_name(f"{self.folder.name}.pulled")
        server.run(server.Work(("pull", command.pulled.replace("{n}", str(self.number)), str(target)), self.folder), PATIENCE)
        return result_of(target)

    def differs(self, out: bytes = b"") -> list[str]:
        return differences(self.prepared.expected, self.prepared.results, self.result(out))

    def left(self, resumable: bool, complete: bool) -> list[str]:
        """What lies there that should not. resumable: the command was stopped; complete: its result is there."""
        command = self.prepared.command
        allowed = {
            "recipe.yaml",
            "base",
            "text.jsonl",
            *command.copies,
            *(command.resumes if resumable else ()),
            *([OUT] if complete else []),
        }
        beside = [path.name for path in self.folder.parent.iterdir() if path.name.startswith(f".{self.folder.name}")]
        return leftovers(self.folder, allowed) + beside

    def left_scratch(self) -> list[str]:
        return [f"{path.name} in TMPDIR" for path in self.scratch.iterdir()]

    def finished(self, disturbed: str) -> str:
        """Give the command again, undisturbed, and return what is wrong with its end; '' where nothing is."""
        outcome = self.again()
        here = not self.differs(outcome.out)
        if outcome.status != 0 and not (outcome.status == 2 and here):  # it may refuse since the result is there
            return f"{disturbed}; the same command again: {said(outcome)}"
        if not here:
            return f"{disturbed}; the same command again makes another result: {', '.join(self.differs(outcome.out)[:3])}"
        if left := self.left(resumable=False, complete=True):
            return f"{disturbed}; the same command again leaves {', '.join(left[:3])}"
        return ""

    def remove(self) -> None:
        for path in (self.folder, self.scratch, self.folder.with_name(f"{self.folder.name}.pulled")):
            shutil.rmtree(path, ignore_errors=True)


@dataclass
class Prepared:
    """A command whose result, and time, are known."""

    name: str
    command: Command
    made: Fixtures
    root: Path
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)
    results: list[Result] = field(default_factory=list)
    expected: Result = field(default_factory=dict)
    seconds: float = 0.0  # in a forked process
    cold_seconds: float = 0.0  # in a process that imports everything

    def fresh(self, place: Path | None = None, own_inputs: bool = False) -> Try:
        """A folder for another try. own_inputs: with a copy of the base and of the text, which may be damaged."""
        number = next(self.numbers)
        folder = (place or self.root) / f"{self.name.replace(' ', '')}-{number}"
        folder.mkdir(parents=True)
        one = Try(self, number, folder)
        one.scratch.mkdir()
        recipe = self.made.recipe()
        if own_inputs:
            shutil.copytree(self.made.base, folder / "base")
            shutil.copyfile(self.made.text, folder / "text.jsonl")
            recipe["base"]["model"], recipe["data"]["train"]["path"] = "./base", "./text.jsonl"
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        for name in self.command.copies:
            shutil.copytree(self.made.root / name, folder / name)
        return one


def prepare(name: str, command: Command, made: Fixtures, root: Path, cold: bool = True, own_inputs: bool = False) -> Prepared:
    """Run a command undisturbed, twice in forks and once from the start, for its result and its time."""
    prepared = Prepared(name, command, made, root)
    for way in ("warm up", "fork", *(["start"] if cold else [])):
        one = prepared.fresh(own_inputs=own_inputs)
        start = time.perf_counter()
        outcome = _import_too(one) if way == "warm up" else (cold_run(one) if way == "start" else one.again())
        seconds = time.perf_counter() - start
        prepared.seconds, prepared.cold_seconds = (seconds if way == "fork" else prepared.seconds), seconds
        if outcome.status != 0:
            raise SystemExit(f"{name}, undisturbed: {said(outcome)}")
        prepared.results.append(one.result(outcome.out))
        if left := one.left(resumable=False, complete=True):
            raise SystemExit(f"{name}, undisturbed, leaves {left}")
        one.remove()
    prepared.expected = stable(prepared.results)
    return prepared


def _import_too(one: Try) -> server.Outcome:
    outcome, modules = server.modules_of(one.work(), PATIENCE)
    server.preload(modules)
    return outcome


def cold_command(one: Try) -> list[str]:
    return [str(Path(sys.executable).with_name("mxd-convert")), *one.arguments]


def cold_environment(one: Try) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in server.LARGE_PAGES}
    return {**plain, **one.environment()}


def cold_start(one: Try, before: str = "") -> "subprocess.Popen[bytes]":
    """Start the program as its user does. before: a command of the shell, such as one that sets a limit."""
    out, err = (path.open("wb") for path in server.logs_of(one.folder))
    command = cold_command(one)
    if before:
        command = ["bash", "-c", f'{before} && exec "$@"', "bash", *command]
    with out, err:
        return subprocess.Popen(
            command,
            stdout=out,
            stderr=err,
            stdin=subprocess.DEVNULL,
            cwd=one.folder,
            env=cold_environment(one),
            start_new_session=True,
        )


def cold_end(one: Try, process: "subprocess.Popen[bytes]") -> server.Outcome:
    try:
        status: int | None = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        status = None
    out, err = (path.read_bytes() for path in server.logs_of(one.folder))
    return server.Outcome(status, 0.0, 0, out, err, server.end_group(process.pid))


def cold_run(one: Try, before: str = "") -> server.Outcome:
    return cold_end(one, cold_start(one, before))


def publish(made: Fixtures) -> None:
    """Put the checkpoint on the Hub, for `pull`."""
    outcome = server.run(server.Work(("push", str(made.checkpoint), f"{hub.OWNER}/made"), made.root, brief_program), PATIENCE)
    if outcome.status != 0:
        raise SystemExit(f"push: {said(outcome)}")


def said(outcome: server.Outcome) -> str:
    """How a command ended, in a line."""
    err = outcome.err.decode("utf-8", "replace")
    last = (refusal(err) or (err.strip().splitlines() or ["nothing on stderr"])[-1]).splitlines()[0]
    return f"status {outcome.status}, {last[:300]}"

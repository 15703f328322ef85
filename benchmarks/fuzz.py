"""Feeds damaged and hostile files to the command line and counts how it ends.

    python benchmarks/fuzz.py [--seed 0] [--count recipe=2000] [--only recipe] [--jobs 1] [--keep FOLDER]

Every input is a folder with one damaged file and a command that reads it, run in a forked process. It ends well (`ok`), or in one or two
lines and exit status 2 (`refused`). BAD is everything else: a traceback, an error that nobody foresaw, another exit status, more than 45 s
or 3 GiB, control characters on the terminal, or `--json` output that is no JSON. Equal seeds make equal inputs,
but for the times in a report.
"""

import argparse
import os
import random
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: its threads do not survive a fork
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"

from robustness import fixtures, hub, server
from robustness.kinds import KINDS
from robustness.verdict import BAD, Verdict, judge, place_of


@dataclass(frozen=True)
class Input:
    """One input, ready to run. The folder holds `case`, where the command runs."""

    kind: str
    number: int
    arguments: tuple[str, ...]
    folder: Path

    def work(self, *before: str) -> server.Work:
        return server.Work((*before, *self.arguments), self.folder / "case", KINDS[self.kind].function)

    def judged(self, outcome: server.Outcome) -> Verdict:
        return judge(outcome, "--json" in self.arguments)


@dataclass
class Count:
    """Inputs of a kind by how they ended; of each reason for BAD the first input that had it."""

    verdicts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    slowest: float = 0.0
    peak: int = 0


def make(made: fixtures.Fixtures, root: Path, seed: int, kind: str, number: int) -> Input:
    """Make one input; the same seed, kind and number make the same."""
    folder = root / f"{kind}-{number}"
    (folder / "case").mkdir(parents=True)
    arguments = KINDS[kind].make(made, folder / "case", random.Random(f"{seed}/{kind}/{number}"))
    return Input(kind, number, tuple(arguments), folder)


def fuzz(
    made: fixtures.Fixtures, root: Path, seed: int, kind: str, numbers: range, jobs: int
) -> Iterator[tuple[Input, server.Outcome]]:
    """Run inputs, several at a time. What is yielded still has its folder, until the next."""
    children: list[server.Child] = []
    inputs: dict[int, Input] = {}
    left = iter(numbers)
    while True:
        while len(children) < jobs and (number := next(left, None)) is not None:
            one = make(made, root, seed, kind, number)
            children.append(server.start(one.work()))
            inputs[children[-1].pid] = one
        if not children:
            return
        for child, outcome in server.wait(children):
            one = inputs.pop(child.pid)
            yield one, outcome
            shutil.rmtree(one.folder, ignore_errors=True)


def count(made: fixtures.Fixtures, root: Path, seed: int, kind: str, numbers: range, jobs: int, keep: Path | None) -> Count:
    """Run the inputs of a kind and count how they end. keep: where an example of every reason for BAD is kept."""
    counted, start = Count(), time.perf_counter()
    for one, outcome in fuzz(made, root, seed, kind, numbers, jobs):
        verdict = one.judged(outcome)
        counted.verdicts[verdict.word] += 1
        counted.slowest, counted.peak = max(counted.slowest, outcome.seconds), max(counted.peak, outcome.peak)
        if verdict.word != BAD:
            continue
        reason = _grouped(verdict.reason)
        if verdict.unexpected:  # the same input again, for the place of the error
            (again := one.folder / "again").mkdir()
            rebuilt = make(made, again, seed, kind, one.number)
            reason = f"{reason} <- {place_of(server.run(rebuilt.work('--debug')))}"
        counted.reasons[reason] += 1
        if reason not in counted.examples:
            counted.examples[reason] = f"{kind} {one.number}: {shlex.join(one.arguments)[:160]}"
            if keep is not None:
                _keep(make(made, keep.absolute(), seed, kind, one.number), one, reason)
    counted.seconds = time.perf_counter() - start
    return counted


def _grouped(reason: str) -> str:
    """The reason without what differs between inputs of the same fault."""
    return re.sub(r"(?<![:\d])\d{3,}", "N", re.sub(r"(/[\w.-]+){2,}", "PATH", reason))[:200]


def _keep(kept: Input, one: Input, reason: str) -> None:
    """Write down what is wrong with an input next to a copy of it that no command has touched."""
    for log in server.logs_of(one.folder / "case"):
        shutil.copyfile(log, kept.folder / log.name)
    command = f"cd {kept.folder / 'case'} && mxd-convert {shlex.join(kept.arguments)}\n"
    (kept.folder / "why.txt").write_text(f"{reason}\n\n{command}", encoding="utf-8", errors="backslashreplace")


def show(kind: str, counted: Count) -> str:
    word = counted.verdicts
    cells = (kind, word.total(), word["ok"], word["refused"], word[BAD], f"{word.total() / max(counted.seconds, 1e-9):.1f}")
    return "| " + " | ".join(map(str, (*cells, f"{counted.slowest:.1f}", f"{max(counted.peak, 0) / 2**20:,.0f}"))) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--count", action="append", default=[], metavar="KIND=N", help="inputs of a kind, or of every kind: N; repeatable"
    )
    parser.add_argument("--only", action="append", choices=KINDS, help="a kind to try; repeatable; default: all")
    parser.add_argument("--first", type=int, default=0, help="number of the first input, to repeat one")
    parser.add_argument("--jobs", type=int, default=1, help="inputs at a time")
    parser.add_argument("--keep", type=Path, help="new folder for an example of every reason for BAD")
    arguments = parser.parse_args()
    if arguments.keep and arguments.keep.exists():
        parser.error(f"--keep {arguments.keep}: is there; name a new folder")
    server.in_large_pages()
    counts = {kind: entry.count for kind, entry in KINDS.items()}
    for text in arguments.count:
        kind, _, number = text.rpartition("=")
        if kind and kind not in counts:
            parser.error(f"--count {text}: there is no kind {kind}; there is {', '.join(counts)}")
        counts.update({kind: int(number)} if kind else dict.fromkeys(counts, int(number)))
    found: dict[str, Count] = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name, hub.running() as url:
        root = Path(name)
        os.environ.update(hub.environment(url, root / "hf"))
        place = (arguments.keep.absolute() if arguments.keep else root) / "made"  # kept examples read what is there
        place.mkdir(parents=True)
        made = fixtures.make(place)
        for number, kind in enumerate(KINDS):  # what only these commands import
            server.preload(server.modules_of(make(made, root / "warm", -1 - number, kind, 0).work())[1])
        kinds = arguments.only or list(KINDS)
        print(
            "| kind | inputs | ok | refused | BAD | per second | slowest, s | most MiB |\n|---|---|---|---|---|---|---|---|",
            flush=True,
        )
        for kind in kinds:
            numbers = range(arguments.first, arguments.first + counts[kind])
            found[kind] = count(made, root, arguments.seed, kind, numbers, arguments.jobs, arguments.keep)
            print(show(kind, found[kind]), flush=True)
    bad = sum(counted.verdicts[BAD] for counted in found.values())
    print(f"\n{bad} BAD of {sum(counted.verdicts.total() for counted in found.values())}")
    for kind, counted in found.items():
        for reason, times in counted.reasons.most_common():
            print(ascii(f"{kind}: {times} x {reason}\n")[1:-3])
            print(f"    {ascii(counted.examples[reason])[1:-1]}")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()

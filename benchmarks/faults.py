"""Disturbs every long command and counts how it ends: with the same result, in one line and exit status 2, or BAD.

    python benchmarks/faults.py [--seed 0] [--only SIGTERM] [--command run] [--count SIGTERM=10] [--cold 0.25]

SIGKILL, SIGINT and SIGTERM come at random moments. After the last two the status is 130 and nothing is left next to the output; after all of
them the same command, given again, makes the result of an undisturbed run and leaves nothing. Files that can't grow, a small disk, flipped
bytes in what a resumed run reads, and too little memory end in the same result or in one line. Most tries run in forked processes,
which saves the seconds of imports; a share of them (`--cold`) starts the program as its user does.
"""

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: its threads do not survive a fork
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"

from robustness import fixtures, flips, hub, limits, server, signals
from robustness.commands import Command, Prepared, commands, prepare, publish
from robustness.table import Attempt, Table

COUNTS = {"SIGKILL": 10, "SIGINT": 10, "SIGTERM": 10, "file size": 8, "disk full": 8, "byte flip": 60, "memory": 8}
"""Tries of a fault, for each command."""


def disturb(
    fault: str, prepared: Prepared, count: int, draw: random.Random, cold: float, measured: dict[str, float], mount: Path
) -> Iterator[Attempt]:
    """Try one fault on one command."""
    if fault in signals.NAMES:
        yield from signals.attempts(prepared, fault, count, draw, cold, measured["starting"])
    elif fault == "file size":
        yield from limits.full_files(prepared, count, draw)
    elif fault == "disk full":
        yield from limits.full_disk(prepared, count, draw, mount)
    elif fault == "memory":
        yield from limits.little_memory(prepared, count, draw, cold, int(measured["least memory"]))


def every(
    faults: list[str],
    chosen: dict[str, Command],
    counts: dict[str, int],
    seed: int,
    cold: float,
    made: fixtures.Fixtures,
    root: Path,
) -> Iterator[Attempt]:
    """Try all faults on all commands."""
    (mount := root / "mount").mkdir()
    if "disk full" in faults and not limits.may_mount(mount):
        print("disk full: skipped, since only root may mount a small disk")
        faults = [fault for fault in faults if fault != "disk full"]
    measured = {
        "starting": signals.starting_seconds(),
        "least memory": limits.least_memory() if "memory" in faults and cold else 0.0,
    }
    for name, command in chosen.items():
        if set(faults) - {"byte flip"}:
            prepared = prepare(name, command, made, root, cold=cold > 0)
            print(f"{name}: {prepared.seconds:.2f} s in a fork, {prepared.cold_seconds:.2f} s from the start", file=sys.stderr)
            for fault in faults:
                yield from disturb(fault, prepared, counts[fault], random.Random(f"{seed}/{fault}/{name}"), cold, measured, mount)
        if "byte flip" in faults and name == "run":
            resumed = prepare(name, command, made, root, cold=False, own_inputs=True)
            yield from flips.attempts(resumed, counts["byte flip"], random.Random(f"{seed}/byte flip"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=COUNTS, help="a fault to try; repeatable; default: all")
    parser.add_argument("--command", action="append", help="a command to disturb; repeatable; default: all")
    parser.add_argument("--count", action="append", default=[], metavar="FAULT=N", help="tries of a fault, or of every fault: N")
    parser.add_argument("--cold", type=float, default=0.25, help="share of the tries in processes that import everything")
    arguments = parser.parse_args()
    server.in_large_pages()
    counts = dict(COUNTS)
    for text in arguments.count:
        fault, _, number = text.rpartition("=")
        counts.update({fault: int(number)} if fault else dict.fromkeys(counts, int(number)))
    table = Table()
    with tempfile.TemporaryDirectory(prefix="faults-") as name, hub.running() as url:
        root = Path(name)
        os.environ.update(hub.environment(url, root / "hf"))
        (root / "made").mkdir()
        made = fixtures.make(root / "made")
        publish(made)
        known = commands(made)
        if unknown := set(arguments.command or ()) - known.keys():
            parser.error(f"--command: {', '.join(unknown)} is none of {', '.join(known)}")
        chosen = {name: command for name, command in known.items() if name in (arguments.command or known)}
        try:
            for attempt in every(arguments.only or list(COUNTS), chosen, counts, arguments.seed, arguments.cold, made, root):
                table.add(attempt)
                if attempt.note:
                    print(f"BAD {attempt.fault}: {ascii(attempt.note)[1:-1]}", file=sys.stderr, flush=True)
        finally:  # what is known is worth having, should the rest be interrupted
            print(table)
            print(f"\n{table.bad} BAD")
            for note in table.notes:
                print(f"- {ascii(note)[1:-1]}")
    sys.exit(table.bad > 0)


if __name__ == "__main__":
    main()

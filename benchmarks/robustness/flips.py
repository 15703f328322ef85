"""Flipped bytes in every file that a resumed run reads: the same result, or one line and exit status 2."""

import random
import select
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from robustness import server
from robustness.commands import PATIENCE, Prepared, Try, said
from robustness.table import BAD, LINE, SAME, Attempt
from robustness.verdict import REFUSED, judge

STAGES = (0.3, 0.5, 0.65, 0.8, 0.9)  # of a run's time, where it is killed to be resumed
NOT_READ = {"README.md"}  # of the base: its licence and language go into the card, and nothing else


def attempts(prepared: Prepared, count: int, draw: random.Random) -> Iterator[Attempt]:
    """Flip one byte, `count` times, in the files in turn. prepared: a run with its own copies of base and text."""
    states = list(_states(prepared))
    if not states:
        yield Attempt("byte flip", prepared.name, BAD, "no run was killed while it had a state to resume from")
    places = [(state, path) for state in states for path in _files(state.folder)]
    draw.shuffle(places)
    for number in range(count if places else 0):
        state, path = places[number % len(places)]
        one = prepared.fresh()
        shutil.rmtree(one.folder)
        shutil.copytree(state.folder, one.folder)
        at = _flip(one.folder / path, draw)
        outcome = one.again()
        yield _judged(one, outcome, f"byte {at} of {path}")
        one.remove()
    for state in states:
        state.remove()


def _states(prepared: Prepared) -> Iterator[Try]:
    for stage in STAGES:
        one = prepared.fresh(own_inputs=True)
        child = server.start(one.work())
        select.select([child.descriptor], [], [], stage * prepared.seconds)
        server.signal_to(child, signal.SIGKILL)
        next(iter(server.wait([child], PATIENCE)))
        if any((one.folder / "out.partial").rglob("step-*")) and not (one.folder / "out").exists():
            yield one
        else:
            one.remove()


def _files(folder: Path) -> list[Path]:
    found = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    return [path for path in found if path.name not in NOT_READ | {"recipe.yaml"}]


def _flip(path: Path, draw: random.Random) -> int:
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    content[at] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return at


def _judged(one: Try, outcome: server.Outcome, what: str) -> Attempt:
    name = one.prepared.name
    verdict = judge(outcome, limited=True)
    if outcome.status == 0 and verdict.word != BAD:
        wrong = one.differs()
        return Attempt(
            "byte flip", name, BAD if wrong else SAME, f"{what}: another result: {', '.join(wrong[:3])}" if wrong else ""
        )
    if verdict.word == REFUSED:
        return Attempt("byte flip", name, LINE)
    return Attempt("byte flip", name, BAD, f"{what}: {verdict.reason or said(outcome)}")

"""Signals at random moments of a command, and the same command given again."""

import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from robustness import server
from robustness.commands import FIRST_LINES, PATIENCE, Prepared, Try, cold_end, cold_start, said
from robustness.table import BAD, SAME, Attempt
from robustness.verdict import INTERRUPTED, PREFIX

NAMES = ("SIGKILL", "SIGINT", "SIGTERM")


def starting_seconds() -> float:
    """Return how long it takes until the program's own code runs: earlier, a signal meets nobody but the interpreter."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", FIRST_LINES], capture_output=True, check=False)
    return time.perf_counter() - start


def attempts(prepared: Prepared, name: str, count: int, draw: random.Random, cold: float, starting: float) -> Iterator[Attempt]:
    """Disturb a command `count` times. cold: share of the tries in a process that imports everything, from its very start."""
    number = getattr(signal, name)
    for _ in range(count):
        while True:
            one, is_cold = prepared.fresh(), draw.random() < cold
            moment = draw.uniform(0.0, prepared.cold_seconds if is_cold else prepared.seconds)
            to_group = name == "SIGINT" and draw.random() < 0.5  # as a terminal sends it
            disturbed = (_cold if is_cold else _warm)(one, number, moment, to_group)
            if not (is_cold and number != signal.SIGKILL and moment < 2 * starting and _met_nobody(disturbed)):
                break
            one.remove()
        where = f"{prepared.name}: {name} after {moment:.2f} s of {'a process of its own' if is_cold else 'a fork'}"
        wrong = _wrong(one, number, disturbed)
        if not wrong and disturbed.status == 0 and not one.differs(disturbed.out):
            wrong = ", ".join(one.left(resumable=False, complete=True))
        elif not wrong:
            wrong = one.finished(f"ended with {disturbed.status}")
        yield Attempt(name, prepared.name, BAD if wrong else SAME, f"{where}: {wrong}" if wrong else "")
        one.remove()


def _warm(one: Try, number: int, moment: float, to_group: bool) -> server.Outcome:
    child = server.start(one.work())
    select.select([child.descriptor], [], [], moment)
    server.signal_to(child, number, to_group)
    return next(iter(server.wait([child], PATIENCE)))[1]


def _cold(one: Try, number: int, moment: float, to_group: bool) -> server.Outcome:
    process = cold_start(one)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    if process.returncode is None:
        (os.killpg if to_group else os.kill)(process.pid, number)
    return cold_end(one, process)


def _met_nobody(outcome: server.Outcome) -> bool:
    err = outcome.err.decode("utf-8", "replace")
    return PREFIX not in err and ((outcome.status is not None and outcome.status < 0) or "KeyboardInterrupt" in err)


def _wrong(one: Try, number: int, outcome: server.Outcome) -> str:
    """What is wrong with the end of the disturbed command itself."""
    if number == signal.SIGKILL:
        return "" if outcome.status in (0, -number) else said(outcome)
    if outcome.status not in (0, INTERRUPTED):
        return said(outcome)
    if b"Traceback" in outcome.err:
        return f"a traceback: {said(outcome)}"
    if outcome.orphans:
        return f"status {outcome.status}, and left processes that it had started"
    complete = outcome.status == 0 or not one.differs()
    left = [*one.left(resumable=True, complete=complete), *one.left_scratch()]
    return f"status {outcome.status}, and left {', '.join(left[:3])}" if left else ""

"""Disks that fill up and memory that runs out: the same result, or one line, exit status 2 and nothing left."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from robustness import server
from robustness.commands import FIRST_LINES, Prepared, Try, cold_run, said
from robustness.table import BAD, LINE, SAME, Attempt
from robustness.verdict import REFUSED, judge

SMALLEST_FILE, SMALLEST_DISK = 64, 8 * 2**10  # bytes
MEMORY = (2**18, 2**29)  # bytes of address space that a fork may take
COLD_MEMORY = 5 * 2**30  # bytes of address space in which every command of these succeeds


def full_files(prepared: Prepared, count: int, draw: random.Random) -> Iterator[Attempt]:
    """No file may grow past a size (EFBIG), from nothing to more than the largest."""
    largest = max(prepared.made.largest, 2**12)
    for number in range(count):
        size = int(SMALLEST_FILE * (2.0 * largest / SMALLEST_FILE) ** ((number + draw.random()) / count))
        one = prepared.fresh()
        outcome = server.run(one.work(largest_file=size, piped=True))
        yield _judged("file size", one, outcome, f"files of at most {size:,} bytes")
        one.remove()


def full_disk(prepared: Prepared, count: int, draw: random.Random, place: Path) -> Iterator[Attempt]:
    """A small tmpfs. place: an empty folder to mount it at."""
    most = 2 * prepared.made.size
    for number in range(count):
        size = int(SMALLEST_DISK * (most / SMALLEST_DISK) ** ((number + draw.random()) / count)) // 4096 * 4096
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512m", "tmpfs", place], check=True)
        try:
            one = prepared.fresh(place)
            used = os.statvfs(place)
            taken = (used.f_blocks - used.f_bfree) * used.f_frsize
            subprocess.run(["mount", "-o", f"remount,size={taken + size}", place], check=True)
            outcome = server.run(one.work(piped=True))
            subprocess.run(["mount", "-o", "remount,size=512m", place], check=True)
            yield _judged("disk full", one, outcome, f"a disk with {size:,} bytes free")
        finally:
            subprocess.run(["umount", "-l", place], check=True)


def may_mount(place: Path) -> bool:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False)
    return done.returncode == 0 and subprocess.run(["umount", place], check=False).returncode == 0


def little_memory(prepared: Prepared, count: int, draw: random.Random, cold: float, least: int) -> Iterator[Attempt]:
    """Limits of the address space (ulimit -v). least: bytes in which the program's own code starts."""
    for number in range(count):
        one, share = prepared.fresh(), (number + draw.random()) / count
        if draw.random() < cold:
            size = int(least + share * (COLD_MEMORY - least))
            outcome = cold_run(one, f"ulimit -v {size // 1024}")
            what = f"ulimit -v {size // 1024}"
        else:
            size = int(MEMORY[0] * (MEMORY[1] / MEMORY[0]) ** share)
            outcome = server.run(one.work(addresses=size))
            what = f"{size / 2**20:,.0f} MiB more than a fork has"
        yield _judged("memory", one, outcome, what)
        one.remove()


def least_memory() -> int:
    """Return the bytes of address space in which the program's first lines run, and an eighth more."""
    low, high = 2**24, 2**32
    while high - low > 2**20:
        middle = (low + high) // 2
        command = [
            "bash",
            "-c",
            f'ulimit -v {middle // 1024} && exec "$@"',
            "bash",
            sys.executable,
            "-c",
            FIRST_LINES,
        ]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            low = middle
        else:
            high = middle
    return high + high // 8


def _judged(fault: str, one: Try, outcome: server.Outcome, what: str) -> Attempt:
    name = one.prepared.name
    verdict = judge(outcome, limited=True)
    if outcome.status == 0 and verdict.word != BAD:
        wrong = one.differs(outcome.out)
        note = f"{name}, {what}: another result: {', '.join(wrong[:3])}" if wrong else ""
        return Attempt(fault, name, BAD if wrong else SAME, note)
    if verdict.word != REFUSED:
        reason = verdict.reason or f"{said(outcome)}"
        return Attempt(fault, name, BAD, f"{name}, {what}: {reason}")
    left = [*one.left(resumable=True, complete=not one.differs()), *one.left_scratch()]
    reason = f"refused, and left {', '.join(left[:3])}" if left else one.finished("refused")
    return Attempt(fault, name, BAD if reason else LINE, f"{name}, {what}: {reason}" if reason else "")

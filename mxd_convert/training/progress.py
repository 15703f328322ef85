"""Progress of a run, on stderr: a live bar in a terminal, a line now and then elsewhere, nothing when asked to be quiet."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 15.0


class TrainingProgress:
    """Tokens, tokens/s, time left, mean FVU. A context manager."""

    def __init__(self, tokens: int, done: int = 0, quiet: bool = False) -> None:
        self.total, self.quiet = tokens, quiet
        self.console = Console(stderr=True)
        self.live = not quiet and self.console.is_terminal
        self.start, self.last_line, self.done_before = time.monotonic(), time.monotonic(), done
        columns = (
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%  {task.fields[tokens]} tokens  {task.fields[rate]}  {task.fields[fvu]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.console, disable=not self.live)
        self.task = self.bar.add_task("training", total=tokens, completed=done, tokens=f"{done:,}", rate="", fvu="")
        self.fvu = ""

    def __enter__(self) -> "TrainingProgress":
        self.bar.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.__exit__(kind, error, trace)

    def update(self, tokens: int, fvu: float | None = None) -> None:
        if self.quiet:
            return
        now = time.monotonic()
        rate = (tokens - self.done_before) / max(now - self.start, 1e-9)
        if fvu is not None:
            self.fvu = f"FVU {fvu:.3f}"
        self.bar.update(self.task, completed=tokens, tokens=f"{tokens:,}", rate=f"{rate:,.0f} tokens/s", fvu=self.fvu)
        if not self.live and (now - self.last_line > LINE_SECONDS or tokens >= self.total):
            self.last_line = now
            left = (self.total - tokens) / max(rate, 1e-9)
            print(
                f"training: {tokens:,} of {self.total:,} tokens, {rate:,.0f} tokens/s, {self.fvu}, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

"""Progress of a run, on stderr: a live bar in a terminal, otherwise a line every 15 seconds, nothing if `quiet`."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from mxd_convert.escaping import say

LINE_SECONDS = 15.0  # between two lines where stderr is not a terminal
WIDE = 130  # characters; narrower terminals show no bar


class TrainingProgress:
    """A context manager that shows tokens, tokens/s, mean FVU, dead share, shares of the time and time left.

    name: what is trained, or empty. done: tokens of earlier calls.
    """

    def __init__(self, name: str, tokens: int, done: int = 0, quiet: bool = False) -> None:
        self.total, self.quiet, self.name = tokens, quiet, f"training {name}".rstrip()
        self.console = Console(stderr=True)
        self.live = not quiet and self.console.is_terminal
        self.start, self.last_line, self.done_before = time.monotonic(), time.monotonic(), done
        columns = (BarColumn(bar_width=20),) if self.console.width >= WIDE else ()
        # one column of text, the most important first: a narrow terminal cuts off its end
        self.bar = Progress(TextColumn("{task.fields[line]}"), *columns, console=self.console, disable=not self.live)
        self.task = self.bar.add_task("training", total=tokens, completed=done, line=self.name)
        self.text = ""

    def __enter__(self) -> "TrainingProgress":
        self.bar.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.__exit__(kind, error, trace)

    def figures(self, fvu: float, dead: float, shares: dict[str, float]) -> None:
        """Set the figures that the next updates show. shares: shares of the time, by activity."""
        spent = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        self.text = f"FVU {fvu:.3f}, {dead:.0%} dead" + (f", time: {spent}" if spent else "")

    def update(self, tokens: int) -> None:
        """Show the progress after `tokens` tokens."""
        if self.quiet:
            return
        now = time.monotonic()
        rate = (tokens - self.done_before) / max(now - self.start, 1e-9)
        left = _clock((self.total - tokens) / max(rate, 1e-9))
        line = f"{self.name} {tokens / self.total:.0%}, {left} left, {rate:,.0f} tokens/s, {self.text}".rstrip(", ")
        self.bar.update(self.task, completed=tokens, line=line)
        if not self.live and self.text and (now - self.last_line > LINE_SECONDS or tokens >= self.total):
            self.last_line = now
            say(f"{line} ({tokens:,} of {self.total:,} tokens)")


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"

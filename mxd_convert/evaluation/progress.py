"""The progress bar of a measurement, on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

from mxd_convert.escaping import say


@contextmanager
def progress(total: int, quiet: bool, what: str = "evaluating", line: str | None = None) -> Iterator[Callable[..., None]]:
    """Show progress: a bar on a terminal, one line elsewhere, nothing if `quiet`. Yield the function that advances it.

    Args:
        total: number of steps.
        quiet: whether to print nothing.
        what: label of the bar.
        line: replaces the line `<what> on held-out text`.
    """
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        if not quiet:
            say(line or f"{what} on held-out text")
        yield lambda steps=1: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda steps=1: bar.advance(task, steps)

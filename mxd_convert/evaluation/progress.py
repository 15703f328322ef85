"""Progress of a measurement, on stderr: a bar in a terminal, a line elsewhere, nothing when asked to be quiet."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


@contextmanager
def progress(doing: str, line: str, total: int, quiet: bool) -> Iterator[Callable[..., None]]:
    """Yields a function that moves the bar on, by one step or as many as it is given. doing: beside the bar. line: what stands in its place."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        if not quiet:
            print(line, file=sys.stderr, flush=True)
        yield lambda steps=1: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda steps=1: bar.advance(task, steps)

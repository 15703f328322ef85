"""Progress of a measurement, on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

from mxd_convert.escaping import say


@contextmanager
def progress(total: int, quiet: bool, what: str = "evaluating", line: str | None = None) -> Iterator[Callable[..., None]]:
    """A bar on a terminal, a line elsewhere, nothing when asked to be quiet. Yields what to call after every part, or after several."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        if not quiet:
            say(line or f"{what} on held-out text")
        yield lambda parts=1: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda parts=1: bar.advance(task, parts)

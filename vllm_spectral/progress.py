"""Progress bars, on standard error so that standard output stays a result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def token_bar(description: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar with elapsed and remaining time; yields the function that advances it by a number of units."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.update(task, advance=amount)
        bar.update(task, completed=total)

"""Progress on stderr of work that listeners are told of: a bar on a terminal, else a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

LINE_EVERY_S = 5.0


class Told(Protocol):
    """Work that tells its listeners whenever it goes on: how far it is, 0 to 1, and what runs now."""

    @property
    def share(self) -> float: ...

    @property
    def doing(self) -> str: ...

    @property
    def listeners(self) -> list[Callable[[Any], None]]: ...


@contextmanager
def show_progress(name: str, progress: Told) -> Iterator[None]:
    """A bar on a terminal, else a line every few seconds; drawn when told, between measurements."""
    if not sys.stderr.isatty():
        progress.listeners.append(_Lines(name).show)
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(name), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # rich's own refresh thread would take its time from what is measured.
    with Bar(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        task_id = bar.add_task("", total=1.0)

        def draw(now: Told) -> None:
            bar.update(task_id, completed=now.share, description=now.doing)
            bar.refresh()

        progress.listeners.append(draw)
        yield
        bar.update(task_id, completed=1.0, description="done")
        bar.refresh()


class _Lines:
    def __init__(self, name: str) -> None:
        self._name = name
        self._last_s = float("-inf")

    def show(self, now: Told) -> None:
        if time.monotonic() - self._last_s >= LINE_EVERY_S:
            self._last_s = time.monotonic()
            print(f"{self._name}: {now.share:4.0%} {now.doing}", file=sys.stderr, flush=True)

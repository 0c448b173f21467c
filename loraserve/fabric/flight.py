"""One fetch of one version, and those who wait for it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from loraserve.errors import LoraServeError
from loraserve.fabric.gate import Ticket
from loraserve.fabric.wanted import Seconds, Source, Wanted

MAX_TRIED = 8
_MAX_NOTE = 160

OnProgress = Callable[[int, int], None]
"""Called on the loop with (bytes in place, bytes in all); must not raise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Landing:
    """Where a segment came from, and how long that took."""

    source: Source
    size_bytes: int
    scheme: str = ""
    peer: str = ""
    seconds: Seconds = field(default_factory=Seconds)

    @property
    def where(self) -> str:
        """What it is counted under."""
        return self.scheme if self.source == "peer" else self.source


@dataclass(frozen=True, slots=True)
class Crash:
    """Why a fetch has failed: the kind of error that each who waits gets, and its line."""

    kind: type[LoraServeError]
    text: str


@dataclass(slots=True, eq=False)
class Flight:
    """One fetch. `num_waiting` wait for it, `num_pinning` of them for an acquisition; `landed` is done once
    nothing writes any more."""

    wanted: Wanted
    ticket: Ticket
    landed: "asyncio.Future[Landing | Crash]"
    num_waiting: int = 0
    num_pinning: int = 0
    num_gave_way: int = 0
    tried: list[str] = field(default_factory=list)
    listeners: list[OnProgress] = field(default_factory=list)
    done_bytes: int = 0
    _is_telling: bool = False

    def note(self, line: str) -> None:
        """Keep what was tried for the final error, as far as a line may be long."""
        self.tried.append(line if len(line) <= _MAX_NOTE else line[: _MAX_NOTE - 3] + "...")

    def summary(self) -> str:
        """What was tried, the latest last."""
        left_out = len(self.tried) - MAX_TRIED
        shown = self.tried[-MAX_TRIED:]
        return "; ".join([f"{left_out} more", *shown] if left_out > 0 else shown)

    def tell(self, loop: asyncio.AbstractEventLoop, done_bytes: int, size_bytes: int) -> None:
        """From the fetching thread: so much is in place. Calls that come faster than the loop become one."""
        self.done_bytes = done_bytes
        if self.listeners and not self._is_telling:
            self._is_telling = True
            loop.call_soon_threadsafe(self._tell_listeners, size_bytes)

    def _tell_listeners(self, size_bytes: int) -> None:
        self._is_telling = False
        for listener in self.listeners:
            listener(self.done_bytes, size_bytes)

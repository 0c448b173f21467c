"""Keeps work in the background from taking a processor that requests need, piece by piece."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

DEFAULT_SHARE = 0.05
PIECE_S = 0.001
MAX_REST_S = 0.25
MAX_HELD_UP_S = 10.0
"""A work that takes longer than this is large, and somebody waits for it: it goes on without rests."""

_LOOK_AGAIN_S = 0.02


def never() -> bool:
    """What to ask where the answer is no."""
    return False


def no_rest() -> None:
    """The `rest` of who need not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """What a pace is measured with: the time, what the calling thread has worked, and how it sleeps."""

    now_s: Callable[[], float] = time.monotonic
    worked_s: Callable[[], float] = time.thread_time
    sleep: Callable[[float], None] = time.sleep


class Pace:
    """Threads that work in the background call `rest` after each piece of it, of a millisecond or so.

    While `is_busy` says that requests run, all these threads together take `share` of one processor, in
    pieces with pauses between. A low priority is no substitute: it gives a thread several milliseconds at a
    time, which a decode step waits for, or keeps it from going on while it holds the interpreter's lock,
    which the loop waits for. While nothing runs, and with a share of 1, nobody rests.
    """

    def __init__(
        self,
        share: float = DEFAULT_SHARE,
        is_busy: Callable[[], bool] = never,
        *,
        times: Times | None = None,
    ) -> None:
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share: {share}; expected more than 0 and at most 1")
        self.is_busy = is_busy
        self._share = share
        self._times = times or Times()
        self._own = threading.local()
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    def for_one(self) -> Callable[[], None]:
        """The `rest` of one work that begins now, which it holds up for about `MAX_HELD_UP_S` at most."""
        until_s = self._times.now_s() + MAX_HELD_UP_S

        def rest() -> None:
            if self._times.now_s() < until_s:
                self.rest()

        return rest

    def rest(self) -> None:
        """Wait as long as what this thread has worked since it last did asks for, at most `MAX_REST_S`."""
        worked_s = self._times.worked_s()
        paid_s = getattr(self._own, "paid_s", None)
        if paid_s is None or self._share == 1.0 or not self.is_busy():
            self._own.paid_s = worked_s
            return
        debt_s = worked_s - paid_s
        if debt_s < PIECE_S:
            return
        self._own.paid_s = worked_s
        now_s = self._times.now_s()
        with self._lock:
            # One after the other: pieces of two threads at once would be as one of twice the length.
            free_at_s = max(now_s, self._free_at_s) + debt_s / self._share
            until_s = self._free_at_s = min(free_at_s, now_s + MAX_REST_S)
        while (left_s := until_s - self._times.now_s()) > 0 and self.is_busy():
            self._times.sleep(min(left_s, _LOOK_AGAIN_S))

"""Time as a dependency: the wall clock of live processes, and a manual one for tests."""

import time
from typing import Protocol


class Clock(Protocol):
    """A source of seconds. Guarantees monotonicity; says nothing about the time of day."""

    def now_s(self) -> float:
        """Seconds since an arbitrary origin, never going backwards."""
        ...


class WallClock:
    """The machine's monotonic clock."""

    def now_s(self) -> float:
        """Seconds of the monotonic clock."""
        return time.monotonic()


class ManualClock:
    """A clock that only moves when told to: the test double."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s

    def now_s(self) -> float:
        """The seconds set so far."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move forward; negative steps are refused with ValueError."""
        if seconds < 0:
            raise ValueError(f"a clock cannot go back by {-seconds} s")
        self._now_s += seconds

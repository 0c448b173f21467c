"""When something that keeps failing is left alone, and when it is tried again: events in, commands out.

CLOSED lets everybody through. So many failures in a row, or one library that is not there, open it: nobody
gets through until the back-off is over. Then it is HALF_OPEN: one trial gets through, whose success closes it
and whose failure opens it for twice as long, up to a ceiling.
"""

from dataclasses import dataclass
from enum import Enum


class BreakerState(Enum):
    """Whether attempts get through: all, none, or one trial."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class BreakerEvent(Enum):
    """ASKED: somebody wants to try. The others say how an attempt that was allowed has ended; ABANDONED:
    without saying anything about what was tried."""

    ASKED = "asked"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    MISSING = "missing"
    ABANDONED = "abandoned"


class BreakerCommand(Enum):
    """ALLOW or REFUSE answer ASKED; OPENED and CLOSED are to be told to whoever watches."""

    ALLOW = "allow"
    REFUSE = "refuse"
    OPENED = "opened"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerRules:
    """How many failures in a row open it, and for how long; ValueError for rules that cannot be."""

    failures: int = 3
    first_s: float = 1.0
    max_s: float = 60.0

    def __post_init__(self) -> None:
        if self.failures < 1 or not 0 < self.first_s <= self.max_s:
            raise ValueError(f"{self}: expected failures of at least 1 and 0 < first_s <= max_s")


class Breaker:
    """One door: `handle(event, now_s) -> commands`; `now_s` never goes back."""

    def __init__(self, rules: BreakerRules | None = None) -> None:
        self._rules = rules or BreakerRules()
        self.state = BreakerState.CLOSED
        self.open_until_s = 0.0
        self._failures = 0
        self._wait_s = self._rules.first_s
        self._trial_since_s: float | None = None

    @property
    def is_idle(self) -> bool:
        """Whether it knows nothing that a new one would not."""
        return self.state is BreakerState.CLOSED and self._failures == 0

    def handle(self, event: BreakerEvent, now_s: float) -> tuple[BreakerCommand, ...]:
        """Take one event in and say what is to be done."""
        match event:
            case BreakerEvent.ASKED:
                return (BreakerCommand.ALLOW if self._allows(now_s) else BreakerCommand.REFUSE,)
            case BreakerEvent.SUCCEEDED:
                return self._on_success()
            case BreakerEvent.FAILED:
                return self._on_failure(now_s, is_final=False)
            case BreakerEvent.MISSING:
                return self._on_failure(now_s, is_final=True)
            case BreakerEvent.ABANDONED:
                self._trial_since_s = None
                return ()

    def _allows(self, now_s: float) -> bool:
        if self.state is BreakerState.OPEN and now_s >= self.open_until_s:
            self.state = BreakerState.HALF_OPEN
            self._trial_since_s = None
        if self.state is not BreakerState.HALF_OPEN:
            return self.state is BreakerState.CLOSED
        # A trial that never told its end must not keep others out for ever.
        if self._trial_since_s is not None and now_s < self._trial_since_s + self._rules.max_s:
            return False
        self._trial_since_s = now_s
        return True

    def _on_success(self) -> tuple[BreakerCommand, ...]:
        was_closed = self.state is BreakerState.CLOSED
        self.state, self._failures, self._trial_since_s = BreakerState.CLOSED, 0, None
        self._wait_s = self._rules.first_s
        return () if was_closed else (BreakerCommand.CLOSED,)

    def _on_failure(self, now_s: float, *, is_final: bool) -> tuple[BreakerCommand, ...]:
        if self.state is BreakerState.OPEN:
            # An attempt from before it opened: it is known already.
            return ()
        self._failures += 1
        if self.state is BreakerState.CLOSED and self._failures < self._rules.failures and not is_final:
            return ()
        self.state, self._trial_since_s = BreakerState.OPEN, None
        self.open_until_s = now_s + self._wait_s
        self._wait_s = min(2 * self._wait_s, self._rules.max_s)
        return (BreakerCommand.OPENED,)

"""Waiting between attempts to reach a peer, longer each time, bounded and with jitter."""

from random import Random

FIRST_DELAY_S = 0.1
MAX_DELAY_S = 2.0


class Backoff:
    """Delays that double from `first_s` to `max_s`, each drawn from its upper half."""

    def __init__(self, rng: Random, *, first_s: float = FIRST_DELAY_S, max_s: float = MAX_DELAY_S) -> None:
        self._rng = rng
        self._first_s = first_s
        self._max_s = max_s
        self._next_s = first_s

    def reset(self) -> None:
        """The peer answered: begin with the shortest delay again."""
        self._next_s = self._first_s

    def next_s(self) -> float:
        """How long to wait before the next attempt."""
        delay_s = self._next_s * (0.5 + 0.5 * self._rng.random())
        self._next_s = min(self._next_s * 2, self._max_s)
        return delay_s

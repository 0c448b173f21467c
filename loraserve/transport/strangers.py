"""One log line for who connects and is none of ours, and few lines for many."""

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

BURST = 5
PERIOD_S = 60.0


class Strangers:
    """Logs at most `BURST` lines per `PERIOD_S`; the next one after says how many were left out."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._lock = threading.Lock()
        self._period_began_s = now_s()
        self._lines = 0
        self._left_out = 0

    def turned_away(self, peer: str, reason: str) -> None:
        """Say so, unless it was said often enough."""
        with self._lock:
            if self._now_s() - self._period_began_s >= PERIOD_S:
                self._period_began_s, self._lines = self._now_s(), 0
            if self._lines >= BURST:
                self._left_out += 1
                return
            self._lines += 1
            left_out, self._left_out = self._left_out, 0
        more = f" (and {left_out} before, not logged)" if left_out else ""
        logger.warning("the fabric turned away a connection from %s: %s%s", peer, reason, more)

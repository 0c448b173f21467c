"""Ending a simulation as soon as it is certain that its 95th percentile of TTFT misses the target.

Owns the count of requests that are late for certain. Nothing is guessed: a run that would have held is never
given up, and looking at one that holds changes nothing of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from loraserve.errors import LoraServeError
from loraserve.simulator.ledger import FAILED, REFUSED, Ledger
from loraserve.simulator.site import Site
from placement.latency import PS_PER_S

PS_PER_MS = 1e9
PERCENT = 95
"""The percentile of `traces.metrics.Slo`."""

LOOKS = 48
"""How often a run is looked at, at most; by requests that come, as many between two looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """When to end a run early: once the 95th percentile of TTFT of those that arrive at or after `warmup_s`
    is above `ttft_ms` for certain, by the definition of `traces.metrics`. ValueError for a target that can
    never be met."""

    ttft_ms: float
    warmup_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.ttft_ms > 0:
            raise ValueError(f"ttft_ms: {self.ttft_ms}; expected above 0")


class GaveUpError(LoraServeError):
    """A run was ended early: of `num_judged` requests `num_late` are late, and were there only so many more
    than the percentile allows. `num_come` of the trace's `num_requests` had come by then."""

    def __init__(self, num_late: int, num_judged: int, num_come: int, num_requests: int) -> None:
        super().__init__(num_late, num_judged, num_come, num_requests)
        self.num_late = num_late
        self.num_judged = num_judged
        self.num_come = num_come
        self.num_requests = num_requests

    def __str__(self) -> str:
        return (
            f"given up after {self.num_come} of {self.num_requests} requests: {self.num_late} of the "
            f"{self.num_judged} that count are late, so their TTFT p{PERCENT} misses its target"
        )


class LateCount:
    """Which requests of a run are late for certain; `look` raises GaveUpError when they are too many."""

    def __init__(self, give_up: GiveUp, ledger: Ledger, network_delay_s: float) -> None:
        self._ttft_ms = give_up.ttft_ms
        self._ledger = ledger
        self._network_ps = round(network_delay_s * PS_PER_S)
        warmup_ps = round(give_up.warmup_s * PS_PER_S)
        self._first_row = int(np.searchsorted(ledger.arrival_ps, warmup_ps))
        self._num_judged = len(ledger) - self._first_row
        # The sample just below the percentile is late if so many are: interpolation can only add to it.
        self._enough = max(1, self._num_judged - int((self._num_judged - 1) * PERCENT / 100))
        self.interval = max(1, len(ledger) // LOOKS)
        """So many requests come between two looks."""

    def look(self, sites: Iterable[Site], num_come: int, now_ps: int) -> None:
        """Count at `now_ps`, by when the first `num_come` requests have come and been sent."""
        first_ps = self._first_ps(num_come)
        # Cheap, and most often enough: as if no stream under way had its first token yet.
        if self._num_late(first_ps, num_come, now_ps) < self._enough:
            return
        self._add_under_way(first_ps, sites, num_come, now_ps)
        num_late = self._num_late(first_ps, num_come, now_ps)
        if num_late >= self._enough:
            raise GaveUpError(num_late, self._num_judged, num_come, len(self._ledger))

    def _first_ps(self, num_come: int) -> NDArray[np.int64]:
        """When those that count had their first token, -1 where the routers know of none."""
        column = np.frombuffer(self._ledger.first_ps, dtype=np.int64)
        return column[self._first_row : num_come].copy()

    def _num_late(self, first_ps: NDArray[np.int64], num_come: int, now_ps: int) -> int:
        """Those whose first token came late, or will as it is still to come, and those that have none."""
        rows = slice(self._first_row, num_come)
        arrival_ps = self._ledger.arrival_ps[rows]
        outcome = np.frombuffer(self._ledger.outcome, dtype=np.int8)[rows]
        soonest_ps = np.where(first_ps >= 0, first_ps, now_ps)
        is_late = (soonest_ps - arrival_ps) / PS_PER_MS > self._ttft_ms
        return int(np.count_nonzero(is_late | (outcome == FAILED) | (outcome == REFUSED)))

    def _add_under_way(
        self, first_ps: NDArray[np.int64], sites: Iterable[Site], num_come: int, now_ps: int
    ) -> None:
        """Fill in the first tokens of streams that have not ended, which no router has told of yet."""
        for site in sites:
            model = site.settle(now_ps)
            if model is None:
                continue
            for sequence in chain(site.sequences(), model.finished):
                place = sequence.request - self._first_row
                if sequence.first_ps >= 0 and place >= 0 and first_ps[place] < 0:
                    first_ps[place] = sequence.first_ps + self._network_ps

"""Finds the highest rate that holds: bracketing by doubling, then bisection.

Pure, and the same for whatever is probed: it is told which rates held, and says which one to try next.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchLimits:
    """Rates tried lie within `lowest` to `highest`; bisection ends when the lowest rate that failed is at
    most `tolerance` (0.05: 5 %) above the highest that held, or after `max_probes`. Until there is one of
    each, rates go up or down by `growth`."""

    lowest: float
    highest: float
    tolerance: float = 0.05
    max_probes: int = 24
    growth: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.lowest <= self.highest < math.inf:
            raise ValueError(f"rates {self.lowest} to {self.highest}; expected 0 < lowest <= highest")
        if not 0 < self.tolerance < math.inf or self.max_probes < 1 or not 1 < self.growth < math.inf:
            said = f"tolerance {self.tolerance}, {self.max_probes} probes, growth {self.growth}"
            raise ValueError(f"{said}; expected more than none, and a growth above 1")


class RateSearch:
    """One search: ask `next_rate`, try it, `tell` whether it held, until there is no next one.

    It takes for granted that what holds at a rate holds at lower ones. If a probe says otherwise, the failure
    counts: no rate above one that failed is tried again. It begins at `start`, or, where it is known already
    that one rate `held` or one `failed`, beyond or between them.
    """

    def __init__(
        self, limits: SearchLimits, start: float, *, held: float | None = None, failed: float | None = None
    ) -> None:
        self._limits = limits
        self._held = held
        self._failed = failed
        self._probes = 0
        known = held is not None or failed is not None
        self._next = self._choose() if known else min(max(start, limits.lowest), limits.highest)

    @property
    def held(self) -> float | None:
        """The highest rate that held, None if none did."""
        return self._held

    @property
    def failed(self) -> float | None:
        """The lowest rate that failed, None if none did."""
        return self._failed

    @property
    def next_rate(self) -> float | None:
        """The rate to try now, None when the search is over."""
        return self._next

    @property
    def is_bracketed(self) -> bool:
        """Whether the answer is known to the tolerance."""
        held, failed = self._held, self._failed
        return held is not None and failed is not None and failed <= held * (1 + self._limits.tolerance)

    def tell(self, *, held: bool) -> None:
        """How the rate asked for went; ValueError when none was asked for."""
        rate = self._next
        if rate is None:
            raise ValueError("the search is over")
        self._probes += 1
        if held:
            self._held = rate
        else:
            self._failed = rate
        self._next = self._choose()

    def _choose(self) -> float | None:
        limits, held, failed = self._limits, self._held, self._failed
        if self._probes >= limits.max_probes or self.is_bracketed:
            return None
        if failed is None:
            assert held is not None
            return None if held >= limits.highest else min(limits.growth * held, limits.highest)
        if held is None:
            return None if failed <= limits.lowest else max(failed / limits.growth, limits.lowest)
        # The tolerance is a ratio, and so the middle is.
        return math.sqrt(held * failed)

"""A link that all its transfers share: each gets the same part of its rate at any time.

The fluid model of processor sharing, by virtual work (as in weighted fair queueing): `_work` is what each
transfer that has been there all along has got, so one heap entry per transfer is all there is to keep.
Exact: work is a whole number of the smallest parts of a byte, rounded down, and an end is rounded up to a
picosecond, so a link is never faster than its rate.
"""

from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from placement.latency import PS_PER_S

_PARTS = PS_PER_S << 32
"""A byte's parts: a link of b bytes/s moves b << 32 of them in a picosecond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpeed:
    """What one link carries, and how long the last byte of a transfer is on its way besides.

    ValueError for what no link can be.
    """

    bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.bytes_per_s < 1e15:
            raise ValueError(f"bytes_per_s: {self.bytes_per_s}; expected from 1 to 1e15")
        if not 0 <= self.latency_s < 1e6:
            raise ValueError(f"latency_s: {self.latency_s}; expected from 0 to 1e6")


class SharedLink:
    """Transfers by the caller's numbers; calls are in order of time. O(log n) each but `cancel`, O(n)."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = max(1, round(bytes_per_s)) << 32
        self._work = 0
        self._at_ps = 0
        self._ends: list[tuple[int, int]] = []
        self._begun: dict[int, tuple[int, int]] = {}
        self.bytes_begun = 0
        self.bytes_done = 0
        self.bytes_cancelled = 0

    def __len__(self) -> int:
        return len(self._ends)

    def begin(self, transfer: int, size_bytes: int, at_ps: int) -> None:
        """Put a transfer on the link; its number must not be on it."""
        self._reach(at_ps)
        end = self._work + size_bytes * _PARTS
        self._begun[transfer] = (size_bytes, end)
        heappush(self._ends, (end, transfer))
        self.bytes_begun += size_bytes

    def cancel(self, transfer: int, at_ps: int) -> None:
        """Take a transfer off the link; nothing of it counts as moved."""
        self._reach(at_ps)
        size_bytes, end = self._begun.pop(transfer)
        self._ends.remove((end, transfer))
        heapify(self._ends)
        self.bytes_cancelled += size_bytes

    def next_ps(self) -> int | None:
        """When the next transfer ends if none joins, None on an idle link."""
        if not self._ends:
            return None
        left = max(0, self._ends[0][0] - self._work) * len(self._ends)
        return self._at_ps - (-left // self._rate)

    def take_ended(self, at_ps: int) -> list[int]:
        """The transfers that have ended by now, in their order; `at_ps` is not beyond `next_ps`."""
        self._reach(at_ps)
        ended = []
        while self._ends and self._ends[0][0] <= self._work:
            transfer = heappop(self._ends)[1]
            self.bytes_done += self._begun.pop(transfer)[0]
            ended.append(transfer)
        return ended

    def check_invariants(self) -> None:
        """AssertionError unless every byte that was begun is done, cancelled or on its way."""
        under_way = sum(size for size, _ in self._begun.values())
        assert self.bytes_begun == self.bytes_done + self.bytes_cancelled + under_way, "bytes do not add up"
        assert len(self._begun) == len(self._ends), "a transfer is lost"

    def _reach(self, at_ps: int) -> None:
        if at_ps < self._at_ps:
            raise ValueError(f"a link at {self._at_ps} ps cannot go back to {at_ps} ps")
        if self._ends:
            self._work += (at_ps - self._at_ps) * self._rate // len(self._ends)
        self._at_ps = at_ps

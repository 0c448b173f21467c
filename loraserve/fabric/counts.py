"""What a fabric has done, for metrics and status."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from loraserve.errors import AdapterRejectedError, LoraServeError, OverloadedError, UnavailableError


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricCounts:
    """Totals since the fabric began, and what is here now.

    `loads`, `bytes` and `seconds` (without the queue) by where segments came from: `cache`, `origin`, or the
    scheme that a peer gave them over. `failures`: attempts by how they ended; fetches that came to nothing by
    `overloaded`, `rejected`, `no source` and `closed`; acquisitions by `deadline`. `breakers` names those not
    closed. Held bytes are pinned, cached ones can be evicted, those in flight are being fetched, and
    leaving ones are evicted but still read by a peer.
    """

    loads: Mapping[str, int]
    bytes: Mapping[str, int]
    seconds: Mapping[str, float]
    failures: Mapping[str, int]
    shared_waits: int
    prefetches: int
    gave_way: int
    evictions: int
    evicted_bytes: int
    breakers: Mapping[str, str]
    held_bytes: int
    cached_bytes: int
    in_flight_bytes: int
    leaving_bytes: int
    num_cached: int
    num_fetching: int
    num_waiting: int


@dataclass(slots=True)
class Tally:
    """The totals while they grow."""

    loads: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    shared_waits: int = 0
    prefetches: int = 0
    gave_way: int = 0
    evictions: int = 0
    evicted_bytes: int = 0

    def load(self, where: str, size_bytes: int, seconds: float) -> None:
        """A segment came from there."""
        self.loads[where] += 1
        self.bytes[where] += size_bytes
        self.seconds[where] = self.seconds.get(where, 0.0) + seconds


def kind_of(error: LoraServeError) -> str:
    """What an error of a whole fetch is counted under."""
    match error:
        case OverloadedError():
            return "overloaded"
        case AdapterRejectedError():
            return "rejected"
        case UnavailableError():
            return "closed"
        case _:
            return "no source"

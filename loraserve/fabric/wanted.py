"""What a replica asks its fabric for, and what it gets."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from loraserve.adapters.manifest import DEFAULT_MAX_BYTES
from loraserve.adapters.segment import AdapterSegment
from loraserve.errors import WorkFailedError
from loraserve.pace import DEFAULT_SHARE
from placement.fabric.attempts import DEFAULT_MAX_ATTEMPTS
from placement.fabric.breaker import BreakerRules
from placement.types import VersionId

ORIGIN = "the controller"
"""What the controller's store is called where it is asked like a peer."""

Source = Literal["cache", "peer", "origin"]


class FetchFailedError(WorkFailedError):
    """No source gave the adapter; the message names what was tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAddress:
    """A replica that publishes segments, and how it is reached: pairs of scheme and address."""

    replica_id: str
    addresses: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One adapter version, what it must turn out to be, and where it may be had.

    `digest` is the sha256 of its content, '' where nobody knows it; `head_sha256` that of its segment's head,
    '' if only the origin is to be asked. `peers` come in the order in which they are to be tried, `directory`
    is the origin's folder, None for none. `size_bytes` is what it will take, as far as it is known before.
    """

    version_id: VersionId
    digest: str
    rank: int
    size_bytes: int
    head_sha256: str = ""
    directory: Path | None = None
    peers: tuple[PeerAddress, ...] = ()
    max_lora_rank: int = 512
    max_bytes: int = DEFAULT_MAX_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Where the time of a fetch went: in the queue, for the head, for the body, and what was left to be
    verified when the body was there. The origin has no head and nothing left."""

    queued_s: float = 0.0
    head_s: float = 0.0
    body_s: float = 0.0
    verify_s: float = 0.0

    @property
    def fetch_s(self) -> float:
        """All but the queue."""
        return self.head_s + self.body_s + self.verify_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Acquired:
    """A verified segment, which stays here until `Fabric.release`; `scheme` and `peer` are '' unless a peer
    gave it. The fabric closes it."""

    segment: AdapterSegment
    source: Source
    size_bytes: int
    scheme: str = ""
    peer: str = ""
    seconds: Seconds = field(default_factory=Seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricOptions:
    """`max_fetches` run at a time, with `inflight_bytes` in all; a larger one goes alone. A peer may send
    nothing for `idle_timeout_s`. A prefetch that had to give way `max_giving_way` times is given up. Segments
    that nobody uses are at most `max_cached`, each with two descriptors. `busy_share` of one processor is
    what fetches take while the replica has better to do (see `Fabric.give_way_while`)."""

    max_fetches: int = 4
    inflight_bytes: int = 256 * 1024**2
    idle_timeout_s: float = 5.0
    max_attempts: int = DEFAULT_MAX_ATTEMPTS
    max_giving_way: int = 3
    max_cached: int = 4096
    busy_share: float = DEFAULT_SHARE
    breaker: BreakerRules = field(default_factory=BreakerRules)

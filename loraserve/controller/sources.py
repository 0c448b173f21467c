"""From whom a replica that is to load a version gets its bytes.

Whoever holds it is a source, the nearest and least busy first. While nobody holds it, one replica reads the
origin and the others wait for it, so that the origin is read once per version, but they do not wait for long.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from loraserve.engines.description import FabricPlace, Fetched
from loraserve.fabric.wanted import PeerAddress
from placement.fabric.topology import Place, Topology, Transfer, make_topology
from placement.types import NodeId, ReplicaId, VersionId

logger = logging.getLogger(__name__)

MIN_MEASURED_BYTES = 1024**2
"""What a smaller transfer takes says more about its beginning than about the link."""

FIRST_WAIT_S = 30.0
"""How long others wait for the first load of a version: one replica that hangs must not keep it from all."""

NEW_WEIGHT = 0.25
"""How much one transfer counts in the speed that a pair of replicas was seen at."""


@dataclass(slots=True)
class _Version:
    """Who has it now, and, while nobody has, the load that the others wait for."""

    holders: set[ReplicaId] = field(default_factory=set)
    first: asyncio.Event | None = None


class AdapterSources:
    """`met`, `lost`, `has` and `has_not` keep it true; `turn` surrounds every load."""

    def __init__(self, racks: Sequence[Sequence[str]]) -> None:
        self._racks = {host: f"rack-{number}" for number, hosts in enumerate(racks, 1) for host in hosts}
        self._places: dict[ReplicaId, FabricPlace] = {}
        self._topology: Topology | None = None
        self._measured: dict[tuple[ReplicaId, ReplicaId], float] = {}
        self._versions: defaultdict[VersionId, _Version] = defaultdict(_Version)
        self._running: list[Transfer] = []
        self._cached: dict[ReplicaId, frozenset[VersionId]] = {}
        self._cached_at: defaultdict[VersionId, set[ReplicaId]] = defaultdict(set)
        self.origin: Callable[[], PeerAddress | None] = lambda: None

    def met(self, replica: ReplicaId, place: FabricPlace, resident: Sequence[VersionId]) -> None:
        """A replica is ready: where its fabric is, what that caches, and what it holds."""
        self._places[replica] = place
        self._topology = None
        self.caches(replica, place.cached)
        for version in resident:
            self.has(replica, version)

    def lost(self, replica: ReplicaId) -> None:
        """It is gone, and its copies with it."""
        self.caches(replica, ())
        self._cached.pop(replica, None)
        self._places.pop(replica, None)
        for pair in [pair for pair in self._measured if replica in pair]:
            del self._measured[pair]
        self._topology = None
        for version in list(self._versions):
            self.has_not(replica, version)

    def has(self, replica: ReplicaId, version: VersionId, fetched: Fetched | None = None) -> None:
        """It has acknowledged the version, whose bytes came from there."""
        if replica not in self._places:
            return
        self._versions[version].holders.add(replica)
        if fetched is not None and fetched.peer:
            self._measure(replica, fetched)

    def has_not(self, replica: ReplicaId, version: VersionId) -> None:
        """It is to drop the version, or has never got it."""
        known = self._versions[version]
        known.holders.discard(replica)
        if not known.holders and known.first is None:
            del self._versions[version]

    def caches(self, replica: ReplicaId, versions: Sequence[VersionId]) -> None:
        """It keeps these, though no copy of it needs them: it can give them as long as it does."""
        if replica not in self._places:
            return
        before, now = self._cached.get(replica, frozenset()), frozenset(versions)
        self._cached[replica] = now
        for version in now - before:
            self._cached_at[version].add(replica)
        for version in before - now:
            self._cached_at[version].discard(replica)
            if not self._cached_at[version]:
                del self._cached_at[version]

    def keepers(self, version: VersionId) -> frozenset[ReplicaId]:
        """Who has it or caches it."""
        return self.holders(version).union(self._cached_at.get(version, ()))

    def holders(self, version: VersionId) -> frozenset[ReplicaId]:
        """Who has it."""
        known = self._versions.get(version)
        return frozenset() if known is None else frozenset(known.holders)

    def keeps_last(self, replica: ReplicaId, version: VersionId) -> bool:
        """Whether the replica is to keep what it caches of the version: nobody else holds it, and of those
        that cache it one is enough."""
        keepers = self.keepers(version)
        return self.holders(version) <= {replica} and min(keepers, default=replica) == replica

    def _measure(self, replica: ReplicaId, fetched: Fetched) -> None:
        """What a transfer has shown of the link that it came over."""
        pair = ReplicaId(fetched.peer), replica
        if fetched.size_bytes < MIN_MEASURED_BYTES or fetched.transfer_s <= 0 or pair[0] not in self._places:
            return
        seen = fetched.size_bytes / fetched.transfer_s
        self._measured[pair] = seen + (1 - NEW_WEIGHT) * (self._measured.get(pair, seen) - seen)
        self._topology = None

    def with_origin(self, peers: tuple[PeerAddress, ...]) -> tuple[PeerAddress, ...]:
        """The peers, and last the controller itself, for a replica that does not see its store's folder."""
        origin = self.origin()
        return peers if origin is None else (*peers, origin)

    @asynccontextmanager
    async def turn(
        self, replica: ReplicaId, version: VersionId, size_bytes: int
    ) -> AsyncIterator[tuple[PeerAddress, ...]]:
        """While the block runs the replica loads: the peers to ask, in order, none for the origin alone.

        Waits while another replica is the first to load the version, at most `FIRST_WAIT_S`; `has` within the
        block lets those that wait go on to the new holder.
        """
        if replica not in self._places or not self._places[replica].addresses:
            yield ()  # It can reach nobody, so that it need not wait for anybody.
            return
        give_up_at_s = asyncio.get_running_loop().time() + FIRST_WAIT_S
        while not (peers := self.peers(replica, version, size_bytes)):
            known = self._versions[version]
            if known.first is None:
                known.first = asyncio.Event()
                try:
                    yield ()
                finally:
                    done, known.first = known.first, None
                    done.set()
                    if not known.holders and self._versions.get(version) is known:
                        del self._versions[version]
                return
            try:
                async with asyncio.timeout_at(give_up_at_s):
                    await known.first.wait()
            except TimeoutError:
                logger.warning("%s: %s waits no more for the first copy", version, replica)
                yield ()
                return
        transfer = Transfer(source=ReplicaId(peers[0].replica_id), destination=replica)
        self._running.append(transfer)
        try:
            yield peers
        finally:
            self._running.remove(transfer)

    def peers(self, replica: ReplicaId, version: VersionId, size_bytes: int) -> tuple[PeerAddress, ...]:
        """Those that keep it and have an address, the best first."""
        holders = [one for one in self.keepers(version) if self._places[one].addresses]
        ordered = self._links().order(replica, holders, busy=self._running, size_bytes=size_bytes)
        return tuple(PeerAddress(replica_id=one, addresses=self._places[one].addresses) for one in ordered)

    def _links(self) -> Topology:
        """Made anew when it is asked for, not whenever a replica comes: they come by the hundred."""
        if self._topology is None:
            places = {
                # Each replica is a process of its own.
                replica: Place(
                    process=str(replica), host=NodeId(place.host), rack=self._racks.get(place.host, "")
                )
                for replica, place in self._places.items()
            }
            self._topology = make_topology(places, measured=self._measured)
        return self._topology

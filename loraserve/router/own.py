"""This router's own requests at each replica, by rank: what its routing policy knows for certain."""

from collections.abc import Callable, Mapping

from placement.routing.chooser import OwnRequests
from placement.types import ReplicaId


class OwnBook:
    """One `OwnRequests` per replica that was ever asked about; bounded by the replicas there have been.

    `on_change` hears of a replica whose requests are about to change.
    """

    def __init__(self, on_change: Callable[[ReplicaId], None] | None = None) -> None:
        self._on_change = on_change
        self._by_replica: dict[ReplicaId, OwnRequests] = {}

    @property
    def by_replica(self) -> Mapping[ReplicaId, OwnRequests]:
        """All of them."""
        return self._by_replica

    def at(self, replica_id: ReplicaId) -> OwnRequests:
        """The replica's, for a change."""
        if self._on_change is not None:
            self._on_change(replica_id)
        own = self._by_replica.get(replica_id)
        if own is None:
            own = self._by_replica[replica_id] = OwnRequests()
        return own

    def forget(self, replica_id: ReplicaId) -> None:
        """The replica has left the table; what still runs there counts until its end."""
        own = self._by_replica.get(replica_id)
        if own is not None and not (own.ranks or own.leased):
            del self._by_replica[replica_id]

    def check_invariants(self, in_flight: Mapping[ReplicaId, int], leased: Mapping[ReplicaId, int]) -> None:
        """AssertionError unless the requests add up to the router's counts."""
        for counts, name in ((in_flight, "ranks"), (leased, "leased")):
            found = {
                replica: total
                for replica, own in self._by_replica.items()
                if (total := sum(getattr(own, name).values()))
            }
            assert found == dict(counts), f"{name}: {found} by rank, {dict(counts)} in all"

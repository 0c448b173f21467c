"""What this router has promised clients that go to a replica themselves.

A lease counts as a request in flight there until the replica says that it was used (it is in the
replica's own load from then on) or has run out, or until this side's clock says so.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from loraserve.clock import Clock
from loraserve.router.own import OwnBook
from placement.types import ReplicaId

SPARE_S = 2.0
"""How much longer than its lease this side waits for the replica's word, if the link is broken."""


class LeaseCounter:
    """Leases by replica; bounded by the rate of picks times `lease_s`."""

    def __init__(self, *, prefix: str, lease_s: float, clock: Clock, own: OwnBook | None = None) -> None:
        """`prefix` sets this run's lease ids apart from those of any other router and run."""
        self.lease_s = lease_s
        self._prefix = prefix
        self._clock = clock
        self._own = OwnBook() if own is None else own
        self.issued = 0
        self._open: OrderedDict[str, tuple[ReplicaId, float, int, int]] = OrderedDict()
        self._per_replica: dict[ReplicaId, int] = {}

    @property
    def per_replica(self) -> Mapping[ReplicaId, int]:
        """The leases open now; a replica without any is missing."""
        return self._per_replica

    def issue(self, replica_id: ReplicaId, rank: int = 0, prompt_tokens: int = 0) -> str:
        """A new lease's id, for a request of an adapter of this rank."""
        now_s = self._clock.now_s()
        self._sweep(now_s)
        self.issued += 1
        lease_id = f"{self._prefix}{self.issued}"
        self._open[lease_id] = (replica_id, now_s + self.lease_s + SPARE_S, rank, prompt_tokens)
        self._own.at(replica_id).lease(rank, prompt_tokens)
        self._per_replica[replica_id] = self._per_replica.get(replica_id, 0) + 1
        return lease_id

    def ended(self, lease_ids: Iterable[str]) -> None:
        """The replica says so; one that is not open is no error."""
        for lease_id in lease_ids:
            self._close(lease_id)

    def sweep(self) -> None:
        """Forget those whose time is up."""
        self._sweep(self._clock.now_s())

    def _sweep(self, now_s: float) -> None:
        while self._open:
            lease_id, (_, expires_s, _, _) = next(iter(self._open.items()))
            if expires_s > now_s:
                return
            self._close(lease_id)

    def _close(self, lease_id: str) -> None:
        found = self._open.pop(lease_id, None)
        if found is None:
            return
        replica_id, _, rank, prompt_tokens = found
        self._own.at(replica_id).end_lease(rank, prompt_tokens)
        left = self._per_replica[replica_id] - 1
        if left:
            self._per_replica[replica_id] = left
        else:
            del self._per_replica[replica_id]

    def check_invariants(self) -> None:
        """AssertionError unless the counts are those of the leases."""
        counted: dict[ReplicaId, int] = {}
        for replica_id, *_ in self._open.values():
            counted[replica_id] = counted.get(replica_id, 0) + 1
        assert counted == self._per_replica, f"{counted} are open, {self._per_replica} are counted"

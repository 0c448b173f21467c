"""Before the batch: which adapters a replica's host pool holds, and which are active in a slot.

A request passes once its adapter is active. Slots are decided by the same state machine as in the live
engines; what becomes active crosses one link, one adapter after the other.
"""

import math
from collections import OrderedDict, deque
from dataclasses import dataclass

from loraserve.engines.replica_model.sequence import ReplicaLimits, Sequence
from placement.latency import PS_PER_S
from placement.slots.machine import SlotPhase, SlotTable
from placement.slots.messages import (
    Activate,
    Activated,
    Admit,
    Deactivate,
    Deactivated,
    Dropped,
    Ended,
    Event,
    Wanted,
)
from placement.types import VersionId


@dataclass(slots=True)
class _Copy:
    """A version in the host pool and how many requests here name it."""

    size_bytes: int
    users: int = 0


class AdapterGate:
    """Requests on their way to the batch; `take_ready` gives those that may enter, in their order."""

    def __init__(self, limits: ReplicaLimits) -> None:
        self._limits = limits
        self._table = SlotTable(num_slots=limits.adapter_slots)
        self._pool: OrderedDict[VersionId, _Copy] = OrderedDict()
        """Held versions, the least recently used one first."""
        self._pool_bytes = 0
        self._missing: dict[VersionId, list[Sequence]] = {}
        self._holds: OrderedDict[VersionId, int] = OrderedDict()
        """Versions that came and found no room, with their bytes."""
        self._outside: dict[str, Sequence] = {}
        """Requests that wait for a slot."""
        self.landing: deque[tuple[int, VersionId]] = deque()
        """When the next versions become active, in their order."""
        self._link_free_ps = 0
        self._ready: list[Sequence] = []
        self.wanted: list[VersionId] = []
        self.evicted: list[VersionId] = []

    def __len__(self) -> int:
        missing = self._missing
        return len(self._outside) + (sum(map(len, missing.values())) if missing else 0)

    @property
    def held(self) -> frozenset[VersionId]:
        """The versions in the host pool."""
        return frozenset(self._pool)

    @property
    def num_in_slots(self) -> int:
        """How many versions have a slot."""
        return len(self._table.snapshot().slots)

    def is_active(self, version: VersionId) -> bool:
        """Whether a request for the version would pass at once."""
        return self._table.phase(version) is SlotPhase.ACTIVE

    def sequences(self) -> list[Sequence]:
        """Those that wait here."""
        return [*self._outside.values(), *(one for queue in self._missing.values() for one in queue)]

    def want(self, sequence: Sequence, at_ps: int) -> None:
        """A request of an adapter has come."""
        version = sequence.version
        assert version is not None
        copy = self._pool.get(version)
        if copy is None:
            queue = self._missing.setdefault(version, [])
            if not queue and version not in self._holds:
                self.wanted.append(version)
            queue.append(sequence)
            return
        copy.users += 1
        self._pool.move_to_end(version)
        request = str(sequence.request)
        self._outside[request] = sequence
        self._tell(Wanted(version_id=version, request_id=request), at_ps)

    def leave(self, sequence: Sequence, at_ps: int) -> None:
        """A request has ended, wherever it was; may make room for versions and requests that wait."""
        version = sequence.version
        assert version is not None
        queue = self._missing.get(version)
        if queue is not None and sequence in queue:
            queue.remove(sequence)
            if not queue:
                del self._missing[version]
            return
        request = str(sequence.request)
        self._outside.pop(request, None)
        self._pool[version].users -= 1
        self._tell(Ended(version_id=version, request_id=request), at_ps)
        if self._holds:
            self._place(at_ps)

    def land(self, at_ps: int) -> None:
        """Make active what has crossed the link by now."""
        while self.landing and self.landing[0][0] <= at_ps:
            done_ps, version = self.landing.popleft()
            self._tell(Activated(version_id=version), done_ps)

    def take_ready(self) -> list[Sequence]:
        """The requests that may enter the batch since the last call."""
        ready, self._ready = self._ready, []
        return ready

    def hold(self, version: VersionId, size_bytes: int, at_ps: int) -> None:
        """Take a version into the host pool, as soon as those in nobody's use make room for it.

        ValueError for one that can never fit.
        """
        if 0 < self._limits.pool_bytes < size_bytes:
            raise ValueError(f"{version}: {size_bytes} bytes; the pool holds {self._limits.pool_bytes}")
        if version not in self._pool:
            self._holds[version] = size_bytes
            self._place(at_ps)

    def release(self, version: VersionId, at_ps: int) -> bool:
        """Drop a version; False if requests name it, which must end first."""
        if version in self._missing:
            return False
        self._holds.pop(version, None)
        copy = self._pool.get(version)
        if copy is None:
            return True
        if copy.users:
            return False
        self._drop(version, at_ps)
        return True

    def check_invariants(self) -> None:
        """AssertionError unless bytes, users and slots add up."""
        self._table.check_invariants()
        limits = self._limits
        assert self._pool_bytes == sum(copy.size_bytes for copy in self._pool.values()), "pool bytes"
        assert not limits.pool_bytes or self._pool_bytes <= limits.pool_bytes, "the pool is overfull"
        assert not limits.pool_adapters or len(self._pool) <= limits.pool_adapters, "too many adapters"
        assert all(copy.users >= 0 for copy in self._pool.values()), "a copy has fewer users than none"
        assert self._missing.keys().isdisjoint(self._pool), "a request waits for what is held"

    def _place(self, at_ps: int) -> None:
        """Take in what waits for room, first come first served."""
        while self._holds:
            version, size_bytes = next(iter(self._holds.items()))
            if not self._make_room(size_bytes, at_ps):
                return
            del self._holds[version]
            self._pool[version] = _Copy(size_bytes)
            self._pool_bytes += size_bytes
            for sequence in self._missing.pop(version, ()):
                self.want(sequence, at_ps)

    def _make_room(self, size_bytes: int, at_ps: int) -> bool:
        limits = self._limits
        while (limits.pool_adapters and len(self._pool) >= limits.pool_adapters) or (
            limits.pool_bytes and self._pool_bytes + size_bytes > limits.pool_bytes
        ):
            idle = next((version for version, copy in self._pool.items() if not copy.users), None)
            if idle is None:
                return False
            self._drop(idle, at_ps)
            self.evicted.append(idle)
        return True

    def _drop(self, version: VersionId, at_ps: int) -> None:
        self._pool_bytes -= self._pool.pop(version).size_bytes
        self._tell(Dropped(version_id=version), at_ps)

    def _tell(self, event: Event, at_ps: int) -> None:
        first = self._table.handle(event)
        if not first:
            return
        commands = deque(first)
        while commands:
            match commands.popleft():
                case Admit(request_id=request):
                    self._ready.append(self._outside.pop(request))
                case Activate(version_id=version):
                    done_ps = self._send(version, at_ps)
                    if done_ps <= at_ps:
                        commands += self._table.handle(Activated(version_id=version))
                    else:
                        self.landing.append((done_ps, version))
                case Deactivate(version_id=version):
                    commands += self._table.handle(Deactivated(version_id=version))

    def _send(self, version: VersionId, at_ps: int) -> int:
        """When the version has crossed the link, if it begins as soon as the link is free."""
        if math.isinf(self._limits.load_bytes_per_s):
            return at_ps
        # A version that was dropped while it waited for its slot crosses for nothing.
        copy = self._pool.get(version)
        size_bytes = 0 if copy is None else copy.size_bytes
        begun_ps = max(self._link_free_ps, at_ps)
        self._link_free_ps = begun_ps + round(size_bytes * PS_PER_S / self._limits.load_bytes_per_s)
        return self._link_free_ps

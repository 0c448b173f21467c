"""What a router has in flight and what became of the rest: counters, outcomes, conservation.

Knows nothing of gRPC; the one place where requests are opened, assigned, released and closed.
"""

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from loraserve.errors import AlreadyExistsError, OverloadedError
from placement.types import ReplicaId, VersionId

MAX_OUTCOMES = 4096


# A struct and no dataclass because every request makes one: a tenth of the time.
class RequestOutcome(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How one request went; times are the router's clock, `status` a gRPC status code's name.

    `replica_id`, `version_id`, `reason` and `table_version` are of the last decision, None without
    one; `first_message_s` is None when none was passed on.
    """

    request_id: str
    adapter: str
    status: str
    replica_id: ReplicaId | None
    version_id: VersionId | None
    reason: str | None
    table_version: int | None
    attempts: int
    messages: int
    started_s: float
    first_message_s: float | None
    ended_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterCounters:
    """Requests since the start; `requests` is the sum of the others but `failovers`, how often one was
    sent elsewhere because its replica was lost."""

    requests: int = 0
    completed: int = 0
    failed: int = 0
    refused: int = 0
    cancelled: int = 0
    in_flight: int = 0
    failovers: int = 0


class Ledger:
    """Counts every request exactly once, from its admission or refusal to its end."""

    def __init__(self, *, max_in_flight: int, max_outcomes: int = MAX_OUTCOMES) -> None:
        self._max_in_flight = max_in_flight
        self._open: set[str] = set()
        self._per_replica: dict[ReplicaId, int] = {}
        self._assigned = 0
        self._requests = 0
        self._completed = 0
        self._failed = 0
        self._refused = 0
        self._cancelled = 0
        self._failovers = 0
        self._outcomes: deque[RequestOutcome] = deque(maxlen=max_outcomes)
        self._idle: asyncio.Event | None = None

    @property
    def in_flight(self) -> Mapping[ReplicaId, int]:
        """The requests now at each replica; a replica without any is missing."""
        return self._per_replica

    @property
    def outcomes(self) -> tuple[RequestOutcome, ...]:
        """The last requests that ended, oldest first."""
        return tuple(self._outcomes)

    @property
    def num_open(self) -> int:
        """The requests admitted and not ended."""
        return len(self._open)

    def counters(self) -> RouterCounters:
        """The counts now."""
        return RouterCounters(
            requests=self._requests,
            completed=self._completed,
            failed=self._failed,
            refused=self._refused,
            cancelled=self._cancelled,
            in_flight=len(self._open),
            failovers=self._failovers,
        )

    def open(self, request_id: str) -> None:
        """Admit a request, to be closed by `close`.

        OverloadedError when `max_in_flight` are open, AlreadyExistsError when this id is.
        """
        if len(self._open) >= self._max_in_flight:
            raise OverloadedError(
                f"the router has {self._max_in_flight} requests in flight, its limit; try again later"
            )
        if request_id in self._open:
            raise AlreadyExistsError(
                f"request_id: {request_id!r} is in flight already; choose another, or leave it empty"
            )
        self._open.add(request_id)
        self._requests += 1

    def refuse(self) -> None:
        """Count a request that was never admitted."""
        self._requests += 1
        self._refused += 1

    def assign(self, replica_id: ReplicaId) -> None:
        """An open request is now at this replica, to be taken back by `release`."""
        self._per_replica[replica_id] = self._per_replica.get(replica_id, 0) + 1
        self._assigned += 1

    def release(self, replica_id: ReplicaId) -> None:
        """An assigned request has left this replica."""
        left = self._per_replica[replica_id] - 1
        if left:
            self._per_replica[replica_id] = left
        else:
            del self._per_replica[replica_id]
        self._assigned -= 1

    def fail_over(self) -> None:
        """An open request goes elsewhere because its replica was lost."""
        self._failovers += 1

    def close(self, outcome: RequestOutcome) -> None:
        """An open request has ended."""
        self._open.remove(outcome.request_id)
        if outcome.status == "OK":
            self._completed += 1
        elif outcome.status == "CANCELLED":
            self._cancelled += 1
        elif outcome.attempts == 0:
            self._refused += 1
        else:
            self._failed += 1
        self._outcomes.append(outcome)
        if self._idle is not None and not self._open:
            self._idle.set()

    async def idle(self, timeout_s: float) -> bool:
        """Wait until no request is open; False when `timeout_s` pass first."""
        self._idle = asyncio.Event()
        if not self._open:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def check_invariants(self, *, idle: bool = False) -> None:
        """AssertionError unless requests are conserved; with `idle`, unless nothing is in flight."""
        ended = self._completed + self._failed + self._refused + self._cancelled
        assert self._requests == ended + len(self._open), (
            f"{self._requests} requests came, {ended} ended and {len(self._open)} are open"
        )
        assert self._assigned == sum(self._per_replica.values()), (
            f"{self._assigned} requests are assigned, replicas have {self._per_replica}"
        )
        assert self._assigned <= len(self._open), "more requests are assigned than open"
        assert all(count > 0 for count in self._per_replica.values()), f"{self._per_replica}"
        if idle:
            assert not self._open, f"idle with open requests: {sorted(self._open)}"
            assert not self._per_replica, f"idle with assigned requests: {self._per_replica}"

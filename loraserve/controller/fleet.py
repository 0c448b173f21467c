"""What the controller asks of whatever runs replicas: Ray in production, one process in tests."""

from typing import Protocol

from loraserve.config import Config
from loraserve.engines.base import AdapterFiles
from loraserve.engines.description import Fetched, ReplicaDescription, ReplicaReport, RequestReport
from loraserve.fabric.advice import CacheAdvice
from loraserve.fabric.wanted import PeerAddress
from placement.types import ReplicaId, VersionId


class ReplicaLink(Protocol):
    """A way to one replica process.

    Every call raises UnavailableError once the process is gone. A link never turns to another
    process: a replica that is started again has a new link.
    """

    async def describe(self) -> ReplicaDescription:
        """What the replica is and holds."""
        ...

    async def report(self) -> ReplicaReport:
        """Its state for operators; EngineDeadError if its engine is gone."""
        ...

    async def load_adapter(self, files: AdapterFiles, peers: tuple[PeerAddress, ...] = ()) -> Fetched | None:
        """Returns, with where the bytes came from, when the engine has acknowledged; AdapterRejectedError or
        OverloadedError if not. `peers` hold it already, the best first."""
        ...

    async def advise(self, advice: CacheAdvice) -> None:
        """Tell its fabric what the controller knows of what it caches."""
        ...

    async def unload_adapter(self, version: VersionId) -> None:
        """Returns when the copy is drained and gone."""
        ...

    async def drain(self, deadline_s: float) -> int:
        """Take no new requests, return when nothing is in flight; how many were ended at the deadline."""
        ...

    async def in_flight(self) -> tuple[RequestReport, ...]:
        """The requests in it."""
        ...

    async def move(self, request_ids: tuple[str, ...]) -> int:
        """End these requests for routers to go on with elsewhere; how many of them were there."""
        ...

    async def wait_lost(self) -> str:
        """Returns, with the reason, when the process is gone; not before."""
        ...


class Fleet(Protocol):
    """Starts, finds and ends replica processes by their ids."""

    async def start(self, replica_id: ReplicaId, config: Config) -> ReplicaLink:
        """Start the replica with this configuration and return when it is ready; ReplicaStartError with its
        log's tail."""
        ...

    async def find(self, replica_id: ReplicaId) -> ReplicaLink | None:
        """A running replica that an earlier controller started, or None."""
        ...

    async def kill(self, replica_id: ReplicaId) -> None:
        """End the replica's process and everything it started; one that is gone is no error."""
        ...

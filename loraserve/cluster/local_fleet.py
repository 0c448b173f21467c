"""Replicas inside the caller's process: the public test double of the Ray fleet.

Real replica servers with real gRPC, without processes of their own, so that a whole cluster runs in one
event loop. `lose` ends one as abruptly as one process allows.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from loraserve.config import Config
from loraserve.controller.fleet import ReplicaLink
from loraserve.engines.base import AdapterFiles, Engine
from loraserve.engines.description import Fetched, ReplicaDescription, ReplicaReport, RequestReport
from loraserve.errors import LoraServeError, ReplicaStartError, UnavailableError
from loraserve.fabric.advice import CacheAdvice
from loraserve.fabric.fabric import Fabric
from loraserve.fabric.wanted import PeerAddress
from loraserve.replica.fabric_start import open_fabric
from loraserve.replica.server import ReplicaServer
from placement.types import ReplicaId, VersionId

T = TypeVar("T")

MakeFabric = Callable[[ReplicaId, Config], Fabric | None]


def local_fabric(replica_id: ReplicaId, config: Config) -> Fabric | None:
    """The fabric that the configuration wants, on this machine alone."""
    return open_fabric(config, "127.0.0.1")


class LocalLink:
    """A link to a replica server of this process."""

    def __init__(self, server: ReplicaServer) -> None:
        self.server = server
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._calls: set[asyncio.Task[Any]] = set()

    async def describe(self) -> ReplicaDescription:
        """What the replica is and holds."""
        self._check()
        return self.server.describe()

    async def report(self) -> ReplicaReport:
        """Its state for operators."""
        self._check()
        return await self.server.report()

    async def load_adapter(self, files: AdapterFiles, peers: tuple[PeerAddress, ...] = ()) -> Fetched | None:
        """Load and acknowledge."""
        return await self._call(self.server.load_adapter(files, peers))

    async def advise(self, advice: CacheAdvice) -> None:
        """Tell its fabric what the controller knows of what it caches."""
        self._check()
        self.server.copies.advise(advice)

    async def unload_adapter(self, version: VersionId) -> None:
        """Drain and drop."""
        await self._call(self.server.unload_adapter(version))

    async def drain(self, deadline_s: float) -> int:
        """Finish what runs, take nothing new."""
        return await self._call(self.server.drain(deadline_s))

    async def in_flight(self) -> tuple[RequestReport, ...]:
        """The requests in it."""
        self._check()
        return self.server.in_flight()

    async def move(self, request_ids: tuple[str, ...]) -> int:
        """End these for routers to go on with elsewhere."""
        return await self._call(self.server.move(request_ids))

    async def wait_lost(self) -> str:
        """Returns once `LocalFleet.lose` has hit this replica."""
        return await asyncio.shield(self.lost)

    async def end(self, reason: str) -> None:
        """End the server; whoever waits for an answer of it hears why."""
        if not self.lost.done():
            self.lost.set_result(reason)
        await self.server.stop(0.0)
        for call in self._calls:
            call.cancel()

    async def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """As over Ray, the call goes on when its caller is cancelled, and fails when the replica is lost."""
        if self.lost.done():
            work.close()
            self._check()
        call = asyncio.ensure_future(work)
        self._calls.add(call)
        call.add_done_callback(self._called)
        either: set[asyncio.Future[Any]] = {call, self.lost}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        self._check()
        return call.result()

    def _called(self, call: "asyncio.Task[Any]") -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()

    def _check(self) -> None:
        if self.lost.done():
            raise UnavailableError(self.lost.result())


class LocalFleet:
    """Starts replica servers with engines from `make_engine` and fabrics from `make_fabric`, which end with
    them; the links outlive a controller."""

    def __init__(
        self,
        make_engine: Callable[[ReplicaId, Config], Engine],
        *,
        make_fabric: MakeFabric | None = None,
    ) -> None:
        self._make_fabric = make_fabric
        self.links: dict[ReplicaId, LocalLink] = {}
        self.starts: list[ReplicaId] = []
        self._starting: dict[ReplicaId, asyncio.Task[LocalLink]] = {}
        self._make_engine = make_engine

    async def start(self, replica_id: ReplicaId, config: Config) -> ReplicaLink:
        """A new server, ready; ReplicaStartError if its engine does not start."""
        await self.kill(replica_id)
        self.starts.append(replica_id)
        start = self._starting[replica_id] = asyncio.ensure_future(self._start(replica_id, config))
        await asyncio.wait({start})
        if start.cancelled():
            raise ReplicaStartError(replica_id, "it was killed")
        return start.result()

    async def _start(self, replica_id: ReplicaId, config: Config) -> LocalLink:
        fabric = None if self._make_fabric is None else self._make_fabric(replica_id, config)
        server = ReplicaServer(replica_id, config, self._make_engine(replica_id, config), fabric=fabric)
        try:
            await server.start()
        except BaseException as error:
            await server.stop(0.0)
            if isinstance(error, LoraServeError):
                raise ReplicaStartError(replica_id, str(error)) from error
            raise
        link = self.links[replica_id] = LocalLink(server)
        return link

    async def find(self, replica_id: ReplicaId) -> ReplicaLink | None:
        """A server that an earlier controller started."""
        return self.links.get(replica_id)

    async def kill(self, replica_id: ReplicaId) -> None:
        """End the server, or its start, aborting its requests."""
        start = self._starting.pop(replica_id, None)
        if start is not None and not start.done():
            start.cancel()
            await asyncio.wait({start})
        link = self.links.pop(replica_id, None)
        if link is not None:
            await link.end("it was killed")

    async def lose(self, replica_id: ReplicaId, reason: str = "it crashed") -> None:
        """What a crash looks like to the controller and to routers."""
        await self.links.pop(replica_id).end(reason)

    async def close(self) -> None:
        """End every server and check that its accounts are even."""
        for start in self._starting.values():
            start.cancel()
        await asyncio.gather(*self._starting.values(), return_exceptions=True)
        for replica_id in list(self.links):
            link = self.links.pop(replica_id)
            await link.server.stop(0.0)
            link.server.check_invariants()

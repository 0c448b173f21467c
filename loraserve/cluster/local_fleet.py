"""Replicas inside the caller's process: the public test double of the Ray fleet.

Real replica servers with real gRPC, without processes of their own, so that a whole cluster runs in one
event loop. `lose` ends one as abruptly as one process allows.
"""

import asyncio
from collections.abc import Callable

from loraserve.config import Config
from loraserve.controller.fleet import ReplicaLink
from loraserve.engines.base import AdapterFiles, Engine
from loraserve.engines.description import ReplicaDescription, ReplicaReport
from loraserve.errors import LoraServeError, ReplicaStartError, UnavailableError
from loraserve.replica.server import ReplicaServer
from placement.types import ReplicaId, VersionId


class LocalLink:
    """A link to a replica server of this process."""

    def __init__(self, server: ReplicaServer) -> None:
        self.server = server
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def describe(self) -> ReplicaDescription:
        """What the replica is and holds."""
        self._check()
        return self.server.describe()

    async def report(self) -> ReplicaReport:
        """Its state for operators."""
        self._check()
        return await self.server.report()

    async def load_adapter(self, files: AdapterFiles) -> None:
        """Load and acknowledge."""
        self._check()
        await self.server.load_adapter(files)
        self._check()

    async def unload_adapter(self, version: VersionId) -> None:
        """Drain and drop."""
        self._check()
        await self.server.unload_adapter(version)
        self._check()

    async def wait_lost(self) -> str:
        """Returns once `LocalFleet.lose` has hit this replica."""
        return await asyncio.shield(self.lost)

    def _check(self) -> None:
        if self.lost.done():
            raise UnavailableError(self.lost.result())


class LocalFleet:
    """Starts replica servers with engines from `make_engine`; the links outlive a controller."""

    def __init__(self, config: Config, make_engine: Callable[[ReplicaId], Engine]) -> None:
        self.links: dict[ReplicaId, LocalLink] = {}
        self.starts: list[ReplicaId] = []
        self._config = config
        self._make_engine = make_engine

    async def start(self, replica_id: ReplicaId) -> ReplicaLink:
        """A new server, ready; ReplicaStartError if its engine does not start."""
        self.starts.append(replica_id)
        server = ReplicaServer(replica_id, self._config, self._make_engine(replica_id))
        try:
            await server.start()
        except LoraServeError as error:
            await server.stop(0.0)
            raise ReplicaStartError(replica_id, str(error)) from error
        link = self.links[replica_id] = LocalLink(server)
        return link

    async def find(self, replica_id: ReplicaId) -> ReplicaLink | None:
        """A server that an earlier controller started."""
        return self.links.get(replica_id)

    async def kill(self, replica_id: ReplicaId) -> None:
        """End the server, aborting its requests."""
        link = self.links.pop(replica_id, None)
        if link is not None:
            await self._end(link, "it was killed")

    async def lose(self, replica_id: ReplicaId, reason: str = "it crashed") -> None:
        """What a crash looks like to the controller and to routers."""
        await self._end(self.links.pop(replica_id), reason)

    async def close(self) -> None:
        """End every server and check that its accounts are even."""
        for replica_id in list(self.links):
            link = self.links.pop(replica_id)
            await link.server.stop(0.0)
            link.server.check_invariants()

    @staticmethod
    async def _end(link: LocalLink, reason: str) -> None:
        if not link.lost.done():
            link.lost.set_result(reason)
        await link.server.stop(0.0)

"""The Ray actor of a replica: a few lines around a class that knows nothing of Ray.

The constructor is a coroutine because grpc.aio, vLLM and the like want their objects made on the loop that
uses them.
"""

import asyncio
import logging
import os
from typing import Any

from loraserve.cluster.processes import begin_actor, tail
from loraserve.config import parse_config
from loraserve.engines.base import AdapterFiles
from loraserve.engines.description import Fetched, ReplicaDescription, ReplicaReport, RequestReport
from loraserve.errors import LoraServeError, ReplicaStartError
from loraserve.fabric.advice import CacheAdvice
from loraserve.fabric.wanted import PeerAddress
from placement.types import ReplicaId, VersionId


class ReplicaActor:
    """One replica process."""

    async def __init__(  # type: ignore[misc]
        self,
        replica_id: str,
        config_tree: dict[str, Any],
        folder: str,
        *,
        host: str,
        node_id: str,
        insecure_listen: bool,
    ) -> None:
        from loraserve.engines.factory import make_engine
        from loraserve.replica.fabric_start import open_fabric
        from loraserve.replica.server import ReplicaServer

        self._log = begin_actor(folder, replica_id)
        config = parse_config(config_tree)
        self._replica_id = replica_id
        self._server = ReplicaServer(
            ReplicaId(replica_id),
            config,
            make_engine(config),
            host=host,
            node_id=node_id,
            insecure_listen=insecure_listen,
            fabric=open_fabric(config, host),
        )
        self._stopped = asyncio.Event()

    async def start(self) -> ReplicaDescription:
        """Bring the engine up; ReplicaStartError carries the tail of the log."""
        try:
            return await self._server.start()
        except Exception as error:
            logging.getLogger(__name__).exception("start failed")
            await self._server.close()
            reason = str(error) if isinstance(error, LoraServeError) else f"{type(error).__name__}: {error}"
            raise ReplicaStartError(self._replica_id, reason, tail(self._log)) from None

    async def describe(self) -> ReplicaDescription:
        """What the replica is and holds."""
        return self._server.describe()

    async def report(self) -> ReplicaReport:
        """Its state for operators."""
        return await self._server.report()

    async def load_adapter(self, files: AdapterFiles, peers: tuple[PeerAddress, ...] = ()) -> Fetched | None:
        """Load and acknowledge."""
        return await self._server.load_adapter(files, peers)

    async def advise(self, advice: CacheAdvice) -> None:
        """Tell its fabric what the controller knows of what it caches."""
        self._server.copies.advise(advice)

    async def unload_adapter(self, version: VersionId) -> None:
        """Drain and drop."""
        await self._server.unload_adapter(version)

    async def drain(self, deadline_s: float) -> int:
        """Finish what runs, take nothing new."""
        return await self._server.drain(deadline_s)

    async def in_flight(self) -> tuple[RequestReport, ...]:
        """The requests in it."""
        return self._server.in_flight()

    async def move(self, request_ids: tuple[str, ...]) -> int:
        """End these for routers to go on with elsewhere."""
        return await self._server.move(request_ids)

    async def wait_stopped(self) -> None:
        """Returns when the replica was told to stop; a caller sees the actor die before that."""
        await self._stopped.wait()

    async def pid(self) -> int:
        """The actor's process."""
        return os.getpid()

    async def stop(self, grace_s: float) -> None:
        """End the engine and the server."""
        await self._server.stop(grace_s)
        self._stopped.set()

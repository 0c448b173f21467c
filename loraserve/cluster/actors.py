"""The Ray actors: each a few lines around a class that knows nothing of Ray.

Ray runs these methods on the actor's own event loop. Constructors are coroutines because grpc.aio,
vLLM and the like want their objects made on the loop that uses them.
"""

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

from loraserve.cluster.processes import redirect_output, tail
from loraserve.config import Config, parse_config
from loraserve.engines.base import AdapterFiles
from loraserve.engines.description import ReplicaDescription, ReplicaReport
from loraserve.errors import LoraServeError, ReplicaStartError
from placement.types import ReplicaId, VersionId


def _begin(folder: str, name: str) -> Path:
    """Give the actor's process its own log file."""
    log = Path(folder) / "logs" / f"{name}.log"
    redirect_output(log)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    return log


class ReplicaActor:
    """One replica process."""

    async def __init__(  # type: ignore[misc]
        self, replica_id: str, config_tree: dict[str, Any], folder: str, insecure_listen: bool
    ) -> None:
        from loraserve.engines.factory import make_engine
        from loraserve.replica.server import ReplicaServer

        self._log = _begin(folder, replica_id)
        config = parse_config(config_tree)
        self._replica_id = replica_id
        self._server = ReplicaServer(
            ReplicaId(replica_id), config, make_engine(config), insecure_listen=insecure_listen
        )
        self._stopped = asyncio.Event()

    async def start(self) -> ReplicaDescription:
        """Bring the engine up; ReplicaStartError carries the tail of the log."""
        try:
            return await self._server.start()
        except Exception as error:
            logging.getLogger(__name__).exception("start failed")
            await self._server.engine.close()
            reason = str(error) if isinstance(error, LoraServeError) else f"{type(error).__name__}: {error}"
            raise ReplicaStartError(self._replica_id, reason, tail(self._log)) from None

    async def describe(self) -> ReplicaDescription:
        """What the replica is and holds."""
        return self._server.describe()

    async def report(self) -> ReplicaReport:
        """Its state for operators."""
        return await self._server.report()

    async def load_adapter(self, files: AdapterFiles) -> None:
        """Load and acknowledge."""
        await self._server.load_adapter(files)

    async def unload_adapter(self, version: VersionId) -> None:
        """Drain and drop."""
        await self._server.unload_adapter(version)

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


class ControllerActor:
    """The controller process. Ray starts it again when it dies; its store and the replicas survive."""

    async def __init__(  # type: ignore[misc]
        self, config_tree: dict[str, Any], folder: str, host: str, port: int, run_id: str, insecure: bool
    ) -> None:
        from loraserve.cluster.fleet import RayFleet
        from loraserve.controller.controller import Controller
        from loraserve.controller.library import open_library
        from loraserve.controller.service import add_controller_services
        from loraserve.controller.store import Store
        from loraserve.rpc import server as rpc_server

        _begin(folder, "controller")
        self._config = parse_config(config_tree)
        root = Path(folder)
        store = await asyncio.to_thread(Store, root / "controller.sqlite")
        recovering = store.begin_life(run_id, self._config.model.path)
        library = await asyncio.to_thread(open_library, root / "adapters", self._config)
        fleet = RayFleet(self._config, folder, insecure_listen=insecure)
        self._controller = Controller(
            self._config, store=store, fleet=fleet, library=library, recovering=recovering
        )
        self._server = rpc_server.make_server(max_message_bytes=self._config.router.max_message_bytes)
        health = add_controller_services(self._controller, self._server)
        self._port = rpc_server.bind(self._server, host, port, insecure_listen=insecure)
        await self._server.start()
        await health.set_serving(True)
        self._controller.start()

    async def port(self) -> int:
        """Where the gRPC services listen."""
        return self._port

    async def pid(self) -> int:
        """The actor's process."""
        return os.getpid()

    async def progress(self) -> dict[str, str]:
        """Each replica's phase."""
        return {key: record.phase.value for key, record in self._controller.state.replicas.items()}

    async def wait_ready(self, timeout_s: float) -> bool:
        """Wait for the first table and every replica; ReplicaStartError for one that did not come up."""
        try:
            await self._controller.wait_until(self._controller.is_ready, timeout_s)
        except TimeoutError:
            return False
        for error in self._controller.start_errors.values():
            raise error
        return True

    async def stop(self) -> None:
        """Stop the tasks and the services; the replicas stay."""
        await self._server.stop(0.5)
        await self._controller.stop()


class RouterActor:
    """One router process inside the Ray cluster."""

    async def __init__(  # type: ignore[misc]
        self, router_id: str, config_tree: dict[str, Any], folder: str, controller: str, insecure: bool
    ) -> None:
        from loraserve.clock import WallClock
        from loraserve.router.router import Router

        _begin(folder, router_id)
        config: Config = parse_config(config_tree)
        self._router = Router(
            config.router,
            router_id=router_id,
            controller_address=controller,
            cluster_name=config.cluster.name,
            clock=WallClock(),
            insecure_listen=insecure,
        )
        self._port = await self._router.start()

    async def port(self) -> int:
        """Where clients connect."""
        return self._port

    async def pid(self) -> int:
        """The actor's process."""
        return os.getpid()

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, give running ones `grace_s`."""
        await self._router.stop(grace_s)

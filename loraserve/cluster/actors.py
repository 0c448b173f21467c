"""The Ray actors of controller and router: each a few lines around a class that knows nothing of Ray.

Ray runs these methods on the actor's own event loop. Constructors are coroutines because grpc.aio,
vLLM and the like want their objects made on the loop that uses them.
"""

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

from loraserve.cluster.processes import begin_actor
from loraserve.config import Config, parse_config
from loraserve.errors import LoraServeError


class ControllerActor:
    """The controller process. Ray starts it again when it dies; its store and the replicas survive."""

    async def __init__(  # type: ignore[misc]
        self, config_tree: dict[str, Any], folder: str, host: str, port: int, run_id: str, insecure: bool
    ) -> None:
        import ray.util

        from loraserve.cluster.fleet import RayFleet
        from loraserve.cluster.profiles import kept_profile
        from loraserve.controller.controller import Controller
        from loraserve.controller.library import open_library
        from loraserve.controller.service import add_controller_services
        from loraserve.controller.store import Store
        from loraserve.rpc import server as rpc_server

        begin_actor(folder, "controller")
        self._config = parse_config(config_tree)
        root = Path(folder)
        try:
            store = await asyncio.to_thread(Store, root / "controller.sqlite")
            recovering = store.begin_life(run_id, self._config.model.path)
            profile = await asyncio.to_thread(kept_profile, root)
        except LoraServeError as error:
            # Ray does not start an actor again that refuses to start: routers serve on without it.
            logging.getLogger(__name__).error("the controller cannot start: %s", error)
            raise
        library = await asyncio.to_thread(open_library, root / "adapters", self._config)
        # Routers run on the controller's node.
        home = ray.util.get_node_ip_address()
        fleet = RayFleet(self._config, folder, home=home, insecure_listen=insecure)
        self._controller = Controller(
            self._config,
            store=store,
            fleet=fleet,
            library=library,
            recovering=recovering,
            profile=profile,
        )
        self._server = rpc_server.make_server(max_message_bytes=self._config.router.max_message_bytes)
        health = add_controller_services(self._controller, self._server)
        self._port = rpc_server.bind(self._server, host, port, insecure_listen=insecure)
        await self._server.start()
        await health.set_serving(True)
        if self._config.fabric.transports:
            self._controller.origin.open(home if insecure else "127.0.0.1")
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

        begin_actor(folder, router_id)
        config: Config = parse_config(config_tree)
        self._router = Router(
            config.router,
            router_id=router_id,
            controller_address=controller,
            cluster_name=config.cluster.name,
            clock=WallClock(),
            insecure_listen=insecure,
            caches_prefixes=config.engine.caches_prefixes,
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

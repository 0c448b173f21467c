"""Replicas as detached named Ray actors, which outlive the controller that started them.

Each has a placement group of its own, by which they are spread over the nodes.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

from loraserve.cluster.groups import Place, ReplicaGroups
from loraserve.cluster.names import NAMESPACE, actor_name
from loraserve.cluster.nodes import LOOPBACK, replica_need
from loraserve.cluster.processes import tail
from loraserve.cluster.replica_actor import ReplicaActor
from loraserve.config import Config, config_tree
from loraserve.controller.fleet import ReplicaLink
from loraserve.engines.base import AdapterFiles
from loraserve.engines.description import Fetched, ReplicaDescription, ReplicaReport, RequestReport
from loraserve.errors import LoraServeError, ReplicaStartError, UnavailableError, WorkFailedError
from loraserve.fabric.advice import CacheAdvice
from loraserve.fabric.wanted import PeerAddress
from placement.types import ReplicaId, VersionId

logger = logging.getLogger(__name__)

FIND_TIMEOUT_S = 10.0
MAX_PENDING_CALLS = 1000

T = TypeVar("T")


async def answer(call: Awaitable[T]) -> T:
    """A Ray call's result, its failures as our errors: UnavailableError if the process is gone."""
    import ray.exceptions

    try:
        return await call
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, LoraServeError):
            raise cause from None
        raise WorkFailedError(f"{type(cause).__name__}: {cause}") from None
    except ray.exceptions.RayActorError as error:
        raise UnavailableError(f"its process is gone: {str(error).splitlines()[0]}") from None
    except ray.exceptions.RayError as error:
        raise UnavailableError(f"Ray: {str(error).splitlines()[0]}") from None


class RayLink:
    """The controller's way to one replica actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def describe(self) -> ReplicaDescription:
        """What the replica is and holds."""
        description: ReplicaDescription = await answer(self._actor.describe.remote())
        return description

    async def report(self) -> ReplicaReport:
        """Its state for operators."""
        report: ReplicaReport = await answer(self._actor.report.remote())
        return report

    async def load_adapter(self, files: AdapterFiles, peers: tuple[PeerAddress, ...] = ()) -> Fetched | None:
        """Load and acknowledge."""
        fetched: Fetched | None = await answer(self._actor.load_adapter.remote(files, peers))
        return fetched

    async def advise(self, advice: CacheAdvice) -> None:
        """Tell its fabric what the controller knows of what it caches."""
        await answer(self._actor.advise.remote(advice))

    async def unload_adapter(self, version: VersionId) -> None:
        """Drain and drop."""
        await answer(self._actor.unload_adapter.remote(version))

    async def drain(self, deadline_s: float) -> int:
        """Finish what runs, take nothing new."""
        moved: int = await answer(self._actor.drain.remote(deadline_s))
        return moved

    async def in_flight(self) -> tuple[RequestReport, ...]:
        """The requests in it."""
        listed: tuple[RequestReport, ...] = await answer(self._actor.in_flight.remote())
        return listed

    async def move(self, request_ids: tuple[str, ...]) -> int:
        """End these for routers to go on with elsewhere."""
        moved: int = await answer(self._actor.move.remote(request_ids))
        return moved

    async def wait_lost(self) -> str:
        """Ray fails the pending call as soon as the process dies."""
        try:
            await answer(self._actor.wait_stopped.remote())
        except LoraServeError as error:
            return str(error)
        return "it was stopped"


class RayFleet:
    """Starts, finds and kills replica actors."""

    def __init__(
        self, config: Config, folder: str, *, home: str = LOOPBACK, insecure_listen: bool = False
    ) -> None:
        """`home` is the address of the node that the routers run on."""
        self._config = config
        self._folder = folder
        self._insecure_listen = insecure_listen
        self._need = replica_need(config.cluster.cpus_per_replica, config.engine.gpus_per_replica)
        self._groups = ReplicaGroups(
            config.cluster.name, self._need, home=home, insecure_listen=insecure_listen
        )

    async def start(self, replica_id: ReplicaId, config: Config) -> ReplicaLink:
        """Find a node with room, create the actor there and wait until its engine is up; ReplicaStartError
        for whatever fails, also in Ray."""
        try:
            await self.kill(replica_id)
            place = await self._groups.reserve(replica_id, self._config.cluster.room_timeout_s)
            actor = self._create(replica_id, place, config)
            await self._wait_up(replica_id, actor)
        except Exception as error:
            await self._give_up(replica_id)
            if isinstance(error, ReplicaStartError):
                raise
            raise ReplicaStartError(replica_id, f"{type(error).__name__}: {_first_line(error)}") from error
        return RayLink(actor)

    def _create(self, replica_id: ReplicaId, place: Place, config: Config) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        options: dict[str, Any] = {
            "name": actor_name(self._config.cluster.name, replica_id),
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_restarts": 0,
            "max_concurrency": MAX_PENDING_CALLS,
            "num_cpus": self._need.get("CPU", 0),
            "num_gpus": self._need.get("GPU", 0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(place.group),
        }
        listen = {"host": place.host, "node_id": place.node_id, "insecure_listen": self._insecure_listen}
        remote = ray.remote(ReplicaActor).options(**options)
        return remote.remote(replica_id, config_tree(config), self._folder, **listen)

    async def _wait_up(self, replica_id: ReplicaId, actor: Any) -> None:
        timeout_s = self._config.cluster.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await answer(actor.start.remote())
        except ReplicaStartError:
            raise
        except (LoraServeError, TimeoutError) as error:
            reason = str(error) or f"not ready within {timeout_s:.0f} s"
            log = Path(self._folder) / "logs" / f"{replica_id}.log"
            raise ReplicaStartError(replica_id, reason, tail(log)) from None

    async def _give_up(self, replica_id: ReplicaId) -> None:
        """End what a failed start has left, as far as Ray lets us: the next start does it again."""
        try:
            await self.kill(replica_id)
        except Exception as error:
            logger.warning("%s: what its start has left is still there: %s", replica_id, _first_line(error))

    async def find(self, replica_id: ReplicaId) -> ReplicaLink | None:
        """The actor of this name, if it answers."""
        actor = self._actor(replica_id)
        if actor is None:
            return None
        link = RayLink(actor)
        try:
            async with asyncio.timeout(FIND_TIMEOUT_S):
                await link.describe()
        except (LoraServeError, TimeoutError):
            return None
        return link

    async def kill(self, replica_id: ReplicaId) -> None:
        """SIGKILL the actor's process, wait until its name is free again, and give its room back."""
        import ray

        for _ in range(100):
            actor = self._actor(replica_id)
            if actor is None:
                break
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor, no_restart=True)
            await asyncio.sleep(0.05)
        await self._groups.release(replica_id)

    def _actor(self, replica_id: ReplicaId) -> Any:
        import ray

        try:
            return ray.get_actor(actor_name(self._config.cluster.name, replica_id), namespace=NAMESPACE)
        except ValueError:
            return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]

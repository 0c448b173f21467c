"""Routers in this process: the public protocol over real gRPC, answered by one emulated engine."""

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from loraserve.clock import WallClock
from loraserve.config import EmulatedSection, EngineSection, ModelSection
from loraserve.engines.base import AdapterFiles, EngineLoad
from loraserve.engines.emulated import EmulatedEngine
from loraserve.errors import AlreadyExistsError, LoraServeError, NotFoundError, UnavailableError
from loraserve.rpc.server import Health
from loraserve.rpc.status import abort_with, status_of
from loraserve.rpc.v1 import inference_pb2 as inference
from loraserve.rpc.v1 import management_pb2 as management
from loraserve.rpc.v1 import management_pb2_grpc
from placement.types import AdapterName, VersionId, version_id
from tests.support.fake_replica import FakeAnswers, FakeReplica, Pace

TRAILER = (
    ("loraserve-replica", "replica-0"),
    ("loraserve-table-version", "7"),
    ("loraserve-reason", "only holder"),
)


class FakeRouter(FakeAnswers, management_pb2_grpc.ManagementServicer):
    """Serves its engine's adapters by name; with `refusal` set it refuses every request so.

    Picks the first of `replicas` that is not excluded, and knows no Pick as long as it has none.
    """

    trailers = TRAILER

    def __init__(self, engine: EmulatedEngine, pace: Pace) -> None:
        self.adapters: dict[str, tuple[VersionId, int]] = {}
        super().__init__(engine, self.adapters, pace)
        self.refusal: LoraServeError | None = None
        self.health: Health
        self.replicas: list[FakeReplica] = []
        self.picks: list[inference.PickRequest] = []
        self.picks_many = True
        self.pick_script: deque[LoraServeError | None] = deque()

    async def wait_idle(self) -> None:
        """Return when no request runs here any more; TimeoutError and AssertionError if one leaked."""
        for one in self.replicas:
            await one.wait_idle()
        await super().wait_idle()
        assert self.engine.load() == EngineLoad(running=0, waiting=0, kv_cache_usage=0.0)
        self.engine.check_invariants()

    async def add(self, name: str, rank: int) -> VersionId:
        """Serve an adapter under this name."""
        version = version_id(AdapterName(name), "0" * 64)
        files = AdapterFiles(version_id=version, directory=Path("unused"), rank=rank, size_bytes=1)
        await self.engine.load_adapter(files)
        self.adapters[name] = (version, rank)
        return version

    def check(self, request: inference.GenerateRequest) -> None:
        """Refuse as told; a lease is not for routers."""
        assert not request.HasField("lease")
        if self.refusal is not None:
            raise self.refusal

    def add_services(self, server: grpc.aio.Server) -> None:
        """All that a router serves."""
        super().add_services(server)
        management_pb2_grpc.add_ManagementServicer_to_server(self, server)
        self.health = Health(server, ())

    async def come_back(self) -> None:
        """Listen and serve again."""
        await super().come_back()
        await self.health.set_serving(True)

    async def Pick(self, request: inference.PickRequest, context: Any) -> inference.PickResponse:  # noqa: N802
        """One choice."""
        if not self.replicas:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no Pick here")
        try:
            return self._pick(request)
        except LoraServeError as error:
            await abort_with(context, error)

    async def PickMany(  # noqa: N802
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[inference.PickManyResponse]:
        """Many choices, unless this is a router of an earlier release."""
        if not self.replicas or not self.picks_many:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        async for message in request_iterator:
            for one in message.picks:
                answer = inference.PickAnswer(id=one.id)
                try:
                    answer.picked.CopyFrom(self._pick(one.pick))
                except LoraServeError as error:
                    code, answer.message = status_of(error)
                    answer.code = code.value[0]
                yield inference.PickManyResponse(answers=[answer])

    def _pick(self, request: inference.PickRequest) -> inference.PickResponse:
        self.picks.append(request)
        failure = self.pick_script.popleft() if self.pick_script else None
        if failure is not None:
            raise failure
        free = [one for one in self.replicas if one.replica_id not in request.exclude_replicas]
        if not free:
            raise UnavailableError("no holder")
        lease = inference.Lease(
            lease_id=f"{len(self.picks)} {free[0].replica_id}",
            adapter_version=self.version(request.adapter) or "",
            table_version=7,
        )
        return inference.PickResponse(
            replica_id=free[0].replica_id, address=free[0].address, lease=lease, lease_s=5, reason="picked"
        )

    async def RegisterAdapter(  # noqa: N802
        self, request: management.RegisterAdapterRequest, context: Any
    ) -> management.RegisterAdapterResponse:
        """Any source will do; its last letters are the rank."""
        if request.name in self.adapters:
            await abort_with(context, AlreadyExistsError(f"adapter {request.name} is registered"))
        await self.add(request.name, int(request.source.rpartition("r")[2]))
        return management.RegisterAdapterResponse(adapter=self._adapter(request.name), table_version=7)

    async def SetAdapter(  # noqa: N802
        self, request: management.SetAdapterRequest, context: Any
    ) -> management.SetAdapterResponse:
        """Nothing is weighed here."""
        return management.SetAdapterResponse(adapter=self._adapter(request.name))

    async def RemoveAdapter(  # noqa: N802
        self, request: management.RemoveAdapterRequest, context: Any
    ) -> management.RemoveAdapterResponse:
        """Forget a name."""
        if request.name not in self.adapters:
            await abort_with(context, NotFoundError(f"adapter {request.name} is not registered"))
        version, _ = self.adapters.pop(request.name)
        await self.engine.unload_adapter(version)
        return management.RemoveAdapterResponse(table_version=8)

    async def ListAdapters(  # noqa: N802
        self, request: management.ListAdaptersRequest, context: Any
    ) -> management.ListAdaptersResponse:
        """All names."""
        return management.ListAdaptersResponse(adapters=[self._adapter(name) for name in self.adapters])

    async def GetStatus(  # noqa: N802
        self, request: management.GetStatusRequest, context: Any
    ) -> management.GetStatusResponse:
        """One replica, and the adapters."""
        return management.GetStatusResponse(
            cluster="fake",
            base_model="emulated",
            policy="none",
            table_version=7,
            controller_reachable=True,
            replicas=[management.Replica(replica_id="replica-0", state="ready", resident=["a@0"])],
            adapters=[self._adapter(name) for name in self.adapters],
            router=management.RouterStats(router_id="router-0", requests=len(self.requests)),
        )

    def DrainReplicas(self, request: management.DrainReplicasRequest, context: Any) -> Any:  # noqa: N802
        """The controller's work, not played here."""
        raise NotImplementedError

    def UndrainReplicas(self, request: management.UndrainReplicasRequest, context: Any) -> Any:  # noqa: N802
        """The controller's work, not played here."""
        raise NotImplementedError

    def GetPlan(self, request: management.GetPlanRequest, context: Any) -> Any:  # noqa: N802
        """The controller's work, not played here."""
        raise NotImplementedError

    def ApplyPlan(self, request: management.ApplyPlanRequest, context: Any) -> Any:  # noqa: N802
        """The controller's work, not played here."""
        raise NotImplementedError

    def FreezePlan(self, request: management.FreezePlanRequest, context: Any) -> Any:  # noqa: N802
        """The controller's work, not played here."""
        raise NotImplementedError

    def RollbackPlan(self, request: management.RollbackPlanRequest, context: Any) -> Any:  # noqa: N802
        """The controller's work, not played here."""
        raise NotImplementedError

    def _adapter(self, name: str) -> management.Adapter:
        version, rank = self.adapters[name]
        holder = management.Holder(replica_id="replica-0", share=1.0)
        return management.Adapter(name=name, version=version, rank=rank, size_bytes=1, holders=[holder])


@asynccontextmanager
async def fake_router(*, speed: float = 20.0, serving: bool = True) -> AsyncIterator[FakeRouter]:
    """A running fake; its engine's conservation laws are checked when it ends."""
    async with fake_routers(1, speed=speed, serving=serving) as (router,):
        yield router


@asynccontextmanager
async def fake_routers(
    count: int, *, replicas: int = 0, speed: float = 20.0, serving: bool = True
) -> AsyncIterator[tuple[FakeRouter, ...]]:
    """Routers of one cluster, which share one engine, their adapters and their replicas."""
    config = EngineSection(kind="emulated", max_num_seqs=256, adapter_slots=8)
    pace = Pace()
    engine = EmulatedEngine(
        config, EmulatedSection(speed=speed), ModelSection(), clock=WallClock(), sleep=pace.sleep
    )
    await engine.start()
    routers = tuple(FakeRouter(engine, pace) for _ in range(count))
    shared = [FakeReplica(f"r{index}", engine, routers[0].adapters, pace) for index in range(replicas)]
    for replica in shared:
        await replica.listen()
    for router in routers:
        router.adapters = routers[0].adapters
        router.served = routers[0].adapters
        router.replicas = shared
        await router.listen()
        await router.health.set_serving(serving)
    try:
        yield routers
        for router in routers:
            await router.wait_idle()
    finally:
        for one in (*routers, *shared):
            await one.die()
        await engine.close()

"""Stand-ins for a replica and a controller on real gRPC servers, for tests of routers and clients."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc

from loraserve.rpc.codec import PROTOCOL_VERSION
from loraserve.rpc.internal.v1 import internal_pb2, internal_pb2_grpc
from loraserve.rpc.link_server import SPARE_FRAME_BYTES, LinkServer
from loraserve.rpc.server import DEFAULT_MAX_MESSAGE_BYTES, bind, make_server
from loraserve.rpc.status import error_for
from loraserve.rpc.table_codec import encode_table
from loraserve.rpc.v1 import inference_pb2, management_pb2, management_pb2_grpc
from placement.table import RoutingTable, TableEntry, TableReplica
from placement.types import AdapterName, Holder, ReplicaId, VersionId

Context = grpc.aio.ServicerContext[Any, Any]
Script = Callable[[internal_pb2.Start], AsyncGenerator[inference_pb2.GenerateResponse, None]]


def table_of(
    version: int, replicas: dict[str, str], adapters: dict[str, tuple[str, ...]] | None = None
) -> RoutingTable:
    """A table from `{replica: address}` and `{adapter: holders}`, shares equal, versions `name@0`."""
    return RoutingTable(
        version=version,
        base_model="base",
        replicas={
            ReplicaId(name): TableReplica(replica_id=ReplicaId(name), address=address, max_lora_rank=64)
            for name, address in replicas.items()
        },
        entries={
            AdapterName(name): TableEntry(
                name=AdapterName(name),
                version_id=VersionId(f"{name}@0"),
                rank=8,
                holders=tuple(
                    Holder(replica_id=ReplicaId(holder), share=1 / len(holders)) for holder in holders
                ),
            )
            for name, holders in (adapters or {}).items()
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A request as the replica got it."""

    request: internal_pb2.Start
    generate: inference_pb2.GenerateRequest


async def three_tokens(
    start: internal_pb2.Start,
) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
    """What a fake replica answers when a test says nothing else."""
    yield inference_pb2.GenerateResponse(
        token_ids=[1], text="a", request_id=start.request_id, adapter_version=start.version_id
    )
    yield inference_pb2.GenerateResponse(token_ids=[2], text="b")
    yield inference_pb2.GenerateResponse(
        token_ids=[3], text="c", finish_reason=inference_pb2.FINISH_REASON_STOP, output_tokens=3
    )


class FakeReplica(internal_pb2_grpc.ReplicaServicer):
    """Runs `script` for every request, or refuses with `refusal`; remembers what it got.

    With `failure`, a request ends in that status after the script's messages.
    """

    def __init__(self, replica_id: str) -> None:
        self.replica_id = replica_id
        self.address = ""
        self.script: Script = three_tokens
        self.refusal: grpc.StatusCode | None = None
        self.failure: grpc.StatusCode | None = None
        self.received: list[Received] = []
        self.leases: list[internal_pb2.LeaseGrant] = []
        self.refusals: list[internal_pb2.Refusal] = []
        self.end_lease: Callable[[str], None] = lambda lease_id: None
        self.arrived = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.watched = asyncio.Event()
        self._report = internal_pb2.LoadReport(
            protocol_version=PROTOCOL_VERSION, replica_id=replica_id, incarnation="none"
        )
        self._server: grpc.aio.Server | None = None

    async def start(self, port: int = 0) -> None:
        """Listen at a port of 127.0.0.1."""
        server = make_server(max_message_bytes=DEFAULT_MAX_MESSAGE_BYTES + SPARE_FRAME_BYTES)
        internal_pb2_grpc.add_ReplicaServicer_to_server(self, server)
        self.address = f"127.0.0.1:{bind(server, '127.0.0.1', port)}"
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """End at once, as a crash would."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def report(
        self,
        *,
        sequence: int,
        running: int = 0,
        waiting: int = 0,
        incarnation: str = "first",
        starts_per_s: float = 0.0,
        ranks: Iterable[internal_pb2.RankLoad] = (),
    ) -> None:
        """What whoever is connected is told from now on."""
        self._report = internal_pb2.LoadReport(
            protocol_version=PROTOCOL_VERSION,
            replica_id=self.replica_id,
            incarnation=incarnation,
            sequence=sequence,
            running=running,
            waiting=waiting,
            starts_per_s=starts_per_s,
            ranks=ranks,
        )

    async def Connect(self, request_iterator: Any, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        """A router's link."""
        self.watched.set()
        await LinkServer(self, context, report_interval_s=0.005).serve()

    def load(self) -> internal_pb2.LoadReport:
        """What `report` was given last."""
        return self._report

    def grant(self, lease: internal_pb2.LeaseGrant, ended: Callable[[str], None]) -> None:
        """Remember the lease; `end_lease` is how a test ends it."""
        self.leases.append(lease)
        self.end_lease = ended

    def refused(self, refusal: internal_pb2.Refusal) -> None:
        """Remember the request that was turned away."""
        self.refusals.append(refusal)

    async def open(self, start: internal_pb2.Start) -> AsyncGenerator[bytes, None]:
        """The script's messages, joined for a unary request."""
        generate = inference_pb2.GenerateRequest.FromString(start.generate)
        self.received.append(Received(request=start, generate=generate))
        self.arrived.set()
        if self.refusal is not None:
            raise error_for(self.refusal, f"{self.replica_id} refuses")
        joined, text = inference_pb2.GenerateResponse(), ""
        try:
            async with aclosing(self.script(start)) as messages:
                async for message in messages:
                    if start.unary:
                        text += message.text
                        joined.MergeFrom(message)
                    else:
                        yield message.SerializeToString()
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        if self.failure is not None:
            raise error_for(self.failure, f"{self.replica_id} failed")
        if start.unary:
            joined.text = text
            yield joined.SerializeToString()


class FakeController(internal_pb2_grpc.ControlServicer, management_pb2_grpc.ManagementServicer):
    """Publishes the tables it is given and answers Management with a fixed adapter."""

    def __init__(self) -> None:
        self.address = ""
        self.watched = asyncio.Event()
        self.table: internal_pb2.RoutingTable | None = None
        self.refusal: grpc.StatusCode | None = None
        self.watch_requests: list[internal_pb2.WatchTableRequest] = []
        self.registered: list[management_pb2.RegisterAdapterRequest] = []
        self.on_register: Callable[[], int] = lambda: 0
        self._changed = asyncio.Condition()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Listen, at the same port as before if there was one."""
        server = make_server()
        internal_pb2_grpc.add_ControlServicer_to_server(self, server)
        management_pb2_grpc.add_ManagementServicer_to_server(self, server)
        port = int(self.address.rpartition(":")[2]) if self.address else 0
        self.address = f"127.0.0.1:{bind(server, '127.0.0.1', port)}"
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """End at once, as a crash would."""
        self.watched.clear()
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def publish(self, table: RoutingTable, *, protocol_version: int = PROTOCOL_VERSION) -> None:
        """Send the table to every router, now and when it connects."""
        async with self._changed:
            self.table = encode_table(table)
            self.table.protocol_version = protocol_version
            self._changed.notify_all()

    async def WatchTable(  # noqa: N802
        self, request: internal_pb2.WatchTableRequest, context: Context
    ) -> AsyncIterator[internal_pb2.RoutingTable]:
        """The present table, then every later one."""
        self.watch_requests.append(request)
        self.watched.set()
        if self.refusal is not None:
            await context.abort(self.refusal, "protocol_version: refused")
        sent: internal_pb2.RoutingTable | None = None
        while True:
            async with self._changed:
                while self.table is sent:
                    await self._changed.wait()
                sent = self.table
            if sent is not None:
                yield sent

    async def RegisterAdapter(  # noqa: N802
        self, request: management_pb2.RegisterAdapterRequest, context: Context
    ) -> management_pb2.RegisterAdapterResponse:
        """Remember the request; a source that ends in "bad" is refused."""
        self.registered.append(request)
        if request.source.endswith("bad"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "adapter_config.json: missing")
        return management_pb2.RegisterAdapterResponse(
            adapter=management_pb2.Adapter(name=request.name), table_version=self.on_register()
        )

    async def SetAdapter(  # noqa: N802
        self, request: management_pb2.SetAdapterRequest, context: Context
    ) -> management_pb2.SetAdapterResponse:
        """Always done."""
        return management_pb2.SetAdapterResponse(adapter=management_pb2.Adapter(name=request.name))

    async def RemoveAdapter(  # noqa: N802
        self, request: management_pb2.RemoveAdapterRequest, context: Context
    ) -> management_pb2.RemoveAdapterResponse:
        """Always done."""
        return management_pb2.RemoveAdapterResponse()

    async def ListAdapters(  # noqa: N802
        self, request: management_pb2.ListAdaptersRequest, context: Context
    ) -> management_pb2.ListAdaptersResponse:
        """One adapter."""
        return management_pb2.ListAdaptersResponse(adapters=[management_pb2.Adapter(name="listed")])

    async def DrainReplicas(  # noqa: N802
        self, request: management_pb2.DrainReplicasRequest, context: Context
    ) -> AsyncIterator[management_pb2.DrainProgress]:
        """Drained at once, but for "bad", which is refused."""
        if "bad" in request.replica_ids:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "replica_ids: no bad")
        yield _drains(request.replica_ids, "drained")

    async def UndrainReplicas(  # noqa: N802
        self, request: management_pb2.UndrainReplicasRequest, context: Context
    ) -> AsyncIterator[management_pb2.DrainProgress]:
        """Ready at once."""
        yield _drains(request.replica_ids, "ready")

    async def GetPlan(  # noqa: N802
        self, request: management_pb2.GetPlanRequest, context: Context
    ) -> management_pb2.GetPlanResponse:
        """No plan."""
        return management_pb2.GetPlanResponse()

    async def ApplyPlan(  # noqa: N802
        self, request: management_pb2.ApplyPlanRequest, context: Context
    ) -> management_pb2.PlanChanged:
        """Nothing changed."""
        return management_pb2.PlanChanged()

    async def FreezePlan(  # noqa: N802
        self, request: management_pb2.FreezePlanRequest, context: Context
    ) -> management_pb2.PlanChanged:
        """Nothing changed."""
        return management_pb2.PlanChanged()

    async def RollbackPlan(  # noqa: N802
        self, request: management_pb2.RollbackPlanRequest, context: Context
    ) -> management_pb2.PlanChanged:
        """Nothing changed."""
        return management_pb2.PlanChanged()

    async def GetStatus(  # noqa: N802
        self, request: management_pb2.GetStatusRequest, context: Context
    ) -> management_pb2.GetStatusResponse:
        """A status that tells the controller's answer from the router's own."""
        return management_pb2.GetStatusResponse(cluster="from-the-controller", policy="least-loaded")


def _drains(replica_ids: Iterable[str], state: str) -> management_pb2.DrainProgress:
    replicas = [management_pb2.ReplicaDrain(replica_id=one, state=state) for one in replica_ids]
    return management_pb2.DrainProgress(replicas=replicas)

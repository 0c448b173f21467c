"""`loraserve.v1.Management` in a router: the controller answers, the router passes it on.

Status alone is answered without the controller, from the router's last table and load reports.
"""

from collections.abc import AsyncIterator
from typing import Any, TypeVar

import grpc

from loraserve.errors import DeadlineError, LoraServeError, UnavailableError
from loraserve.router.leases import LeaseCounter
from loraserve.router.ledger import Ledger
from loraserve.router.loads import LoadBook
from loraserve.router.tables import TableFollower
from loraserve.rpc.plan_codec import encode_holder
from loraserve.rpc.status import abort_with, error_of
from loraserve.rpc.v1 import management_pb2, management_pb2_grpc
from placement.table import RoutingTable

SERVICE = "loraserve.v1.Management"
STATUS_TIMEOUT_S = 2.0
TABLE_WAIT_S = 5.0
"""How long the answer to a change is held back until this router's table shows the change."""

Context = grpc.aio.ServicerContext[Any, Any]
Request = TypeVar("Request")
Response = TypeVar("Response")


class ManagementService(management_pb2_grpc.ManagementServicer):
    """Forwards every method to the controller's own Management service."""

    def __init__(
        self,
        *,
        controller_address: str,
        channel: grpc.aio.Channel,
        tables: TableFollower,
        default_deadline_s: float,
        local_status: "LocalStatus",
    ) -> None:
        self._controller_address = controller_address
        self._controller: management_pb2_grpc.ManagementAsyncStub = management_pb2_grpc.ManagementStub(
            channel
        )
        self._tables = tables
        self._default_deadline_s = default_deadline_s
        self._local_status = local_status

    async def RegisterAdapter(
        self, request: management_pb2.RegisterAdapterRequest, context: Context
    ) -> management_pb2.RegisterAdapterResponse:
        """Forwarded; answered once this router can route to the adapter."""
        answer = await self._forward(self._controller.RegisterAdapter, request, context)
        await self._tables.reached(answer.table_version, TABLE_WAIT_S)
        return answer

    async def SetAdapter(
        self, request: management_pb2.SetAdapterRequest, context: Context
    ) -> management_pb2.SetAdapterResponse:
        """Forwarded."""
        return await self._forward(self._controller.SetAdapter, request, context)

    async def RemoveAdapter(
        self, request: management_pb2.RemoveAdapterRequest, context: Context
    ) -> management_pb2.RemoveAdapterResponse:
        """Forwarded; answered once this router no longer routes to the adapter."""
        answer = await self._forward(self._controller.RemoveAdapter, request, context)
        await self._tables.reached(answer.table_version, TABLE_WAIT_S)
        return answer

    async def ListAdapters(
        self, request: management_pb2.ListAdaptersRequest, context: Context
    ) -> management_pb2.ListAdaptersResponse:
        """Forwarded."""
        return await self._forward(self._controller.ListAdapters, request, context)

    async def GetStatus(
        self, request: management_pb2.GetStatusRequest, context: Context
    ) -> management_pb2.GetStatusResponse:
        """The controller's answer, or the last table's while it is away, with this router's counters."""
        try:
            answer = await self._controller.GetStatus(request, timeout=STATUS_TIMEOUT_S)
            answer.controller_reachable = True
        except grpc.aio.AioRpcError as error:
            if not isinstance(error_of(error), UnavailableError | DeadlineError):
                await abort_with(context, error_of(error))
            answer = self._local_status.from_table(self._tables.table)
        answer.router.CopyFrom(self._local_status.router())
        return answer

    async def DrainReplicas(
        self, request: management_pb2.DrainReplicasRequest, context: Context
    ) -> AsyncIterator[management_pb2.DrainProgress]:
        """Forwarded."""
        async for message in self._forward_stream(self._controller.DrainReplicas, request, context):
            yield message

    async def UndrainReplicas(
        self, request: management_pb2.UndrainReplicasRequest, context: Context
    ) -> AsyncIterator[management_pb2.DrainProgress]:
        """Forwarded."""
        async for message in self._forward_stream(self._controller.UndrainReplicas, request, context):
            yield message

    async def GetPlan(
        self, request: management_pb2.GetPlanRequest, context: Context
    ) -> management_pb2.GetPlanResponse:
        """Forwarded."""
        return await self._forward(self._controller.GetPlan, request, context)

    async def ApplyPlan(
        self, request: management_pb2.ApplyPlanRequest, context: Context
    ) -> management_pb2.PlanChanged:
        """Forwarded."""
        return await self._forward(self._controller.ApplyPlan, request, context)

    async def FreezePlan(
        self, request: management_pb2.FreezePlanRequest, context: Context
    ) -> management_pb2.PlanChanged:
        """Forwarded."""
        return await self._forward(self._controller.FreezePlan, request, context)

    async def RollbackPlan(
        self, request: management_pb2.RollbackPlanRequest, context: Context
    ) -> management_pb2.PlanChanged:
        """Forwarded."""
        return await self._forward(self._controller.RollbackPlan, request, context)

    async def _forward_stream(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[Request, Response],
        request: Request,
        context: Context,
    ) -> AsyncIterator[Response]:
        remaining_s: float | None = context.time_remaining()
        try:
            async for message in method(
                request, timeout=self._default_deadline_s if remaining_s is None else remaining_s
            ):
                yield message
        except grpc.aio.AioRpcError as rpc_error:
            await abort_with(context, self._explained(error_of(rpc_error)))

    async def _forward(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        context: Context,
    ) -> Response:
        remaining_s: float | None = context.time_remaining()
        try:
            return await method(
                request, timeout=self._default_deadline_s if remaining_s is None else remaining_s
            )
        except grpc.aio.AioRpcError as rpc_error:
            await abort_with(context, self._explained(error_of(rpc_error)))

    def _explained(self, error: LoraServeError) -> LoraServeError:
        if not isinstance(error, UnavailableError):
            return error
        return UnavailableError(
            f"the controller at {self._controller_address} cannot be reached ({error});"
            " requests are still served, adapters cannot be changed or listed until it is back"
        )


class LocalStatus:
    """What a router can say of the cluster by itself."""

    def __init__(
        self,
        *,
        router_id: str,
        cluster_name: str,
        loads: LoadBook,
        ledger: Ledger,
        leases: LeaseCounter,
    ) -> None:
        self._router_id = router_id
        self._cluster_name = cluster_name
        self._loads = loads
        self._ledger = ledger
        self._leases = leases

    def router(self) -> management_pb2.RouterStats:
        """The router's own counters."""
        counters = self._ledger.counters()
        return management_pb2.RouterStats(
            router_id=self._router_id,
            requests=counters.requests,
            completed=counters.completed,
            failed=counters.failed,
            refused=counters.refused,
            cancelled=counters.cancelled,
            in_flight=counters.in_flight,
            picks=self._leases.issued,
            failovers=counters.failovers,
        )

    def from_table(self, table: RoutingTable) -> management_pb2.GetStatusResponse:
        """The cluster as the last table shows it; what only the controller knows is left empty."""
        loads = self._loads.view().loads
        answer = management_pb2.GetStatusResponse(
            cluster=self._cluster_name,
            base_model=table.base_model,
            table_version=table.version,
            controller_reachable=False,
        )
        for replica in table.replicas.values():
            load = loads.get(replica.replica_id)
            answer.replicas.add(
                replica_id=replica.replica_id,
                state="ready",
                address=replica.address,
                max_lora_rank=replica.max_lora_rank,
                running=load.running if load else 0,
                waiting=load.waiting if load else 0,
                kv_cache_usage=load.kv_cache_usage if load else 0.0,
            )
        for entry in table.entries.values():
            answer.adapters.add(
                name=entry.name,
                version=entry.version_id,
                rank=entry.rank,
                holders=[encode_holder(holder) for holder in entry.holders],
            )
        return answer

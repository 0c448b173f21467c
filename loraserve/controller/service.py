"""The controller's gRPC services: adapters and status for operators, routing tables for routers."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import grpc

from loraserve.controller import drains, plans, terms
from loraserve.controller.controller import Controller
from loraserve.engines.description import FabricTotals
from loraserve.errors import LoraServeError, WorkFailedError
from loraserve.rpc import server as rpc_server
from loraserve.rpc.codec import check_protocol
from loraserve.rpc.internal.v1 import internal_pb2, internal_pb2_grpc
from loraserve.rpc.plan_codec import decode_plan, encode_holder, encode_skew
from loraserve.rpc.status import abort_with
from loraserve.rpc.table_codec import encode_table
from loraserve.rpc.v1 import management_pb2, management_pb2_grpc
from placement.cluster.records import DrainOrder, ReplicaRecord
from placement.plans.skew import ReplicaUse, skew_of, uses_of
from placement.types import AdapterName, AdapterTerms, ReplicaId, VersionId

logger = logging.getLogger(__name__)

TABLE_POLL_S = 3600.0
PROGRESS_S = 0.5
REMOVE_TIMEOUT_S = 30.0

Answer = TypeVar("Answer")


class ControlService(internal_pb2_grpc.ControlServicer):
    """Gives every router the present table and each one after it."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def WatchTable(
        self, request: internal_pb2.WatchTableRequest, context: Any
    ) -> AsyncIterator[internal_pb2.RoutingTable]:
        """Stream tables until the router goes away; none before table 1."""
        try:
            check_protocol(request.protocol_version, f"router {request.router_id}")
        except LoraServeError as error:
            await abort_with(context, error)
        controller, sent = self._controller, 0

        def is_newer() -> bool:
            return controller.table.version > sent

        while True:
            if is_newer():
                table = controller.table
                sent = table.version
                yield encode_table(table)
            with contextlib.suppress(TimeoutError):
                await self._controller.wait_until(is_newer, TABLE_POLL_S)


class ManagementService(management_pb2_grpc.ManagementServicer):
    """Registration, removal, listing and status."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def RegisterAdapter(
        self, request: management_pb2.RegisterAdapterRequest, context: Any
    ) -> management_pb2.RegisterAdapterResponse:
        """Register; a client that hangs up does not interrupt a registration that has begun."""
        work = asyncio.ensure_future(terms.register(self._controller, request))
        try:
            version = await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(_log_outcome)
            raise
        except Exception as error:
            await abort_with(context, error)
        return management_pb2.RegisterAdapterResponse(
            adapter=self._adapter(version), table_version=self._controller.table.version
        )

    async def SetAdapter(
        self, request: management_pb2.SetAdapterRequest, context: Any
    ) -> management_pb2.SetAdapterResponse:
        """Change what is wanted of an adapter."""
        try:
            version = terms.set_terms(self._controller, request)
        except LoraServeError as error:
            await abort_with(context, error)
        return management_pb2.SetAdapterResponse(adapter=self._adapter(version))

    async def RemoveAdapter(
        self, request: management_pb2.RemoveAdapterRequest, context: Any
    ) -> management_pb2.RemoveAdapterResponse:
        """Remove the name; answered once a table without it is out."""
        controller = self._controller
        try:
            controller.remove(request.name)
            await self._out_of_table(request.name)
        except LoraServeError as error:
            await abort_with(context, error)
        return management_pb2.RemoveAdapterResponse(table_version=controller.table.version)

    async def _out_of_table(self, name: str) -> None:
        controller = self._controller
        try:
            await controller.wait_until(
                lambda: AdapterName(name) not in controller.table.entries or name in controller.state.active,
                REMOVE_TIMEOUT_S,
            )
        except TimeoutError:
            raise WorkFailedError(
                f"adapter {name} is removed, but routers still have it: {controller.problem}"
            ) from None

    async def ListAdapters(
        self, request: management_pb2.ListAdaptersRequest, context: Any
    ) -> management_pb2.ListAdaptersResponse:
        """Every registered name with its newest version."""
        return management_pb2.ListAdaptersResponse(adapters=self._adapters())

    async def GetStatus(
        self, request: management_pb2.GetStatusRequest, context: Any
    ) -> management_pb2.GetStatusResponse:
        """The cluster as the controller sees it."""
        controller = self._controller
        await controller.refresh_reports()
        state = controller.state
        snapshot = state.snapshot()
        uses = uses_of(snapshot, state.plan)
        problems = (controller.problem, state.book.problem)
        return management_pb2.GetStatusResponse(
            cluster=controller.config.cluster.name,
            base_model=controller.config.model.path,
            policy=controller.config.placement.policy,
            table_version=controller.table.version,
            problems=[problem for problem in problems if problem is not None],
            replicas=[
                self._replica(record, uses.get(record.replica_id)) for record in state.replicas.values()
            ],
            adapters=self._adapters(),
            controller_reachable=True,
            plan_frozen=state.book.frozen is not None,
            skew=encode_skew(skew_of(snapshot, state.plan)),
        )

    async def DrainReplicas(
        self, request: management_pb2.DrainReplicasRequest, context: Any
    ) -> AsyncIterator[management_pb2.DrainProgress]:
        """Drain; a client that hangs up does not stop it."""
        try:
            replicas = drains.select(self._controller, request.replica_ids, request.node_id)
            default_s = self._controller.config.replica.drain_timeout_s
            deadline_s = request.deadline_s if request.HasField("deadline_s") else default_s
            order = DrainOrder(deadline_s=deadline_s, force=request.force)
            drains.begin_drain(self._controller, replicas, order)
            async for message in self._progress(replicas, drains.drain_is_done):
                yield message
        except LoraServeError as error:
            await abort_with(context, error)

    async def UndrainReplicas(
        self, request: management_pb2.UndrainReplicasRequest, context: Any
    ) -> AsyncIterator[management_pb2.DrainProgress]:
        """Take drains back; a client that hangs up does not stop it."""
        try:
            replicas = drains.select(self._controller, request.replica_ids, request.node_id)
            drains.begin_undrain(self._controller, replicas)
            async for message in self._progress(replicas, drains.undrain_is_done):
                yield message
        except LoraServeError as error:
            await abort_with(context, error)

    async def GetPlan(
        self, request: management_pb2.GetPlanRequest, context: Any
    ) -> management_pb2.GetPlanResponse:
        """The plan in force, and the policy's."""
        return await self._plan(lambda: plans.show_plan(self._controller, propose=request.propose), context)

    async def ApplyPlan(
        self, request: management_pb2.ApplyPlanRequest, context: Any
    ) -> management_pb2.PlanChanged:
        """Adopt a plan; copies follow."""
        given = decode_plan(request.plan) if request.HasField("plan") else None
        return await self._plan(lambda: plans.apply_plan(self._controller, given), context)

    async def FreezePlan(
        self, request: management_pb2.FreezePlanRequest, context: Any
    ) -> management_pb2.PlanChanged:
        """Freeze or unfreeze."""
        return await self._plan(lambda: plans.freeze_plan(self._controller, frozen=request.frozen), context)

    async def RollbackPlan(
        self, request: management_pb2.RollbackPlanRequest, context: Any
    ) -> management_pb2.PlanChanged:
        """Back to the plan before."""
        return await self._plan(lambda: plans.roll_back_plan(self._controller), context)

    async def _plan(self, act: Callable[[], Answer], context: Any) -> Answer:
        try:
            return act()
        except LoraServeError as error:
            await abort_with(context, error)

    async def _progress(
        self, replicas: Sequence[ReplicaId], is_done: Callable[[Controller, Sequence[ReplicaId]], bool]
    ) -> AsyncIterator[management_pb2.DrainProgress]:
        """Each news of these replicas, the last one included."""
        controller = self._controller
        sent = management_pb2.DrainProgress()
        while True:
            done = is_done(controller, replicas)
            message = drains.progress(controller, replicas)
            if message != sent:
                yield message
            if done:
                return
            sent = message

            def has_news(known: management_pb2.DrainProgress = sent) -> bool:
                return drains.progress(controller, replicas) != known

            # How many requests run changes without an event.
            with contextlib.suppress(TimeoutError):
                await controller.wait_until(has_news, PROGRESS_S)

    def _adapters(self) -> list[management_pb2.Adapter]:
        return [self._adapter(version) for _, version in sorted(self._controller.state.active.items())]

    def _adapter(self, version: VersionId) -> management_pb2.Adapter:
        registration = self._controller.registrations[version]
        adapter = registration.adapter
        entry = self._controller.table.entries.get(adapter.name)
        holders = entry.holders if entry is not None and entry.version_id == version else ()
        wanted = self._controller.state.terms.get(adapter.name, AdapterTerms())
        slo = wanted.slo or terms.usual_slo(self._controller)
        service = self._controller.demand.service
        total, recent = service.total(version), service.recent(version)
        return management_pb2.Adapter(
            name=adapter.name,
            version=version,
            rank=adapter.rank,
            size_bytes=adapter.size_bytes,
            sha256=adapter.sha256,
            source=registration.source,
            target_modules=registration.target_modules,
            holders=[encode_holder(holder) for holder in holders],
            demand_tokens_per_s=self._controller.demand.measured.get(version, 0.0),
            forecast_tokens_per_s=self._controller.state.demand_tokens_per_s.get(version, 0.0),
            recent_requests=recent.requests,
            recent_in_slo=recent.in_slo,
            recent_cold_misses=recent.cold_misses,
            requests=total.requests,
            in_slo=total.in_slo,
            cold_misses=total.cold_misses,
            weight=wanted.weight,
            slo_ttft_ms=slo.ttft_ms,
            slo_tbt_ms=slo.tbt_ms,
            has_own_slo=wanted.slo is not None,
        )

    def _replica(self, record: ReplicaRecord, use: ReplicaUse | None) -> management_pb2.Replica:
        controller, replica = self._controller, record.replica_id
        message = management_pb2.Replica(
            replica_id=replica,
            state=record.phase.value,
            address=record.address,
            resident=controller.copies(replica),
            restarts=record.restarts,
            pid=controller.keeper.pids.get(replica, 0),
            reason=record.reason,
        )
        if record.spec is not None:
            message.node_id = record.spec.node_id
            message.max_lora_rank = record.spec.max_lora_rank
            message.pool_adapters = record.spec.pool_adapters
            message.pool_bytes = record.spec.pool_bytes
            profile = controller.state.profiles.get(record.spec.profile)
            message.profile = "" if profile is None else profile.name
        adapters = controller.state.adapters
        ranks = (adapters[one].rank for one in controller.copies(replica) if one in adapters)
        message.highest_resident_rank = max(ranks, default=0)
        if use is not None:
            message.demand_tokens_per_s = use.demand_tokens_per_s
            message.utilisation = use.utilisation
            message.operating_point_tokens_per_s = use.operating_point_tokens_per_s or 0.0
        if (engine := controller.engines.get(replica)) is not None:
            message.engine = engine.kind
            message.adapter_slots = engine.adapter_slots
        if (report := controller.reports.get(replica)) is not None:
            message.running = report.running
            message.waiting = report.waiting
            message.kv_cache_usage = report.kv_cache_usage
            message.resident_bytes = report.resident_bytes
            message.active_adapters = report.slots.active
            message.slot_allocated_bytes = report.slots.allocated_bytes
            message.slot_used_bytes = report.slots.used_bytes
            message.slot_padded_bytes = report.slots.padded_bytes
            message.fabric.CopyFrom(_fabric(report.fabric))
        return message


def _fabric(totals: FabricTotals) -> management_pb2.Fabric:
    return management_pb2.Fabric(
        sources=[
            management_pb2.FabricSource(
                source=source,
                loads=loads,
                bytes=totals.bytes.get(source, 0),
                seconds=totals.seconds.get(source, 0.0),
            )
            for source, loads in sorted(totals.loads.items())
        ],
        failures=totals.failures,
        cached_bytes=totals.cached_bytes,
        open_breakers=totals.open_breakers,
    )


def _log_outcome(work: "asyncio.Future[VersionId]") -> None:
    if not work.cancelled() and (error := work.exception()) is not None:
        logger.warning("a registration whose client hung up failed: %s", error)


def add_controller_services(controller: Controller, server: grpc.aio.Server) -> rpc_server.Health:
    """Register the controller's services; the caller binds and starts the server."""
    management_pb2_grpc.add_ManagementServicer_to_server(ManagementService(controller), server)
    internal_pb2_grpc.add_ControlServicer_to_server(ControlService(controller), server)
    return rpc_server.Health(server, ("loraserve.v1.Management", "loraserve.internal.v1.Control"))

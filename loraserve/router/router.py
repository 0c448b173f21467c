"""The router: a gRPC server, a routing table kept current, connections to the replicas.

Stateless but for what is in flight, so that any number of them can stand side by side. Knows
nothing of Ray; runs on whatever loop starts it.
"""

import asyncio
import logging
import secrets
from dataclasses import dataclass
from random import Random

import grpc

from loraserve.clock import Clock, WallClock
from loraserve.config import RouterSection
from loraserve.errors import ConfigError
from loraserve.router.ahead import Ahead
from loraserve.router.choice import Choice
from loraserve.router.leases import LeaseCounter
from loraserve.router.ledger import Ledger, RequestOutcome, RouterCounters
from loraserve.router.loads import LoadBook
from loraserve.router.own import OwnBook
from loraserve.router.peers import Peers
from loraserve.router.service_inference import SERVICE as INFERENCE
from loraserve.router.service_inference import InferenceParts, InferenceService
from loraserve.router.service_management import SERVICE as MANAGEMENT
from loraserve.router.service_management import LocalStatus, ManagementService
from loraserve.router.service_oip import SERVICE as OPEN_INFERENCE
from loraserve.router.service_oip import OpenInferenceService
from loraserve.router.service_picks import PickHandlers
from loraserve.router.tables import TableFollower
from loraserve.rpc.oip import open_inference_pb2_grpc
from loraserve.rpc.server import Health, add_reflection, bind, make_channel, make_server
from loraserve.rpc.v1 import management_pb2_grpc
from placement.routing.chooser import Chooser
from placement.table import RoutingTable

logger = logging.getLogger(__name__)

SERVICES = (INFERENCE, MANAGEMENT, OPEN_INFERENCE)
SPARE_RPCS = 256
"""Calls beyond `max_in_flight` that get a proper refusal instead of gRPC's own: health, status, ..."""

FLUSH_S = 0.2
"""What answers already given have to reach their clients when the server stops."""


class Router:
    """One router: `start`, serve, `stop`.

    Guarantees: every admitted request is counted once and holds nothing after its end; at most
    `config.max_in_flight` are admitted. Without a controller it serves on the last table it saw.
    """

    def __init__(
        self,
        config: RouterSection,
        *,
        router_id: str,
        controller_address: str,
        cluster_name: str,
        clock: Clock | None = None,
        insecure_listen: bool = False,
        run_id: str | None = None,
        caches_prefixes: bool = False,
    ) -> None:
        """`run_id` sets this run's request ids apart from those of any other, random by default. With
        `caches_prefixes`, as the replicas' engines do, prompts that begin alike are routed alike, by a policy
        that weighs it."""
        self._config = config
        self._router_id = router_id
        self._controller_address = controller_address
        self._cluster_name = cluster_name
        self._clock = clock or WallClock()
        self._insecure_listen = insecure_listen
        self._caches_prefixes = caches_prefixes
        self._run_id = run_id or secrets.token_hex(4)
        self._rng = Random(f"{router_id}/{self._run_id}")
        self._ledger = Ledger(max_in_flight=config.max_in_flight)
        try:
            self._chooser = Chooser(config.routing, self._rng.getrandbits(64))
        except ValueError as error:
            raise ConfigError(f"router.{error}") from error
        ahead = Ahead(lambda replica_id: self._chooser.prepare(replica_id, self._loads.last_view))
        self._own = OwnBook(ahead.note if self._chooser.prepares else None)
        self._leases = LeaseCounter(
            prefix=f"{router_id}-{self._run_id}-", lease_s=config.lease_s, clock=self._clock, own=self._own
        )
        self._loads = LoadBook(
            clock=self._clock,
            in_flight=self._ledger.in_flight,
            leased=self._leases.per_replica,
            own=self._own,
            max_waiting=config.max_waiting_per_replica,
        )
        self._running: _Running | None = None

    @property
    def table(self) -> RoutingTable:
        """The routing table in use; version 0 before the first one."""
        return self._running.tables.table if self._running else RoutingTable()

    @property
    def serving(self) -> bool:
        """What `grpc.health.v1` answers."""
        return self._running is not None and self._running.health.serving

    @property
    def counters(self) -> RouterCounters:
        """Requests by how they ended."""
        return self._ledger.counters()

    @property
    def outcomes(self) -> tuple[RequestOutcome, ...]:
        """The last requests that ended, oldest first."""
        return self._ledger.outcomes

    @property
    def loads(self) -> LoadBook:
        """The replicas' load as this router sees it."""
        return self._loads

    def check_invariants(self, *, idle: bool = False) -> None:
        """AssertionError unless requests are conserved; with `idle`, unless nothing is in flight."""
        self._ledger.check_invariants(idle=idle)
        self._leases.check_invariants()
        self._own.check_invariants(self._ledger.in_flight, self._leases.per_replica)

    async def start(self) -> int:
        """Listen, begin to follow the controller, and return the port.

        BadInputError for a host or port that cannot be listened at. Serving begins, as health shows,
        with the first table that lists a replica.
        """
        server = make_server(
            max_message_bytes=self._config.max_message_bytes,
            max_concurrent_rpcs=self._config.max_in_flight + SPARE_RPCS,
        )
        port = bind(server, self._config.host, self._config.port, insecure_listen=self._insecure_listen)
        running = self._assemble(server)
        self._running = running
        await running.health.set_serving(False)
        await server.start()
        running.follower = asyncio.create_task(running.tables.run(), name="routing table")
        logger.info("router %s listens at %s:%d", self._router_id, self._config.host, port)
        return port

    async def stop(self, grace_s: float) -> None:
        """Refuse what is new, give what runs `grace_s` seconds to end, cancel the rest. Safe twice."""
        running, self._running = self._running, None
        if running is None:
            return
        running.inference.stop_admitting()
        await running.health.enter_shutdown()
        if not await self._ledger.idle(grace_s):
            running.inference.end_all("the router is stopping; use another one")
        await running.server.stop(FLUSH_S)
        if running.follower is not None:
            running.follower.cancel()
            await asyncio.wait([running.follower])
        await running.peers.close()
        await running.controller.close()

    async def wait_stopped(self) -> None:
        """Return when the server has stopped."""
        if self._running is not None:
            await self._running.server.wait_for_termination()

    def _assemble(self, server: grpc.aio.Server) -> "_Running":
        config = self._config
        health = Health(server, SERVICES)
        controller = make_channel(self._controller_address, max_message_bytes=config.max_message_bytes)
        peers = Peers(
            router_id=self._router_id,
            loads=self._loads,
            max_message_bytes=config.max_message_bytes,
            rng=self._rng,
            on_leases_ended=self._leases.ended,
        )
        tables = TableFollower(
            router_id=self._router_id, channel=controller, rng=self._rng, on_change=self._adopt_table
        )
        inference = self._add_inference(server, peers, tables)
        management = ManagementService(
            controller_address=self._controller_address,
            channel=controller,
            tables=tables,
            default_deadline_s=config.default_deadline_s,
            local_status=LocalStatus(
                router_id=self._router_id,
                cluster_name=self._cluster_name,
                loads=self._loads,
                ledger=self._ledger,
                leases=self._leases,
            ),
        )
        management_pb2_grpc.add_ManagementServicer_to_server(management, server)
        open_inference = OpenInferenceService(
            inference, table=lambda: tables.table, serving=lambda: health.serving
        )
        open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(open_inference, server)
        add_reflection(server, SERVICES)
        return _Running(server, health, controller, peers, tables, inference)

    def _add_inference(
        self, server: grpc.aio.Server, peers: Peers, tables: TableFollower
    ) -> InferenceService:
        config = self._config
        choice = Choice(
            clock=self._clock,
            loads=self._loads,
            leases=self._leases,
            peers=peers,
            tables=tables,
            chooser=self._chooser,
            holder_wait_s=config.holder_wait_s,
            early_refusal=config.early_refusal,
            wants_prefix=self._caches_prefixes and self._chooser.wants_prefix,
        )
        picks = PickHandlers(
            router_id=self._router_id,
            clock=self._clock,
            choice=choice,
            peers=peers,
            leases=self._leases,
            default_deadline_s=config.default_deadline_s,
        )
        parts = InferenceParts(
            router_id=self._router_id,
            run_id=self._run_id,
            clock=self._clock,
            ledger=self._ledger,
            own=self._own,
            peers=peers,
            choice=choice,
            default_deadline_s=config.default_deadline_s,
        )
        inference = InferenceService(parts, picks)
        server.add_generic_rpc_handlers((inference.handler(),))
        return inference

    async def _adopt_table(self) -> None:
        running = self._running
        if running is None:
            return
        running.peers.update(running.tables.table.replicas)
        serving = running.tables.compatible and bool(running.tables.table.replicas)
        if serving != running.health.serving:
            await running.health.set_serving(serving)


@dataclass
class _Running:
    """What exists between `start` and `stop`."""

    server: grpc.aio.Server
    health: Health
    controller: grpc.aio.Channel
    peers: Peers
    tables: TableFollower
    inference: InferenceService
    follower: asyncio.Task[None] | None = None

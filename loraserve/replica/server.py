"""The replica: one engine, its adapter pool and its gRPC server.

Control (load, unload, describe, report) comes as method calls from the shell around it; requests come
over gRPC. A request pins its adapter from before the engine sees it until its last token.
"""

import asyncio
import logging
import os
import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing, contextmanager

import grpc

from loraserve.clock import Clock, WallClock
from loraserve.config import Config
from loraserve.engines.base import AdapterFiles, Engine, EngineInfo
from loraserve.engines.description import (
    Fetched,
    ReplicaDescription,
    ReplicaReport,
    RequestReport,
)
from loraserve.errors import (
    AlreadyExistsError,
    OverloadedError,
    SupersededError,
    UnavailableError,
)
from loraserve.fabric.fabric import Fabric
from loraserve.fabric.wanted import PeerAddress
from loraserve.replica.fabric_view import place_of, totals_of
from loraserve.replica.in_flight import FIRST_TURN, InFlight, Turn
from loraserve.replica.leases import LeaseBook
from loraserve.replica.listing import listed
from loraserve.replica.loading import Copies
from loraserve.replica.meter import Meter
from loraserve.replica.pool import AdapterPool, Residency
from loraserve.replica.served import RequestService, ServiceCounts
from loraserve.replica.tokens import TokenCounts
from loraserve.request import FinishReason, GenerationRequest, GenerationStep
from loraserve.rpc import server as rpc_server
from loraserve.rpc.link_server import SPARE_FRAME_BYTES
from loraserve.rpc.table_codec import LoadReport
from placement.profile import Slo
from placement.types import NodeId, ReplicaId, ReplicaSpec, VersionId

logger = logging.getLogger(__name__)

ABORT_TIMEOUT_S = 5.0
"""What requests that a drain has ended get to let go."""

STALLED_S = 1.0
"""How long a request that was aborted in the engine may take to tell its reader."""

SUPERSEDE_TIMEOUT_S = 10.0
"""How long a request waits for the earlier attempt that it ends to let go."""


class ReplicaServer:
    """Owns the engine's life and every request's accounting; `start` once, `stop` once."""

    def __init__(
        self,
        replica_id: ReplicaId,
        config: Config,
        engine: Engine,
        *,
        host: str = "127.0.0.1",
        node_id: str = "local",
        insecure_listen: bool = False,
        clock: Clock | None = None,
        fabric: Fabric | None = None,
    ) -> None:
        self.replica_id = replica_id
        self.incarnation = uuid.uuid4().hex
        self.config = config
        self.engine = engine
        self.fabric = fabric
        self.pool = AdapterPool(
            max_adapters=config.engine.max_held_adapters, capacity_bytes=config.engine.pool_bytes
        )
        clock = clock or WallClock()
        self.leases = LeaseBook(self.pool, clock)
        self.meter = Meter(clock)
        self.tokens = TokenCounts(clock)
        self.service = ServiceCounts(clock, Slo(ttft_ms=config.slo.ttft_ms, tbt_ms=config.slo.tbt_ms))
        self.routers = 0
        self._host = host
        self._node_id = NodeId(node_id)
        self._insecure_listen = insecure_listen
        self._in_flight: dict[str, InFlight] = {}
        self._info: EngineInfo | None = None
        self._address = ""
        self._sequence = 0
        self._num_reports = 0
        self._server: grpc.aio.Server | None = None
        self._draining = False
        self.copies = Copies(
            replica_id,
            pool=self.pool,
            engine=engine,
            fabric=fabric,
            max_lora_rank=config.engine.max_lora_rank,
            max_bytes=config.adapters.max_size_bytes,
            drain_timeout_s=config.replica.drain_timeout_s,
            end_running=self._end_running,
        )

    async def start(self) -> ReplicaDescription:
        """Bring the engine up, then listen on a port that the system picks."""
        from loraserve.replica.service import add_replica_service

        self._info = await self.engine.start()
        if self.fabric is not None and self._info.shares_processors:
            self.fabric.give_way_while(lambda: bool(self._in_flight))
        max_bytes = self.config.router.max_message_bytes + SPARE_FRAME_BYTES
        server = rpc_server.make_server(max_message_bytes=max_bytes)
        health = add_replica_service(self, server)
        port = rpc_server.bind(server, self._host, 0, insecure_listen=self._insecure_listen)
        await server.start()
        self._server = server
        await health.set_serving(True)
        self._address = f"{self._host}:{port}"
        return self.describe()

    def describe(self) -> ReplicaDescription:
        """What this replica is and holds now."""
        if self._info is None:
            raise UnavailableError(f"replica {self.replica_id} has not started")
        spec = ReplicaSpec(
            replica_id=self.replica_id,
            max_lora_rank=self._info.max_lora_rank,
            pool_adapters=min(self._info.pool_adapters, self.pool.max_adapters),
            pool_bytes=self.pool.capacity_bytes,
            node_id=self._node_id,
        )
        resident = self.pool.resident()
        return ReplicaDescription(
            spec=spec,
            address=self._address,
            resident=resident,
            engine=self._info,
            pid=os.getpid(),
            incarnation=self.incarnation,
            loading=self.pool.versions(Residency.LOADING),
            dropping=self.pool.versions(Residency.DRAINING),
            draining=self._draining,
            tokens=self.tokens.totals(resident),
            fabric=place_of(self.fabric),
        )

    async def load_adapter(self, files: AdapterFiles, peers: tuple[PeerAddress, ...] = ()) -> Fetched | None:
        """Make the version usable, with its bytes from one of the peers if they come from there; a resident
        one is no error, a refusal or a cancellation leaves nothing behind."""
        self.service.set_slo(files.version_id, files.slo)
        return await self.copies.load(files, peers)

    async def unload_adapter(self, version: VersionId) -> None:
        """Take no new requests for the version, let running ones end, then free it: see `Copies.unload`."""
        await self.copies.unload(version)

    async def report(self) -> ReplicaReport:
        """The state for operators; EngineDeadError if the engine is gone."""
        await self.engine.check()
        load = self.engine.load()
        resident = self.pool.resident()
        self._num_reports += 1
        return ReplicaReport(
            running=load.running,
            waiting=load.waiting,
            kv_cache_usage=load.kv_cache_usage,
            resident=resident,
            resident_bytes=self.pool.used_bytes,
            slots=self.engine.slot_memory(),
            incarnation=self.incarnation,
            sequence=self._num_reports,
            tokens=self.tokens.totals(resident),
            service=self.service.totals(resident),
            fabric=totals_of(self.fabric),
        )

    def load_report(self) -> LoadReport:
        """The next load report for routers."""
        self._sequence += 1
        load = self.engine.load()
        return LoadReport(
            replica_id=self.replica_id,
            incarnation=self.incarnation,
            sequence=self._sequence,
            running=load.running,
            waiting=load.waiting,
            outstanding_tokens=sum(entry.remaining_tokens for entry in self._in_flight.values()),
            kv_cache_usage=load.kv_cache_usage,
            routers=self.routers,
            ranks=self.meter.ranks.loads(),
            **self.meter.rates(running=load.running, waiting=load.waiting)._asdict(),
        )

    async def generate(
        self, request: GenerationRequest, turn: Turn = FIRST_TURN
    ) -> AsyncGenerator[GenerationStep, None]:
        """Run one request from admission to its last token; closing the iterator releases all it held.

        SupersededError once a later attempt at it has come, AlreadyExistsError if one runs already.
        """
        if turn.lease_id:
            turn = self.leases.turn(turn)
        await self._supersede(request.request_id, turn)
        # The engine lets go of the request before its pin does.
        with (
            self._admitted(request, turn) as accounted,
            self.meter.begin(self.pool.rank(request.version_id), request.prompt) as progress,
            self.tokens.begin(request) as tokens,
            self._served(request, turn) as served,
        ):
            try:
                async with aclosing(self.engine.generate(request)) as steps:
                    async for step in steps:
                        if step.finish_reason is FinishReason.ABORTED:
                            raise _drained(request.request_id, self.replica_id)
                        accounted.remaining_tokens = max(0, request.sampling.max_tokens - step.output_tokens)
                        progress.step(len(step.token_ids))
                        tokens.step(step)
                        served.step(step)
                        if step.finish_reason is not None:
                            progress.finish(step.output_tokens)
                        yield step
            except asyncio.CancelledError:
                if accounted.verdict is None or accounted.task is None:
                    raise
                accounted.task.uncancel()
                raise accounted.verdict from None

    def _served(self, request: GenerationRequest, turn: Turn) -> RequestService:
        version = request.version_id
        is_cold = turn.has_missed or (version is not None and not self.engine.is_active(version))
        return self.service.begin(request, waited_s=turn.waited_s, is_cold=is_cold)

    async def _supersede(self, request_id: str, turn: Turn) -> None:
        """End the earlier attempts at this request that run here, and wait until they have let go."""
        # In a loop: another attempt may have waited for the same one and have been admitted meanwhile.
        while (earlier := self._in_flight.get(request_id)) is not None:
            if turn.order <= earlier.order or earlier.task is None:
                raise AlreadyExistsError(f"request_id: {request_id} is in flight; choose another")
            earlier.end(SupersededError(f"request {request_id}: a later attempt has taken over"))
            try:
                async with asyncio.timeout(SUPERSEDE_TIMEOUT_S):
                    await earlier.released.wait()
            except TimeoutError:
                raise UnavailableError(
                    f"request {request_id}: its earlier attempt did not end within {SUPERSEDE_TIMEOUT_S:g} s"
                ) from None

    async def drain(self, deadline_s: float) -> int:
        """Take no new requests, but for those that were leased, and wait until nothing is in flight.

        After `deadline_s` what still runs ends with UnavailableError, for routers to go on with elsewhere;
        returns how many those were. It cannot be taken back, and may be repeated.
        """
        self._draining = True
        try:
            async with asyncio.timeout(deadline_s):
                await self._wait_idle()
            return 0
        except TimeoutError:
            left = sorted(self._in_flight)
        logger.warning("%d requests outlast the drain of replica %s", len(left), self.replica_id)
        await self._end_running(left)
        return len(left)

    def in_flight(self) -> tuple[RequestReport, ...]:
        """The requests that are here now, in their order."""
        entries = self._in_flight.values()
        return tuple(listed(one.request, one.remaining_tokens, one.order) for one in entries)

    async def move(self, request_ids: Iterable[str]) -> int:
        """End these requests with UnavailableError, for routers to go on with elsewhere; how many of them
        were here."""
        here = [request_id for request_id in request_ids if request_id in self._in_flight]
        await self._end_running(here)
        return len(here)

    async def _end_running(self, request_ids: Iterable[str]) -> None:
        """End these requests with UnavailableError: in the engine, then those whose readers stand still."""
        entries = [entry for one in sorted(request_ids) if (entry := self._in_flight.get(one)) is not None]
        for entry in entries:
            await self.engine.abort(entry.request.request_id)
        for patience_s in (STALLED_S, ABORT_TIMEOUT_S):
            waits = [asyncio.ensure_future(entry.released.wait()) for entry in entries]
            if waits:
                _, late = await asyncio.wait(waits, timeout=patience_s)
                for wait in late:
                    wait.cancel()
            entries = [entry for entry in entries if not entry.released.is_set()]
            for entry in entries:
                entry.end(_drained(entry.request.request_id, self.replica_id))

    async def _wait_idle(self) -> None:
        while self._in_flight or self.leases.num_open:
            for entry in list(self._in_flight.values()):
                await entry.released.wait()
            await self.leases.wait_none()

    @contextmanager
    def _admitted(self, request: GenerationRequest, turn: Turn) -> Iterator[InFlight]:
        if request.request_id in self._in_flight:
            raise AlreadyExistsError(f"request_id: {request.request_id} is in flight; choose another")
        if len(self._in_flight) >= self.config.replica.max_in_flight:
            raise OverloadedError(f"replica {self.replica_id} has {len(self._in_flight)} requests, its limit")
        promised = bool(turn.lease_id) and self.leases.is_open(turn.lease_id)
        if self._draining and not promised:
            raise UnavailableError(f"replica {self.replica_id} is draining; choose another")
        with self.pool.pinned(request.version_id, request.request_id, promised=promised):
            if turn.lease_id:
                self.leases.use(turn.lease_id)
            accounted = InFlight(
                request=request,
                remaining_tokens=request.sampling.max_tokens,
                order=turn.order,
                task=asyncio.current_task(),
            )
            self._in_flight[request.request_id] = accounted
            try:
                yield accounted
            finally:
                del self._in_flight[request.request_id]
                accounted.released.set()

    def check_invariants(self, *, idle: bool = False) -> None:
        """AssertionError unless pins, adapters and bytes add up; when idle, also if any request is left."""
        if idle and self._in_flight:
            raise AssertionError(f"still in flight: {sorted(self._in_flight)}")
        self.pool.check_invariants(frozenset(self._in_flight) | self.leases.ids())

    async def stop(self, grace_s: float = 1.0) -> None:
        """Stop listening, give running requests `grace_s`, end the engine."""
        if self._server is not None:
            await self._server.stop(grace_s)
        await self.close()

    async def close(self) -> None:
        """End the engine, then what its adapters lie in."""
        await self.copies.stop()
        await self.engine.close()
        if self.fabric is not None:
            await self.fabric.close()


def _drained(request_id: str, replica_id: ReplicaId) -> UnavailableError:
    return UnavailableError(f"request {request_id} was ended by replica {replica_id} while draining")

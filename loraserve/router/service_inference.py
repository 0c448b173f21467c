"""`loraserve.v1.Inference` in a router: admit, choose, forward, pass the answer on as it comes.

The client's bytes are parsed once, to be checked and routed; the replica gets the same bytes, and
its messages go back unread.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count

import grpc
from google.protobuf.message import DecodeError

from loraserve.clock import Clock
from loraserve.errors import (
    BadInputError,
    DeadlineError,
    LoraServeError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from loraserve.router.flight import Flight
from loraserve.router.ledger import Ledger
from loraserve.router.loads import LoadBook
from loraserve.router.peers import Peer, Peers
from loraserve.router.tables import TableFollower
from loraserve.rpc.codec import validate_generate
from loraserve.rpc.status import abort_with, status_of
from loraserve.rpc.v1 import inference_pb2
from placement.routing import (
    Chooser,
    Decision,
    HoldersFullError,
    NoHolderError,
    RouteRequest,
    RoutingError,
    UnknownAdapterError,
)

SERVICE = "loraserve.v1.Inference"
MAX_RETRIES = 2
STALE_WAIT_S = 0.5
"""How long a request waits for the table that must be on its way when every holder calls ours stale."""

RETRIED_CODES = frozenset(
    {
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
"""What a replica answers before it has done anything for a request: another one may take it."""

Context = grpc.aio.ServicerContext[bytes, bytes]
Relay = Callable[[Flight, Peer, float, Context], Awaitable[bytes | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceParts:
    """What the service works with; the router owns all of it."""

    router_id: str
    run_id: str
    clock: Clock
    ledger: Ledger
    loads: LoadBook
    peers: Peers
    tables: TableFollower
    chooser: Chooser
    default_deadline_s: float


class InferenceService:
    """The two methods of the service, as handlers of raw bytes."""

    def __init__(self, parts: InferenceParts) -> None:
        self._parts = parts
        self._serial = count(1)
        self._id_prefix = f"{parts.router_id}-{parts.run_id}-"
        self.stopping = False

    def handler(self) -> grpc.GenericRpcHandler:
        """The handler to add to a server. Messages stay bytes on both sides."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Generate": grpc.unary_stream_rpc_method_handler(self.generate),
                "Complete": grpc.unary_unary_rpc_method_handler(self.complete),
            },
        )

    async def generate(self, body: bytes, context: Context) -> None:
        """Pass the replica's messages on one by one."""
        await self._serve(body, context, self._relay_stream)

    async def complete(self, body: bytes, context: Context) -> bytes:
        """Pass the replica's one message on."""
        return await self._serve(body, context, self._relay_unary) or b""

    async def _serve(self, body: bytes, context: Context, relay: Relay) -> bytes | None:
        try:
            flight = self._admit(body, context)
        except LoraServeError as error:
            self._parts.ledger.refuse()
            await abort_with(context, error)
        try:
            answer = await self._attempts(flight, context, relay)
            flight.code = grpc.StatusCode.OK
        except asyncio.CancelledError:
            out_of_time = self._parts.clock.now_s() >= flight.deadline_s
            flight.code = grpc.StatusCode.DEADLINE_EXCEEDED if out_of_time else grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.AioRpcError as error:
            flight.code = error.code()
            await context.abort(error.code(), error.details() or "", self._trailers(flight))
        except Exception as error:
            # A client that went away fails the write before its cancellation arrives.
            gone = context.done() or context.cancelled()
            flight.code = grpc.StatusCode.CANCELLED if gone else status_of(error)[0]
            await abort_with(context, error, self._trailers(flight))
        finally:
            self._parts.ledger.close(flight.outcome(self._parts.clock.now_s()))
        context.set_trailing_metadata(self._trailers(flight))
        return answer

    def _admit(self, body: bytes, context: Context) -> Flight:
        parts = self._parts
        if self.stopping:
            raise UnavailableError("the router is stopping; use another one")
        try:
            message = inference_pb2.GenerateRequest.FromString(body)
        except DecodeError:
            raise BadInputError("the request is not a loraserve.v1.GenerateRequest") from None
        validate_generate(message)
        remaining_s: float | None = context.time_remaining()
        if remaining_s is None:
            remaining_s = parts.default_deadline_s
        if remaining_s <= 0:
            raise DeadlineError("the deadline passed before the request was read")
        now_s = parts.clock.now_s()
        flight = Flight(
            request_id=message.request_id or f"{self._id_prefix}{next(self._serial)}",
            adapter=message.adapter,
            body=body,
            started_s=now_s,
            deadline_s=now_s + remaining_s,
        )
        parts.ledger.open(flight.request_id)
        return flight

    async def _attempts(self, flight: Flight, context: Context, relay: Relay) -> bytes | None:
        """Forward to one holder after another until one takes the request, at most 1 + MAX_RETRIES."""
        while True:
            try:
                decision = self._choose(flight)
            except NoHolderError as error:
                decision = await self._choose_later(flight, error)
            try:
                return await self._forward(flight, decision, context, relay)
            except grpc.aio.AioRpcError as error:
                code = error.code()
                if flight.messages or code not in RETRIED_CODES:
                    raise
                flight.refusals.append(code)
                if self._parts.tables.table.version == decision.table_version:
                    flight.excluded |= {decision.replica_id}
                if flight.attempts > MAX_RETRIES:
                    raise _all_refused(flight, error.details() or code.name) from error

    def _choose(self, flight: Flight) -> Decision:
        parts = self._parts
        table = parts.tables.table
        if table.version == 0:
            raise UnavailableError("the router has no routing table yet; try again later")
        request = RouteRequest(adapter=flight.adapter, exclude=flight.excluded)
        try:
            decision = parts.chooser.choose(request, table, parts.loads.view())
        except UnknownAdapterError as error:
            raise NotFoundError(f"adapter: {error}") from error
        except HoldersFullError as error:
            raise OverloadedError(f"{error}; try again later") from error
        flight.decision = decision
        return decision

    async def _choose_later(self, flight: Flight, error: RoutingError) -> Decision:
        """Choose by the next table, if a holder has said that the present one is out of date."""
        parts = self._parts
        if grpc.StatusCode.FAILED_PRECONDITION in flight.refusals:
            wait_s = min(STALE_WAIT_S, flight.deadline_s - parts.clock.now_s())
            if await parts.tables.reached(parts.tables.table.version + 1, wait_s):
                flight.excluded = frozenset()
                try:
                    return self._choose(flight)
                except NoHolderError as later:
                    error = later
        raise _all_refused(flight, str(error))

    async def _forward(
        self, flight: Flight, decision: Decision, context: Context, relay: Relay
    ) -> bytes | None:
        parts = self._parts
        remaining_s = flight.deadline_s - parts.clock.now_s()
        if remaining_s <= 0:
            raise DeadlineError("the deadline passed before a replica took the request")
        peer = parts.peers.take(decision.replica_id)
        parts.ledger.assign(decision.replica_id)
        flight.attempts += 1
        try:
            return await relay(flight, peer, remaining_s, context)
        finally:
            parts.ledger.release(decision.replica_id)
            parts.peers.give_back(peer)

    async def _relay_stream(self, flight: Flight, peer: Peer, remaining_s: float, context: Context) -> None:
        call = peer.execute(flight.execute_bytes(), timeout=remaining_s)
        write = context.write
        try:
            async for message in call:
                if not flight.messages:
                    flight.first_message_s = self._parts.clock.now_s()
                flight.messages += 1
                await write(message)
        finally:
            # Ends the replica's work when the client has gone; nothing when the call is over.
            call.cancel()

    async def _relay_unary(self, flight: Flight, peer: Peer, remaining_s: float, context: Context) -> bytes:
        answer = await peer.execute_unary(flight.execute_bytes(), timeout=remaining_s)
        flight.messages = 1
        flight.first_message_s = self._parts.clock.now_s()
        return answer

    def _trailers(self, flight: Flight) -> tuple[tuple[str, str], ...]:
        """Who decided what, for the client's records."""
        decision = flight.decision
        if decision is None:
            return (("loraserve-router", self._parts.router_id),)
        return (
            ("loraserve-router", self._parts.router_id),
            ("loraserve-replica", decision.replica_id),
            ("loraserve-table-version", str(decision.table_version)),
            ("loraserve-reason", decision.reason),
        )


def _all_refused(flight: Flight, why: str) -> LoraServeError:
    """Full if every holder that was asked is full; else nobody can serve this now."""
    if flight.refusals and set(flight.refusals) == {grpc.StatusCode.RESOURCE_EXHAUSTED}:
        return OverloadedError(f"every holder is full: {why}")
    return UnavailableError(why)

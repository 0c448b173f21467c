"""`loraserve.v1.Inference` in a router: admit, choose, forward, pass the answer on as it comes.

The client's bytes are parsed once, to be checked and routed; the replica gets the same bytes, and
its messages go back unread.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from typing import NoReturn

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
from loraserve.rpc.status import status_of
from loraserve.rpc.v1 import inference_pb2
from placement.routing import (
    Chooser,
    Decision,
    HoldersFullError,
    NoHolderError,
    RouteRequest,
    UnknownAdapterError,
)

logger = logging.getLogger(__name__)

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
Relay = Callable[[Flight, Peer, Context], Awaitable[bytes | None]]


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
        """One request from its bytes to its status. One coroutine on purpose: each further one on
        this path costs every request and every message."""
        flight: Flight | None = None
        try:
            flight = self._admit(body, context)
            while True:
                peer = self._take_peer(flight) or await self._take_peer_later(flight)
                try:
                    answer = await relay(flight, peer, context)
                except grpc.aio.AioRpcError as error:
                    self._note_refusal(flight, error)
                else:
                    flight.code = grpc.StatusCode.OK
                    context.set_trailing_metadata(self._trailers(flight))
                    return answer
                finally:
                    self._parts.ledger.release(peer.replica_id)
                    self._parts.peers.give_back(peer)
        except asyncio.CancelledError:
            if flight is not None:
                late = self._parts.clock.now_s() >= flight.deadline_s
                flight.code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.AioRpcError as error:
            await self._abort(flight, context, error.code(), error.details() or "")
        except Exception as error:
            code, message = status_of(error)
            if code is grpc.StatusCode.INTERNAL:
                logger.error("a request failed: %s", error, exc_info=error)
            await self._abort(flight, context, code, message)
        finally:
            if flight is None:
                self._parts.ledger.refuse()
            else:
                self._parts.ledger.close(flight.outcome(self._parts.clock.now_s()))

    async def _abort(
        self, flight: Flight | None, context: Context, code: grpc.StatusCode, message: str
    ) -> NoReturn:
        if flight is None:
            await context.abort(code, message)
        # A client that went away fails the write to it before its cancellation arrives.
        gone = context.done() or context.cancelled()
        flight.code = grpc.StatusCode.CANCELLED if gone else code
        await context.abort(code, message, self._trailers(flight))

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

    def _take_peer(self, flight: Flight) -> Peer | None:
        """The connection to the chosen holder, counted as in use; None when no holder is left."""
        try:
            decision = self._choose(flight)
        except NoHolderError:
            return None
        return self._send_to(flight, decision)

    async def _take_peer_later(self, flight: Flight) -> Peer:
        """Choose by the next table, if a holder has said that the present one is out of date."""
        parts = self._parts
        if grpc.StatusCode.FAILED_PRECONDITION in flight.refusals:
            wait_s = min(STALE_WAIT_S, flight.deadline_s - parts.clock.now_s())
            if await parts.tables.reached(parts.tables.table.version + 1, wait_s):
                flight.excluded = frozenset()
        try:
            return self._send_to(flight, self._choose(flight))
        except NoHolderError as error:
            raise _all_refused(flight, str(error)) from error

    def _send_to(self, flight: Flight, decision: Decision) -> Peer:
        parts = self._parts
        flight.remaining_s = flight.deadline_s - parts.clock.now_s()
        if flight.remaining_s <= 0:
            raise DeadlineError("the deadline passed before a replica took the request")
        peer = parts.peers.take(decision.replica_id)
        parts.ledger.assign(decision.replica_id)
        flight.attempts += 1
        return peer

    def _note_refusal(self, flight: Flight, error: grpc.aio.AioRpcError) -> None:
        """Return if another holder may be asked, else raise what the client gets."""
        code = error.code()
        decision = flight.decision
        if decision is None or flight.messages or code not in RETRIED_CODES:
            raise error
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

    async def _relay_stream(self, flight: Flight, peer: Peer, context: Context) -> None:
        call = peer.execute(flight.execute_bytes(), timeout=flight.remaining_s)
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

    async def _relay_unary(self, flight: Flight, peer: Peer, context: Context) -> bytes:
        answer = await peer.execute_unary(flight.execute_bytes(), timeout=flight.remaining_s)
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

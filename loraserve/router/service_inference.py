"""`loraserve.v1.Inference` in a router: admit, choose, forward, pass the answer on as it comes.

The client's bytes are parsed once, to be checked and routed; the replica gets the same bytes, and
its messages go back unread. A replica that is lost does not end its requests: they go on elsewhere
from what their clients have.
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
    AlreadyExistsError,
    BadInputError,
    DeadlineError,
    OverloadedError,
    UnavailableError,
)
from loraserve.request import SamplingParams
from loraserve.router.choice import Choice, check_deadline
from loraserve.router.flight import Flight
from loraserve.router.ledger import Ledger
from loraserve.router.own import OwnBook
from loraserve.router.peers import Peer, Peers
from loraserve.router.service_picks import PickHandlers
from loraserve.rpc.codec import prompt_length, validate_generate
from loraserve.rpc.link_client import StreamEndedError
from loraserve.rpc.prefix import prefix_blocks
from loraserve.rpc.status import status_of
from loraserve.rpc.v1 import inference_pb2

logger = logging.getLogger(__name__)

SERVICE = "loraserve.v1.Inference"
DEFAULT_MAX_TOKENS = SamplingParams().max_tokens
MAX_RETRIES = 2
MAX_LOSSES = 16
"""How often one request goes elsewhere because a replica was lost; its deadline bounds it as well."""

SUPERSEDE_TIMEOUT_S = 10.0

RETRIED_CODES = frozenset(
    {
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
"""What another replica may do better."""

Context = grpc.aio.ServicerContext[bytes, bytes]
Relay = Callable[[Flight, Peer, Context], Awaitable[bytes | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceParts:
    """What the service works with; the router owns all of it."""

    router_id: str
    run_id: str
    clock: Clock
    ledger: Ledger
    own: OwnBook
    peers: Peers
    choice: Choice
    default_deadline_s: float


class InferenceService:
    """The methods of the service, as handlers of raw bytes."""

    def __init__(self, parts: InferenceParts, picks: PickHandlers) -> None:
        self._parts = parts
        self._serial = count(1)
        self._id_prefix = f"{parts.router_id}-{parts.run_id}-"
        self._flights: dict[str, Flight] = {}
        self._picks = picks
        self.stopping = False

    def handler(self) -> grpc.GenericRpcHandler:
        """The handler to add to a server. Messages stay bytes on both sides."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Generate": grpc.unary_stream_rpc_method_handler(self.generate),
                "Complete": grpc.unary_unary_rpc_method_handler(self.complete),
                "Pick": grpc.unary_unary_rpc_method_handler(self._picks.pick),
                "PickMany": grpc.stream_stream_rpc_method_handler(self._picks.pick_many),
            },
        )

    async def generate(self, body: bytes, context: Context) -> None:
        """Pass the replica's messages on one by one."""
        await self._serve(body, context, self._relay_stream)

    async def complete(self, body: bytes, context: Context) -> bytes:
        """Pass the replica's one message on."""
        return await self._serve(body, context, self._relay_unary) or b""

    def stop_admitting(self) -> None:
        """Refuse what is new."""
        self.stopping = self._picks.stopping = True

    def end_all(self, message: str) -> None:
        """End what still runs with UNAVAILABLE, so that clients go on through another router."""
        for flight in list(self._flights.values()):
            flight.end(grpc.StatusCode.UNAVAILABLE, message)

    # -- one request -----------------------------------------------------------------------------

    async def _serve(self, body: bytes, context: Context, relay: Relay) -> bytes | None:
        """One request from its bytes to its status. One coroutine on purpose: each further one on
        this path costs every request and every message."""
        flight: Flight | None = None
        try:
            admitted = self._parse(body, context)
            while admitted.request_id in self._flights:
                await self._supersede(admitted)
            self._admit(admitted, context)
            flight = admitted
            while True:
                decision = self._parts.choice.now(flight) or await self._parts.choice.later(flight)
                check_deadline(flight, self._parts.clock.now_s())
                peer = self._parts.peers.take(decision.replica_id)
                self._parts.ledger.assign(decision.replica_id)
                own = self._parts.own
                own.at(decision.replica_id).send(decision.version_id, decision.rank, flight.prompt_tokens)
                flight.attempts += 1
                flight.earlier_messages = flight.messages
                try:
                    answer = await relay(flight, peer, context)
                except StreamEndedError as error:
                    answer = None
                    if self._goes_on(flight, error):
                        continue
                finally:
                    self._parts.ledger.release(peer.replica_id)
                    own.at(decision.replica_id).end(decision.version_id, decision.rank)
                    self._parts.peers.give_back(peer)
                flight.code = grpc.StatusCode.OK
                context.set_trailing_metadata(self._trailers(flight))
                return answer
        except asyncio.CancelledError:
            if flight is not None and flight.verdict is not None and flight.task is not None:
                flight.task.uncancel()
                await self._abort(flight, context, *flight.verdict)
            if flight is not None:
                late = self._parts.clock.now_s() >= flight.deadline_s
                flight.code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            raise
        except StreamEndedError as error:
            await self._abort(flight, context, error.code, str(error))
        except Exception as error:
            code, message = status_of(error)
            if code is grpc.StatusCode.INTERNAL:
                logger.error("a request failed: %s", error, exc_info=error)
            await self._abort(flight, context, code, message)
        finally:
            if flight is None:
                self._parts.ledger.refuse()
            else:
                self._close(flight)

    def _parse(self, body: bytes, context: Context) -> Flight:
        parts = self._parts
        if self.stopping:
            raise UnavailableError("the router is stopping; use another one")
        try:
            message = inference_pb2.GenerateRequest.FromString(body)
        except DecodeError:
            raise BadInputError("the request is not a loraserve.v1.GenerateRequest") from None
        validate_generate(message)
        if message.HasField("lease"):
            raise BadInputError("lease: for requests to a replica; leave it out when asking a router")
        now_s = parts.clock.now_s()
        given_s: float | None = context.time_remaining()
        remaining_s = parts.default_deadline_s if given_s is None else given_s
        if remaining_s <= 0:
            raise DeadlineError("the deadline passed before the request was read")
        flight = Flight(
            request_id=message.idempotency_key
            or message.request_id
            or f"{self._id_prefix}{next(self._serial)}",
            adapter=message.adapter,
            body=body,
            started_s=now_s,
            deadline_s=now_s + remaining_s,
        )
        flight.attempt = message.attempt
        flight.max_tokens = message.sampling.max_tokens or DEFAULT_MAX_TOKENS
        flight.prompt_tokens = prompt_length(message)
        if parts.choice.wants_prefix:
            flight.prefix = prefix_blocks(message)
        flight.task = asyncio.current_task()
        if message.HasField("resume"):
            flight.pinned_version = message.resume.adapter_version
        if message.sampling.HasField("logprobs"):
            flight.sent = None
        return flight

    def _admit(self, flight: Flight, context: Context) -> None:
        """Open the request, to be closed by `_close`."""
        try:
            self._parts.ledger.open(flight.request_id)
        except OverloadedError:
            self._parts.choice.count_refusal(flight)
            raise
        self._flights[flight.request_id] = flight
        if context.time_remaining() is None:
            # A client's own deadline ends the call by itself.
            left_s = max(0.0, flight.deadline_s - self._parts.clock.now_s())
            flight.timer = asyncio.get_running_loop().call_later(left_s, _expire, flight)

    async def _supersede(self, flight: Flight) -> None:
        """End the earlier attempt at this request and wait until it has let go."""
        earlier = self._flights[flight.request_id]
        if flight.attempt <= earlier.attempt:
            raise AlreadyExistsError(
                f"request_id: {flight.request_id!r} is in flight already; choose another, or leave it empty"
            )
        earlier.closed = earlier.closed or asyncio.Event()
        earlier.end(grpc.StatusCode.ABORTED, "a later attempt at this request has taken over")
        try:
            async with asyncio.timeout(SUPERSEDE_TIMEOUT_S):
                await earlier.closed.wait()
        except TimeoutError:
            raise UnavailableError("the earlier attempt at this request does not end; try again") from None

    def _goes_on(self, flight: Flight, error: StreamEndedError) -> bool:
        """Whether the request is to be sent elsewhere (True), or is complete after all (False); raises
        what the client gets when it is neither."""
        code, decision = error.code, flight.decision
        if decision is None or code not in RETRIED_CODES:
            raise error
        # What this attempt has sent; one that goes on elsewhere may be refused there like a new one.
        if flight.messages > flight.earlier_messages and code is not grpc.StatusCode.UNAVAILABLE:
            raise error
        if flight.messages and code is grpc.StatusCode.UNAVAILABLE:
            if flight.note_loss():
                return False
            if (obstacle := flight.obstacle()) is not None:
                tokens = len(flight.resumed_ids) or flight.messages
                raise UnavailableError(f"{error}; {tokens} tokens were sent, and {obstacle}") from error
            flight.pinned_version = decision.version_id or ""
        flight.refusals.append(code)
        if self._parts.choice.tables.table.version == decision.table_version:
            flight.excluded |= {decision.replica_id}
            flight.excluded_at = decision.table_version
        if code is grpc.StatusCode.UNAVAILABLE:
            flight.losses += 1
            self._parts.ledger.fail_over()
            if flight.losses > MAX_LOSSES:
                raise error
        elif len(flight.refusals) - flight.losses > (MAX_LOSSES if flight.messages else MAX_RETRIES):
            if set(flight.refusals) == {grpc.StatusCode.RESOURCE_EXHAUSTED}:
                self._parts.choice.count_refusal(flight)
                raise OverloadedError(f"every holder is full: {error}") from error
            raise UnavailableError(str(error)) from error
        return True

    async def _relay_stream(self, flight: Flight, peer: Peer, context: Context) -> None:
        stream = peer.link.start(flight.start(unary=False))
        read, write, sent = stream.read, context.write, flight.sent
        try:
            while (message := await read()) is not None:
                if not flight.messages:
                    flight.first_message_s = self._parts.clock.now_s()
                flight.messages += 1
                if sent is not None:
                    sent += message
                await write(message)
        finally:
            # Ends the replica's work when the client has gone; nothing when the stream is over.
            stream.close()

    async def _relay_unary(self, flight: Flight, peer: Peer, context: Context) -> bytes:
        stream = peer.link.start(flight.start(unary=True))
        try:
            answer = await stream.read()
        finally:
            stream.close()
        if answer is None:
            raise UnavailableError(f"replica {peer.replica_id} ended the request without an answer")
        flight.messages = 1
        flight.first_message_s = self._parts.clock.now_s()
        return answer

    def _close(self, flight: Flight) -> None:
        """Let go of everything; once is enough."""
        if self._flights.get(flight.request_id) is not flight:
            return
        del self._flights[flight.request_id]
        if flight.timer is not None:
            flight.timer.cancel()
        self._parts.ledger.close(flight.outcome(self._parts.clock.now_s()))
        if flight.closed is not None:
            flight.closed.set()

    async def _abort(
        self, flight: Flight | None, context: Context, code: grpc.StatusCode, message: str
    ) -> NoReturn:
        if flight is None:
            await context.abort(code, message)
        # A client that went away fails the write to it before its cancellation arrives.
        gone = context.done() or context.cancelled()
        flight.code = grpc.StatusCode.CANCELLED if gone else code
        # Before the status is out, which waits behind whatever the client does not read.
        self._close(flight)
        await context.abort(code, message, self._trailers(flight))

    def _trailers(self, flight: Flight) -> tuple[tuple[str, str], ...]:
        """Who decided what, for the client's records."""
        decision = flight.decision
        if decision is None:
            return (("loraserve-router", self._parts.router_id),)
        trailers: tuple[tuple[str, str], ...] = (
            ("loraserve-router", self._parts.router_id),
            ("loraserve-replica", decision.replica_id),
            ("loraserve-table-version", str(decision.table_version)),
            ("loraserve-reason", decision.reason),
        )
        if flight.losses:
            trailers += (("loraserve-failovers", str(flight.losses)),)
        return trailers


def _expire(flight: Flight) -> None:
    flight.end(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the request was done")

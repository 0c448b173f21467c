"""Look-aside in a router: choose a replica that the client then goes to itself, and tell the replica so.

One call per pick for anybody, or many picks over one stream for clients with many requests: what
comes in one message is answered in one message.
"""

import asyncio
import logging

import grpc
from google.protobuf.message import DecodeError

from loraserve.clock import Clock
from loraserve.errors import BadInputError, OverloadedError, UnavailableError
from loraserve.router.choice import Choice
from loraserve.router.flight import Flight
from loraserve.router.leases import LeaseCounter
from loraserve.router.peers import Peers
from loraserve.rpc.codec import check_adapter_name
from loraserve.rpc.internal.v1 import internal_pb2
from loraserve.rpc.prefix import MAX_BLOCKS
from loraserve.rpc.status import status_of
from loraserve.rpc.v1 import inference_pb2
from placement.routing.chooser import Decision
from placement.types import ReplicaId

logger = logging.getLogger(__name__)

STOPPING = "the router is stopping; use another one"
MAX_WAITING = 1024
"""How many picks of one stream may wait for a holder at once."""

Context = grpc.aio.ServicerContext[bytes, bytes]


class PickHandlers:
    """`Pick` and `PickMany` of `loraserve.v1.Inference`, as handlers of raw bytes."""

    def __init__(
        self,
        *,
        router_id: str,
        clock: Clock,
        choice: Choice,
        peers: Peers,
        leases: LeaseCounter,
        default_deadline_s: float,
    ) -> None:
        self._router_id = router_id
        self._clock = clock
        self._choice = choice
        self._peers = peers
        self._leases = leases
        self._default_deadline_s = default_deadline_s
        self.stopping = False

    async def pick(self, body: bytes, context: Context) -> bytes:
        """One pick."""
        try:
            try:
                request = inference_pb2.PickRequest.FromString(body)
            except DecodeError:
                raise BadInputError("the request is not a loraserve.v1.PickRequest") from None
            flight = self._flight(request)
            decision = self._choice.now(flight) or await self._choice.later(flight)
            return self._answer(flight, decision).SerializeToString()
        except Exception as error:
            # Who is told by the router itself does not take it for lost; one that is stopping soon will be.
            trailers = () if self.stopping else (("loraserve-router", self._router_id),)
            await context.abort(*_status(error), trailers)

    async def pick_many(self, request_iterator: object, context: Context) -> None:
        """Picks until the client goes."""
        waiting: set[asyncio.Task[None]] = set()
        out = _Out(context)
        try:
            while isinstance(body := await context.read(), bytes):
                if self.stopping:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, STOPPING)
                answers = self._answer_all(body, out, waiting)
                if answers.answers:
                    await out.write(answers)
            if waiting:
                await asyncio.wait(waiting)
        except DecodeError:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "the request is not a loraserve.v1.PickManyRequest"
            )
        finally:
            for task in waiting:
                task.cancel()

    def _answer_all(
        self, body: bytes, out: "_Out", waiting: set[asyncio.Task[None]]
    ) -> inference_pb2.PickManyResponse:
        """The answers that can be given at once; a task for each of the others."""
        answers = inference_pb2.PickManyResponse()
        for numbered in inference_pb2.PickManyRequest.FromString(body).picks:
            try:
                flight = self._flight(numbered.pick)
                decision = self._choice.now(flight)
                if decision is not None:
                    answers.answers.add(id=numbered.id, picked=self._answer(flight, decision))
                    continue
                if len(waiting) >= MAX_WAITING:
                    raise OverloadedError(f"{MAX_WAITING} picks of this stream wait for a holder")
                task = asyncio.create_task(self._answer_later(numbered.id, flight, out))
                waiting.add(task)
                task.add_done_callback(waiting.discard)
            except Exception as error:
                _add_error(answers, numbered.id, error)
        return answers

    async def _answer_later(self, number: int, flight: Flight, out: "_Out") -> None:
        answers = inference_pb2.PickManyResponse()
        try:
            answers.answers.add(id=number, picked=self._answer(flight, await self._choice.later(flight)))
        except Exception as error:
            _add_error(answers, number, error)
        await out.write(answers)

    def _flight(self, request: inference_pb2.PickRequest) -> Flight:
        """What is chosen for; it is never opened in the ledger, for the request does not pass here."""
        if self.stopping:
            raise UnavailableError(STOPPING)
        check_adapter_name(request.adapter)
        now_s = self._clock.now_s()
        flight = Flight(
            request_id="",
            adapter=request.adapter,
            body=b"",
            started_s=now_s,
            deadline_s=now_s + (request.remaining_s if request.remaining_s > 0 else self._default_deadline_s),
        )
        flight.max_tokens = request.max_tokens
        flight.prompt_tokens = request.prompt_tokens
        if self._choice.wants_prefix:
            flight.prefix = tuple(request.prefix_blocks[:MAX_BLOCKS])
        if request.exclude_replicas:
            flight.excluded = frozenset(map(ReplicaId, request.exclude_replicas))
            flight.excluded_at = self._choice.tables.table.version
        if request.HasField("adapter_version"):
            flight.pinned_version = request.adapter_version
        return flight

    def _answer(self, flight: Flight, decision: Decision) -> inference_pb2.PickResponse:
        peer = self._peers.find(decision.replica_id)
        if peer is None:
            raise UnavailableError(f"replica {decision.replica_id} has left the cluster")
        leases = self._leases
        lease_id = leases.issue(decision.replica_id, decision.rank, flight.prompt_tokens)
        version = decision.version_id or ""
        peer.link.grant_lease(
            internal_pb2.LeaseGrant(
                lease_id=lease_id,
                version_id=version,
                lease_s=leases.lease_s,
                waited_s=self._clock.now_s() - flight.started_s,
                has_missed=flight.has_missed,
            )
        )
        return inference_pb2.PickResponse(
            replica_id=decision.replica_id,
            address=peer.address,
            lease=inference_pb2.Lease(
                lease_id=lease_id, adapter_version=version, table_version=decision.table_version
            ),
            lease_s=leases.lease_s,
            reason=decision.reason,
        )


class _Out:
    """The answers' way to one client: gRPC takes one write at a time, and a holder that comes lets many
    picks go at once."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = asyncio.Lock()

    async def write(self, answers: inference_pb2.PickManyResponse) -> None:
        """Write them after those before."""
        async with self._lock:
            await self._context.write(answers.SerializeToString())


def _status(error: Exception) -> tuple[grpc.StatusCode, str]:
    code, message = status_of(error)
    if code is grpc.StatusCode.INTERNAL:
        logger.error("a pick failed: %s", error, exc_info=error)
    return code, message


def _add_error(answers: inference_pb2.PickManyResponse, number: int, error: Exception) -> None:
    code, message = _status(error)
    answers.answers.add(id=number, code=code.value[0], message=message)

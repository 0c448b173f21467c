"""One request through all its attempts: where each one goes, and what a failed one leads to.

Owns what a further attempt needs: the key, the tokens so far, the replicas and routers that have failed
it. At most one attempt runs at a time. What may be sent again, and when:

- nothing of the answer came: the whole request, whatever its sampling;
- some came and it can be resumed exactly: the rest, on the same adapter version;
- some came and it cannot: StreamBrokenError with what came.

Only lost peers are a reason to try again, and refusals by which a replica says that it has done nothing.
"""

import asyncio
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import grpc

from loraserve.client import failures
from loraserve.client.replicas import ReplicaChannel, Replicas
from loraserve.client.routers import Router, Routers
from loraserve.client_types import ServedBy
from loraserve.clock import Clock
from loraserve.errors import (
    DeadlineError,
    LoraServeError,
    StaleError,
    StreamBrokenError,
    UnavailableError,
)
from loraserve.request import GenerationStep, SamplingParams
from loraserve.rpc.backoff import Backoff
from loraserve.rpc.codec import prompt_length
from loraserve.rpc.prefix import prefix_blocks
from loraserve.rpc.v1 import inference_pb2

if TYPE_CHECKING:
    from loraserve.rpc.v1.inference_pb2_grpc import InferenceAsyncStub

MAX_ATTEMPTS = 8
MAX_FAILURES = 16
"""Of one request, including those before it was sent; only waiting for a router is bounded by time."""

QUICK_ATTEMPTS = 3
"""So many follow each other at once. Who has lost more peers than that is in the middle of a larger failure:
the attempts that are left are spread over some seconds."""

MAX_STALE = 3
EXCLUDING_PICK_S = 2.0
"""How long a router may look for another replica than those that have failed this request."""

NOBODY_ELSE = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)
"""What a router may answer when there is no replica but those excluded."""

FIRST_WAIT_S = 0.05
LONGEST_WAIT_S = 0.5

StreamCall = grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]
UnaryCall = grpc.aio.UnaryUnaryCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What all requests of a client share; `look_aside` None means: where it works."""

    routers: Routers
    replicas: Replicas
    clock: Clock
    rng: Random
    look_aside: bool | None
    reconnect_s: float


class Submission:
    """One request: `stream` or `unary` sends it, `failed` says whether to send it again.

    `message` names the request and its key, and is this object's from now on. `timeout_s` covers all
    attempts.
    """

    def __init__(
        self, means: Means, message: inference_pb2.GenerateRequest, sampling: SamplingParams, timeout_s: float
    ) -> None:
        self._means = means
        self._message = message
        self._sampling = sampling
        self._timeout_s = timeout_s
        self._deadline_s = means.clock.now_s() + timeout_s
        self._waits = Backoff(means.rng, first_s=FIRST_WAIT_S, max_s=LONGEST_WAIT_S)
        self._rests = Backoff(means.rng)
        self._rest_s = 0.0
        # Whom the present attempt went to: always a router, and the replica that it named if sent there.
        self._router: Router | None = None
        self._replica: ReplicaChannel | None = None
        self._heard = False
        # What the next attempt has to heed.
        self._through_router = False
        self._pause = False
        self._excluded: set[str] = set()
        self._tried: set[str] = set()
        self._lost_since_s: float | None = None
        self._num_failures = 0
        self._num_stale = 0
        self._error: LoraServeError = UnavailableError("the request was not sent")
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self.attempts = 0
        self.resumed = False
        self.request_id = message.request_id
        self.adapter_version = ""
        self.served_by = ServedBy()

    @property
    def all_tokens_came(self) -> bool:
        """Whether nothing of the answer is missing but the word that it has ended."""
        return len(self._token_ids) >= self._sampling.max_tokens

    @property
    def num_tokens(self) -> int:
        """The tokens so far."""
        return len(self._token_ids)

    async def stream(self) -> StreamCall:
        """The next attempt, under way; raises the request's error if there can be none."""
        stub = await self._choose()
        call = stub.Generate(self._message, timeout=self._sending_s())
        self._release_after(call)
        return call

    async def unary(self) -> UnaryCall:
        """The same for one answer."""
        stub = await self._choose()
        call = stub.Complete(self._message, timeout=self._sending_s())
        self._release_after(call)
        return call

    def heard(self, message: inference_pb2.GenerateResponse) -> None:
        """Note the first message of the present attempt.

        StreamBrokenError if it goes on with other weights than the answer began with.
        """
        self._heard = True
        if self._replica is not None:
            self._means.replicas.note_reached(self._replica.address)
        elif self._router is not None:
            self._note_answered(self._router)
        if self._token_ids:
            if message.adapter_version != self.adapter_version:
                raise self._broken(
                    f"it began with {self.adapter_version or 'the base model'} and was to go on with"
                    f" {message.adapter_version or 'the base model'}"
                )
            self.resumed = True
        self.request_id = message.request_id or self.request_id
        self.adapter_version = message.adapter_version

    def add(self, step: GenerationStep) -> None:
        """Note what the caller has had of the answer."""
        self._token_ids.extend(step.token_ids)
        self._text.append(step.text)

    def note_trailers(self, metadata: object) -> None:
        """Note whom the router named when it ended the present attempt."""
        if self._replica is None:
            self.served_by = failures.served_by(metadata)

    def failed(self, error: grpc.aio.AioRpcError) -> None:
        """Note how the present attempt failed; raises the request's error unless another may follow."""
        self.note_trailers(error.trailing_metadata())
        if failures.never_sent(error):
            # None of the attempts that are counted: waiting for a peer to come back is bounded by time.
            self.attempts -= 1
        if self._replica is not None:
            self._error = failures.error_from(error, "replica", (self._replica.address,))
            again = self._replica_failed(self._replica, error)
        else:
            assert self._router is not None, "failed before it was sent"
            self._error = failures.error_from(error, "router", self._means.routers.addresses)
            again = self._router_failed(self._router, error)
        if self._token_ids and failures.is_unavailable(error) and not self._sampling.is_resumable:
            raise self._broken(f"{self._error}; {_why_not_resumable(self._sampling)}")
        if not again:
            raise self._final()
        if self.attempts >= QUICK_ATTEMPTS:
            self._rest_s = self._rests.next_s()

    async def _choose(self) -> "InferenceAsyncStub":
        """Whom to send to next; the message is ready for it."""
        means = self._means
        while True:
            router = await self._next_router()
            if self._through_router or not self._may_look_aside(router):
                self._router, self._replica = router, None
                self._message.ClearField("lease")
                self._prepare()
                return router.inference
            picked = await self._pick(router)
            if picked is None:
                continue
            self._router, self._replica = router, await means.replicas.acquire(picked.address)
            self._message.lease.CopyFrom(picked.lease)
            self.served_by = ServedBy(
                replica=picked.replica_id, table_version=picked.lease.table_version, reason=picked.reason
            )
            self._prepare()
            return self._replica.inference

    def _may_look_aside(self, router: Router) -> bool:
        if self._means.look_aside is not None:
            return self._means.look_aside
        return self._means.routers.may_pick(router) and not self._means.replicas.hopeless

    def _prepare(self) -> None:
        message = self._message
        message.attempt = self.attempts
        message.request_id = self.request_id
        if self._token_ids:
            message.resume.token_ids[:] = self._token_ids
            message.resume.adapter_version = self.adapter_version
        self.attempts += 1
        self._heard = False
        self._through_router = False

    def _release_after(self, call: StreamCall | UnaryCall) -> None:
        replica = self._replica
        if replica is not None:
            replicas = self._means.replicas
            call.add_done_callback(lambda _: replicas.release(replica))

    async def _next_router(self) -> Router:
        routers = self._means.routers
        while True:
            if self.attempts >= MAX_ATTEMPTS or self._num_failures >= MAX_FAILURES:
                raise self._final(going_on=True)
            self._check_deadline()
            if self._rest_s or self._pause:
                await self._wait(self._rest_s or self._waits.next_s())
                self._rest_s, self._pause = 0.0, False
            if routers.closed:
                raise UnavailableError("the client is closed")
            router = routers.next(self._tried)
            if router is not None:
                return router
            now_s = self._means.clock.now_s()
            if not routers.reached:
                raise self._final(going_on=True)
            if self._lost_since_s is not None and now_s - self._lost_since_s >= self._means.reconnect_s:
                raise self._final(going_on=True)
            self._tried.clear()
            self._pause = True

    async def _wait(self, wanted_s: float) -> None:
        left_s = self._deadline_s - self._means.clock.now_s()
        await asyncio.sleep(max(0.0, min(wanted_s, left_s)))

    async def _pick(self, router: Router) -> inference_pb2.PickResponse | None:
        """The router's choice; None after a failure that another try may mend."""
        left_s = self._sending_s()
        request = inference_pb2.PickRequest(
            adapter=self._message.adapter,
            exclude_replicas=sorted(self._excluded),
            adapter_version=self.adapter_version if self._token_ids else None,
            max_tokens=self._sampling.max_tokens - len(self._token_ids),
            remaining_s=left_s,
            prompt_tokens=prompt_length(self._message) + len(self._token_ids),
            prefix_blocks=prefix_blocks(self._message),
        )
        timeout_s = min(left_s, EXCLUDING_PICK_S) if self._excluded else left_s
        try:
            picked = await router.picks.pick(request, timeout_s)
        except grpc.aio.AioRpcError as error:
            self._pick_failed(router, error)
            return None
        self._note_answered(router)
        if not self._means.replicas.is_unreachable(picked.address):
            return picked
        self._error = failures.unreachable("replica", (picked.address,))
        self._give_up_on(picked.replica_id)
        return None

    def _give_up_on(self, replica_id: str) -> None:
        """The next attempt cannot be sent to this replica from here."""
        self._num_failures += 1
        if self._means.look_aside is None:
            self._through_router = True
        else:
            self._excluded.add(replica_id)

    def _pick_failed(self, router: Router, error: grpc.aio.AioRpcError) -> None:
        self._error = failures.error_from(error, "router", self._means.routers.addresses)
        code = error.code()
        if code is grpc.StatusCode.UNIMPLEMENTED and self._means.look_aside is None:
            self._note_answered(router)
            self._means.routers.note_no_pick(router)
        elif self._excluded and code in NOBODY_ELSE and not self._is_lost(error):
            # Those excluded may be back, or may have failed this client alone.
            self._num_failures += 1
            self._excluded.clear()
        elif not self._router_failed(router, error):
            raise self._final(going_on=True)

    def _router_failed(self, router: Router, error: grpc.aio.AioRpcError) -> bool:
        """Note what a router answered or that it is lost; whether to try again."""
        code = error.code()
        if not failures.never_sent(error):
            self._num_failures += 1
        if code is grpc.StatusCode.UNAVAILABLE:
            if self._is_lost(error):
                self._means.routers.note_lost(router)
            self._tried.add(router.address)
            if self._lost_since_s is None:
                self._lost_since_s = self._means.clock.now_s()
            return True
        self._note_answered(router)
        # Part of the answer is with the caller already: worth more patience than a new request is.
        self._pause = code is grpc.StatusCode.RESOURCE_EXHAUSTED and bool(self._token_ids)
        return self._pause

    @staticmethod
    def _is_lost(error: grpc.aio.AioRpcError) -> bool:
        """Whether a router is gone, as opposed to one that says that it has nobody to send to."""
        return failures.is_unavailable(error) and not failures.is_told(error)

    def _replica_failed(self, replica: ReplicaChannel, error: grpc.aio.AioRpcError) -> bool:
        """Note what a replica answered or that it is lost; whether to try again."""
        code = error.code()
        replica_id = self.served_by.replica or ""
        if failures.never_sent(error) or code is grpc.StatusCode.UNIMPLEMENTED:
            self._means.replicas.note_unreachable(replica.address)
            self._give_up_on(replica_id)
            return True
        self._num_failures += 1
        if failures.is_unavailable(error):
            self._excluded.add(replica_id)
            return True
        if self._heard:
            return False
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            self._excluded.add(replica_id)
            return True
        if code is not grpc.StatusCode.FAILED_PRECONDITION:
            return False
        self._num_stale += 1
        if self._num_stale >= MAX_STALE:
            self._through_router = self._means.look_aside is None
            return self._through_router
        return True

    def _note_answered(self, router: Router) -> None:
        self._means.routers.note_answered(router)
        self._tried.clear()
        self._lost_since_s = None
        self._waits.reset()

    def _sending_s(self) -> float:
        """The time left, but never none: that has been checked, and gRPC takes no timeout of 0."""
        return max(0.001, self._deadline_s - self._means.clock.now_s())

    def _check_deadline(self) -> None:
        if self._means.clock.now_s() >= self._deadline_s:
            before = f"; before: {self._error}" if self._num_failures or self._tried else ""
            raise DeadlineError(
                f"request {self.request_id}: {self._timeout_s:g} s passed before it was answered{before}"
            )

    def _final(self, *, going_on: bool = False) -> LoraServeError:
        """The error that ends the request: with part of an answer that was to go on, what came of it.

        `going_on` says that it failed between two attempts.
        """
        error = self._error
        # Stale: the weights that the answer began with have been replaced since.
        began_again = going_on or self.attempts > 1 or isinstance(error, UnavailableError | StaleError)
        if self._token_ids and began_again and not isinstance(error, DeadlineError | StreamBrokenError):
            return self._broken(str(error))
        return error

    def _broken(self, reason: str) -> StreamBrokenError:
        return StreamBrokenError(self.request_id, reason, tuple(self._token_ids), "".join(self._text))


def _why_not_resumable(sampling: SamplingParams) -> str:
    if sampling.logprobs is not None:
        what = "logprobs"
    elif sampling.presence_penalty or sampling.frequency_penalty:
        what = "a presence or frequency penalty"
    else:
        what = "a seed"
    return f"a request with {what} cannot go on exactly elsewhere"

"""The client itself: what a caller may ask for, and the connections that serve it."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Coroutine, Sequence
from random import Random
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2

from loraserve import client_types
from loraserve.client import failures
from loraserve.client.replicas import Replicas
from loraserve.client.routers import Router, Routers
from loraserve.client.stream import Completion, GenerationStream
from loraserve.client.submission import Means, StreamCall, Submission
from loraserve.client_types import AdapterStatus, ClusterStatus, DrainStatus, PlanChange, PlanStatus
from loraserve.clock import Clock, WallClock
from loraserve.errors import BadInputError, LoraServeError, UnavailableError
from loraserve.request import ChatTurn, GenerationRequest, SamplingParams
from loraserve.rpc import codec
from loraserve.rpc.limits import check_drain_deadline
from loraserve.rpc.plan_codec import encode_plan
from loraserve.rpc.v1 import inference_pb2, management_pb2
from placement.types import Placement

Prompt = str | tuple[int, ...] | tuple[ChatTurn, ...]

READY_POLL_S = 0.05
DEFAULT_SAMPLING = SamplingParams()


class Client:
    """A client of one cluster, by any number of its routers.

    `timeout_s` bounds generation with all its attempts, `management_timeout_s` everything else; both are
    deadlines that the router sees, and DeadlineError when they pass. `look_aside` True sends requests to
    replicas directly and False through routers; None, the default, to replicas wherever that works.
    Routers that have answered before and are all lost are waited for `reconnect_s` at most.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        look_aside: bool | None = None,
        timeout_s: float = 600.0,
        management_timeout_s: float = 600.0,
        reconnect_s: float = 30.0,
        max_message_bytes: int = 16 * 1024**2,
        clock: Clock | None = None,
    ) -> None:
        addresses = (address,) if isinstance(address, str) else tuple(address)
        clock, rng = clock or WallClock(), Random()
        self._timeout_s = timeout_s
        self._management_timeout_s = management_timeout_s
        self._clock = clock
        self._routers = Routers(addresses, max_message_bytes=max_message_bytes, clock=clock, rng=rng)
        self._replicas = Replicas(max_message_bytes=max_message_bytes, clock=clock)
        self._means = Means(
            routers=self._routers,
            replicas=self._replicas,
            clock=clock,
            rng=rng,
            look_aside=look_aside,
            reconnect_s=reconnect_s,
        )
        self._opening: set[asyncio.Task[StreamCall]] = set()

    @property
    def addresses(self) -> tuple[str, ...]:
        """The routers' addresses."""
        return self._routers.addresses

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        adapter: str = "",
        sampling: SamplingParams = DEFAULT_SAMPLING,
        request_id: str = "",
        idempotency_key: str = "",
        timeout_s: float | None = None,
    ) -> GenerationStream:
        """Send a request now and stream its steps; `adapter` '' names the base model.

        At most one execution per `idempotency_key` runs at a time; without one the request gets its own.
        """
        message = _message(prompt, adapter, sampling, request_id, idempotency_key)
        submission = Submission(self._means, message, sampling, timeout_s or self._timeout_s)
        return GenerationStream(submission, self._spawn)

    async def complete(
        self,
        prompt: Prompt,
        *,
        adapter: str = "",
        sampling: SamplingParams = DEFAULT_SAMPLING,
        request_id: str = "",
        idempotency_key: str = "",
        timeout_s: float | None = None,
    ) -> Completion:
        """The same as `generate`, answered at once."""
        message = _message(prompt, adapter, sampling, request_id, idempotency_key)
        submission = Submission(self._means, message, sampling, timeout_s or self._timeout_s)
        while True:
            call = await submission.unary()
            try:
                answer = await call
            except grpc.aio.AioRpcError as error:
                submission.failed(error)
            else:
                break
        submission.heard(answer)
        submission.note_trailers(await call.trailing_metadata())
        return Completion(
            step=codec.decode_step(answer),
            request_id=submission.request_id,
            adapter_version=submission.adapter_version or None,
            served_by=submission.served_by,
            attempts=submission.attempts,
        )

    async def register_adapter(
        self,
        name: str,
        source: str,
        *,
        replace: bool = False,
        weight: float | None = None,
        slo_ttft_ms: float | None = None,
        slo_tbt_ms: float | None = None,
    ) -> AdapterStatus:
        """Register an adapter; returns once requests may name it. The rest is as in `set_adapter`."""
        terms = client_types.adapter_terms(weight, slo_ttft_ms, slo_tbt_ms)
        request = management_pb2.RegisterAdapterRequest(
            name=name, source=source, replace=replace, terms=terms
        )
        answer = await self._manage("RegisterAdapter", request, repeatable=False)
        return client_types.adapter_status(answer.adapter)

    async def set_adapter(
        self,
        name: str,
        *,
        weight: float | None = None,
        slo_ttft_ms: float | None = None,
        slo_tbt_ms: float | None = None,
    ) -> AdapterStatus:
        """Change how many times a registered adapter's tokens count for the placement, and its targets, 0 for
        the cluster's; what is None stays."""
        terms = client_types.adapter_terms(weight, slo_ttft_ms, slo_tbt_ms)
        request = management_pb2.SetAdapterRequest(name=name, terms=terms)
        answer = await self._manage("SetAdapter", request, repeatable=True)
        return client_types.adapter_status(answer.adapter)

    async def remove_adapter(self, name: str) -> int:
        """Take an adapter out of service; returns the version of the routing table without it."""
        request = management_pb2.RemoveAdapterRequest(name=name)
        answer = await self._manage("RemoveAdapter", request, repeatable=False)
        return int(answer.table_version)

    async def list_adapters(self) -> tuple[AdapterStatus, ...]:
        """All registered adapters."""
        answer = await self._manage("ListAdapters", management_pb2.ListAdaptersRequest(), repeatable=True)
        return tuple(client_types.adapter_status(one) for one in answer.adapters)

    async def status(self) -> ClusterStatus:
        """The cluster as one router knows it, the first that answers in the order given."""
        answer = await self._manage("GetStatus", management_pb2.GetStatusRequest(), repeatable=True)
        return client_types.cluster_status(answer)

    def drain(
        self,
        replicas: Sequence[str] = (),
        *,
        node: str = "",
        deadline_s: float | None = None,
        force: bool = False,
    ) -> AsyncGenerator[tuple[DrainStatus, ...], None]:
        """Drain these replicas, or all of a node, and yield how far they are until all are drained.

        Leaving early does not stop it, asking again for the same joins it. StaleError if adapters or all
        replicas would be lost and it is not forced, or if the drain is taken back; BadInputError at once for
        a deadline that is none.
        """
        if deadline_s is not None:
            check_drain_deadline(deadline_s)
        request = management_pb2.DrainReplicasRequest(
            replica_ids=replicas, node_id=node, deadline_s=deadline_s, force=force
        )
        return self._follow("DrainReplicas", request, self._management_timeout_s + (deadline_s or 0.0))

    def undrain(
        self, replicas: Sequence[str] = (), *, node: str = ""
    ) -> AsyncGenerator[tuple[DrainStatus, ...], None]:
        """Take drains back, and yield how far the replicas are until all are ready."""
        request = management_pb2.UndrainReplicasRequest(replica_ids=replicas, node_id=node)
        return self._follow("UndrainReplicas", request, self._management_timeout_s)

    async def plan(self, *, propose: bool = False) -> PlanStatus:
        """The plan in force, and with `propose` what the policy would make of the present demand."""
        request = management_pb2.GetPlanRequest(propose=propose)
        return client_types.plan_status(await self._manage("GetPlan", request, repeatable=True))

    async def apply_plan(self, plan: Placement | None = None) -> PlanChange:
        """Adopt this plan, which is frozen then, or what the policy makes now; StaleError for one that may
        not be."""
        given = None if plan is None else encode_plan(plan)
        request = management_pb2.ApplyPlanRequest(plan=given)
        return client_types.plan_change(await self._manage("ApplyPlan", request, repeatable=False))

    async def freeze_plan(self, *, frozen: bool = True) -> PlanChange:
        """Let the plan stay as it is but for what losses and new adapters make necessary, or no longer."""
        request = management_pb2.FreezePlanRequest(frozen=frozen)
        return client_types.plan_change(await self._manage("FreezePlan", request, repeatable=False))

    async def roll_back_plan(self) -> PlanChange:
        """Back to the plan before, frozen; StaleError if there is none."""
        request = management_pb2.RollbackPlanRequest()
        return client_types.plan_change(await self._manage("RollbackPlan", request, repeatable=False))

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once a router says SERVING; UnavailableError if none does within the time."""
        reasons = dict.fromkeys(self.addresses, "nothing listens there")
        asking = [
            asyncio.create_task(self._wait_serving(router, timeout_s, reasons))
            for router in self._routers.in_order()
        ]
        try:
            await asyncio.wait(asking, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            ready = [task for task in asking if task.done()]
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        for task in ready:
            task.result()
        if not ready:
            who = "router" if len(reasons) == 1 else "routers"
            raise UnavailableError(
                f"{who} {', '.join(reasons)}: not ready within {timeout_s:g} s: {'; '.join(reasons.values())}"
            )

    async def close(self) -> None:
        """Close the connections, cancelling what still runs; safe to call twice."""
        opening = list(self._opening)
        for task in opening:
            task.cancel()
        await self._routers.close()
        await self._replicas.close()
        await asyncio.gather(*opening, return_exceptions=True)

    def _spawn(self, opening: Coroutine[Any, Any, StreamCall]) -> "asyncio.Task[StreamCall]":
        task = asyncio.get_running_loop().create_task(opening)
        self._opening.add(task)
        task.add_done_callback(self._opened)
        return task

    def _opened(self, task: "asyncio.Task[StreamCall]") -> None:
        self._opening.discard(task)
        # Looked at here, since a stream that nobody reads is no error of the program.
        if not task.cancelled():
            task.exception()

    async def _wait_serving(self, router: Router, timeout_s: float, reasons: dict[str, str]) -> None:
        while True:
            try:
                answer = await router.check_health(
                    health_pb2.HealthCheckRequest(), timeout=timeout_s, wait_for_ready=True
                )
            except grpc.aio.AioRpcError as error:
                reasons[router.address] = error.details() or error.code().name
            else:
                self._routers.note_answered(router)
                name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
                if name == "SERVING":
                    return
                reasons[router.address] = name
            await asyncio.sleep(READY_POLL_S)

    async def _manage(self, method: str, request: object, *, repeatable: bool) -> Any:
        """Ask the routers in turn; what must not be done twice only while nothing was sent."""
        deadline_s = self._clock.now_s() + self._management_timeout_s
        last: LoraServeError = failures.unreachable("router", self.addresses)
        for router in self._routers.in_order():
            left_s = max(0.001, deadline_s - self._clock.now_s())
            try:
                answer = await getattr(router.management, method)(request, timeout=left_s)
            except grpc.aio.AioRpcError as error:
                last = failures.error_from(error, "router", self.addresses)
                lost = failures.is_unavailable(error)
                if not lost or not (repeatable or failures.never_sent(error)):
                    raise last from error
                if failures.never_sent(error):
                    self._routers.note_lost(router)
            else:
                self._routers.note_answered(router)
                return answer
        raise last

    async def _follow(
        self, method: str, request: object, timeout_s: float
    ) -> AsyncGenerator[tuple[DrainStatus, ...], None]:
        """Ask the routers in turn for a stream, which another may go on with."""
        last: LoraServeError = failures.unreachable("router", self.addresses)
        for router in self._routers.in_order():
            call = getattr(router.management, method)(request, timeout=timeout_s)
            try:
                async for message in call:
                    self._routers.note_answered(router)
                    yield client_types.drain_statuses(message)
                return
            except grpc.aio.AioRpcError as error:
                last = failures.error_from(error, "router", self.addresses)
                if not failures.is_unavailable(error):
                    raise last from error
            finally:
                call.cancel()
        raise last


def _message(
    prompt: Prompt, adapter: str, sampling: SamplingParams, request_id: str, idempotency_key: str
) -> inference_pb2.GenerateRequest:
    key = idempotency_key or uuid.uuid4().hex
    request = GenerationRequest(request_id=request_id or key, prompt=prompt, sampling=sampling)
    try:
        message = codec.encode_generate(request, adapter=adapter)
        message.idempotency_key = key
    except (ValueError, TypeError) as error:
        # A number that its field cannot hold, or text that is no UTF-8.
        raise BadInputError(f"the request cannot be sent: {error}") from error
    return message

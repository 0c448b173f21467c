"""A replica that is told to drain: nothing new, all that runs, and no later than the deadline."""

import asyncio

import grpc
import pytest

from loraserve.replica.in_flight import Turn
from loraserve.request import GenerationRequest, SamplingParams
from tests.support.replica_bench import ReplicaBench, status_of_call

DEADLINE_S = 60.0


async def test_running_work_ends_and_new_work_is_sent_elsewhere(bench: ReplicaBench) -> None:
    running = await bench.running("q1", max_tokens=30)
    drain = asyncio.ensure_future(bench.server.drain(DEADLINE_S))
    await asyncio.sleep(0)
    code, details = await status_of_call(bench.execute("q2"))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert details == f"replica {bench.server.replica_id} is draining; choose another"
    assert not drain.done()
    await bench.engine.allow()
    rest = [message async for message in running]
    assert rest[-1].output_tokens == 30
    assert await drain == 0
    assert bench.server.describe().draining


async def test_what_outlasts_the_deadline_is_ended_for_routers_to_go_on_with(bench: ReplicaBench) -> None:
    running = await bench.running("q1")
    assert await bench.server.drain(0.05) == 1
    code, details = await status_of_call(running)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "while draining" in details


async def test_a_lease_is_waited_for_and_its_client_is_let_in(bench: ReplicaBench) -> None:
    bench.server.leases.grant("l1", None, 30.0, lambda lease_id: None)
    drain = asyncio.ensure_future(bench.server.drain(DEADLINE_S))
    await asyncio.sleep(0)
    request = GenerationRequest(request_id="q1", prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=5))
    steps = [step async for step in bench.server.generate(request, Turn(lease_id="l1"))]
    assert steps[-1].output_tokens == 5
    assert await drain == 0


async def test_a_lease_that_nobody_uses_holds_a_drain_up_no_longer_than_the_deadline(
    bench: ReplicaBench,
) -> None:
    bench.server.leases.grant("l1", None, 30.0, lambda lease_id: None)
    assert await bench.server.drain(0.05) == 0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await bench.server.leases.wait_none()

"""What a router keeps bounded: requests that would come too late, clients that do not read, leases."""

import asyncio
import gc
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest

from loraserve.router import leases
from loraserve.router.flight import Flight
from loraserve.rpc.internal.v1 import internal_pb2
from loraserve.rpc.v1 import inference_pb2, management_pb2
from tests.support.router_bench import Bench, MakeBench, ask, code_of, until

Code = grpc.StatusCode
DEADLINE_S = 5.0


async def crowded(bench: Bench) -> None:
    """r0 says that whoever comes now is done in 100 s."""
    bench.replicas["r0"].report(sequence=1, running=8, waiting=99, starts_per_s=1.0)
    loads = bench.router.loads.view
    await until(lambda: any(load is not None and load.waiting == 99 for load in loads().loads.values()))


@pytest.mark.parametrize("adapter", ["one", ""], ids=["adapter", "base"])
async def test_what_would_come_too_late_is_refused_unless_it_has_begun(
    make_bench: MakeBench, adapter: str
) -> None:
    bench: Bench = await make_bench(("r0",))
    await bench.publish({"one": ("r0",)})
    await crowded(bench)
    version = f"{adapter}@0" if adapter else ""
    stub, pick = bench.inference, inference_pb2.PickRequest(adapter=adapter, remaining_s=DEADLINE_S)
    late = r"would finish in 100\.00 s at the soonest"
    with pytest.raises(grpc.aio.AioRpcError, match=late) as caught:
        await stub.Complete(ask(adapter), timeout=DEADLINE_S)
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED
    assert await code_of(stub.Generate(ask(adapter), timeout=DEADLINE_S)) is Code.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.aio.AioRpcError, match=late):
        await stub.Pick(pick)
    # A holder counts them as asked for: told with the next sign of life.
    told, num_told = bench.replicas["r0"].refusals, 3 if adapter else 0
    await until(lambda: len(told) == num_told)
    assert all(refusal.version_id == "one@0" for refusal in told)
    patient = inference_pb2.PickRequest(adapter=adapter, remaining_s=1000.0)
    assert (await stub.Pick(patient)).replica_id == "r0"
    resume = inference_pb2.Resume(token_ids=[1], adapter_version=version)
    greedy = inference_pb2.SamplingParams(temperature=0.0)
    begun = ask(adapter, resume=resume, sampling=greedy)
    assert await code_of(stub.Generate(begun, timeout=DEADLINE_S)) is Code.OK
    pick.adapter_version = version
    assert (await stub.Pick(pick)).replica_id == "r0"


async def test_nothing_is_refused_early_where_that_is_switched_off(make_bench: MakeBench) -> None:
    bench: Bench = await make_bench(("r0",), early_refusal=False)
    await bench.publish({"one": ("r0",)})
    await crowded(bench)
    assert await code_of(bench.inference.Complete(ask("one"), timeout=DEADLINE_S)) is Code.OK


async def endless(start: internal_pb2.Start) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
    while True:
        yield inference_pb2.GenerateResponse(token_ids=[1], text="x" * 10_000)


async def test_a_client_that_does_not_read_holds_nothing_past_its_deadline(make_bench: MakeBench) -> None:
    bench: Bench = await make_bench(("r0",), default_deadline_s=0.5)
    await bench.publish({"one": ("r0",)})
    bench.replicas["r0"].script = endless
    call = bench.inference.Generate(ask("one", request_id="r"))
    await call.read()
    await until(lambda: bench.router.counters.in_flight == 0, 5.0)
    assert bench.router.outcomes[-1].status == "DEADLINE_EXCEEDED"
    call.cancel()


async def test_a_later_attempt_does_not_wait_for_a_client_that_does_not_read(bench: Bench) -> None:
    bench.replicas["r0"].script = endless
    stuck = bench.inference.Generate(ask("one", idempotency_key="k"))
    await stuck.read()
    await until(lambda: bench.router.counters.in_flight == 1)
    async with asyncio.timeout(5.0):
        later = bench.inference.Generate(ask("one", idempotency_key="k", attempt=1))
        assert (await later.read()).token_ids == [1]
    later.cancel()
    stuck.cancel()


async def test_of_three_attempts_the_latest_runs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Flight] = []

    def end(flight: Flight, code: Code, message: str) -> None:
        """The first attempt ends when both others wait for it."""
        told.append(flight)
        if len(told) >= 2:
            ended(flight, code, message)

    ended = Flight.end
    monkeypatch.setattr(Flight, "end", end)
    bench.replicas["r0"].script = endless
    first = bench.inference.Generate(ask("one", idempotency_key="k"))
    await first.read()
    others = [bench.inference.Generate(ask("one", idempotency_key="k", attempt=one)) for one in (1, 2)]
    assert (await others[1].read()).token_ids == [1]
    assert await end_of(others[0]) in (Code.ABORTED, Code.ALREADY_EXISTS)
    assert await end_of(first) is Code.ABORTED
    others[1].cancel()


async def end_of(call: Any) -> Code:
    """The status behind all that has come."""
    try:
        async with asyncio.timeout(10.0):
            while await call.read() is not grpc.aio.EOF:
                pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return Code.OK


def num_flights() -> int:
    gc.collect()
    return sum(isinstance(one, Flight) for one in gc.get_objects())


async def test_a_refused_request_leaves_nothing_behind(make_bench: MakeBench) -> None:
    bench: Bench = await make_bench(("r0",), max_in_flight=1)
    await bench.publish({"one": ("r0",)})
    bench.replicas["r0"].script = endless
    running = bench.inference.Generate(ask("one"))
    await running.read()
    before = num_flights()
    for _ in range(20):
        assert await code_of(bench.inference.Complete(ask("one"))) is Code.RESOURCE_EXHAUSTED
    # The last one may still be in the traceback of its refusal.
    assert num_flights() <= before + 1
    running.cancel()


async def test_leases_run_out_though_nobody_picks_any_more(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "SPARE_S", 0.0)
    bench: Bench = await make_bench(("r0",), lease_s=0.05)
    await bench.publish({"one": ("r0",)})
    await bench.inference.Pick(inference_pb2.PickRequest(adapter="one"))
    assert dict(bench.router.loads.view().leased) == {"r0": 1}
    async with asyncio.timeout(5.0):
        while bench.router.loads.view().leased:
            await bench.inference.Complete(ask("one"))


async def test_a_pick_that_avoids_a_replica_says_so(bench: Bench) -> None:
    request = inference_pb2.PickRequest(adapter="both", exclude_replicas=["r0"])
    assert (await bench.inference.Pick(request)).reason == "retry:only-holder"


async def test_a_drain_that_the_controller_refuses_is_refused(bench: Bench) -> None:
    request = management_pb2.DrainReplicasRequest(replica_ids=["bad"])
    call: Any = bench.management.DrainReplicas(request)
    with pytest.raises(grpc.aio.AioRpcError, match="replica_ids: no bad") as caught:
        await call.read()
    assert caught.value.code() is Code.INVALID_ARGUMENT

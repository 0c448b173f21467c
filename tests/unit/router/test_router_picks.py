"""Pick: a choice that the client acts on itself, counted as if the request were already there."""

import asyncio
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.client.picks import PickStream
from loraserve.clock import ManualClock
from loraserve.router.leases import SPARE_S, LeaseCounter
from loraserve.rpc.v1 import inference_pb2
from placement.types import ReplicaId
from tests.support.router_bench import Bench, MakeBench, ask, until

Code = grpc.StatusCode


def pick(bench: Bench, adapter: str, **fields: Any) -> Any:
    return bench.inference.Pick(inference_pb2.PickRequest(adapter=adapter, **fields), timeout=10.0)


async def test_a_pick_names_replica_weights_and_table_and_the_replica_hears_of_it(bench: Bench) -> None:
    answer = await pick(bench, "one")
    replica = bench.replicas["r0"]
    assert (answer.replica_id, answer.address, answer.lease_s) == ("r0", replica.address, 5.0)
    assert (answer.lease.adapter_version, answer.lease.table_version) == ("one@0", 1)
    assert answer.reason == "only-holder"
    await until(lambda: bool(replica.leases))
    granted = replica.leases[0]
    assert (granted.lease_id, granted.version_id, granted.lease_s) == (answer.lease.lease_id, "one@0", 5.0)


async def test_picks_count_as_in_flight_until_they_are_used(bench: Bench) -> None:
    picked = [(await pick(bench, "both")).replica_id for _ in range(8)]
    assert sorted(picked) == ["r0"] * 4 + ["r1"] * 4
    view = bench.router.loads.view()
    assert dict(view.leased) == {"r0": 4, "r1": 4}
    for name, replica in bench.replicas.items():
        await until(lambda replica=replica: len(replica.leases) == 4)  # type: ignore[misc]
        for lease in replica.leases:
            replica.end_lease(lease.lease_id)
        await until(lambda name=name: name not in bench.router.loads.view().leased)  # type: ignore[misc]


async def test_a_proxied_request_sees_the_picks(bench: Bench) -> None:
    for _ in range(3):
        picked = (await pick(bench, "both", exclude_replicas=["r1"])).replica_id
        assert picked == "r0"
    call = bench.inference.Complete(ask("both"))
    await call
    assert dict(await call.trailing_metadata())["loraserve-replica"] == "r1"


@pytest.mark.parametrize(
    ("adapter", "fields", "code"),
    [
        ("nobody", {}, Code.NOT_FOUND),
        ("x" * 300, {}, Code.INVALID_ARGUMENT),
        ("one", {"exclude_replicas": ["r0"]}, Code.UNAVAILABLE),
        ("one", {"adapter_version": "one@9"}, Code.FAILED_PRECONDITION),
    ],
)
async def test_what_cannot_be_picked_is_refused(
    bench: Bench, adapter: str, fields: dict[str, Any], code: Code
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await pick(bench, adapter, **fields)
    assert caught.value.code() is code
    assert not bench.router.loads.view().leased


async def test_a_pick_avoids_a_replica_that_cannot_be_reached(make_bench: MakeBench) -> None:
    bench: Bench = await make_bench()
    await bench.publish({"both": ("r0", "r1")})
    await bench.replicas["r0"].watched.wait()
    await bench.replicas["r0"].stop()
    running = bench.router._running
    assert running is not None
    await until(lambda: bool(running.peers.down))
    for _ in range(6):
        assert (await pick(bench, "both")).replica_id == "r1"


async def test_many_picks_share_a_stream_and_each_gets_its_own_answer(bench: Bench) -> None:
    picks = PickStream(bench.inference)
    names = ["one", "both", "nobody", "one", "both"] * 20
    answers = await asyncio.gather(
        *(picks.pick(inference_pb2.PickRequest(adapter=name), 10.0) for name in names), return_exceptions=True
    )
    for name, answer in zip(names, answers, strict=True):
        if name == "nobody":
            assert isinstance(answer, grpc.aio.AioRpcError)
            assert (answer.code(), answer.details()) == (
                Code.NOT_FOUND,
                "adapter: adapter 'nobody' is not registered",
            )
        else:
            assert isinstance(answer, inference_pb2.PickResponse)
            assert answer.lease.adapter_version == f"{name}@0"
    leases = {answer.lease.lease_id for answer in answers if isinstance(answer, inference_pb2.PickResponse)}
    assert len(leases) == 80
    await picks.close()


async def test_picks_of_a_stream_wait_for_their_holder_and_hold_up_no_other(make_bench: MakeBench) -> None:
    bench: Bench = await make_bench(holder_wait_s=10.0)
    await bench.publish({"none": (), "one": ("r0",)})
    picks = PickStream(bench.inference)
    request = inference_pb2.PickRequest(adapter="none")
    waiting = asyncio.gather(*(picks.pick(request, 10.0) for _ in range(20)))
    assert (await picks.pick(inference_pb2.PickRequest(adapter="one"), 10.0)).replica_id == "r0"
    assert not waiting.done()
    # All of them are answered at once, over one stream.
    await bench.publish({"none": ("r1",), "one": ("r0",)})
    assert {picked.replica_id for picked in await waiting} == {"r1"}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await picks.pick(inference_pb2.PickRequest(adapter="one", exclude_replicas=["r0"]), 0.05)
    assert caught.value.code() is Code.DEADLINE_EXCEEDED
    await picks.close()


async def test_picks_outlive_their_stream_and_a_stopping_router_refuses_them(bench: Bench) -> None:
    picks = PickStream(bench.inference)
    request = inference_pb2.PickRequest(adapter="one")
    assert (await picks.pick(request, 10.0)).replica_id == "r0"
    assert picks._task is not None
    picks._task.cancel()
    await asyncio.wait([picks._task])
    assert (await picks.pick(request, 10.0)).replica_id == "r0"
    running = bench.router._running
    assert running is not None
    running.inference.stop_admitting()
    with pytest.raises(grpc.aio.AioRpcError, match="the router is stopping"):
        await picks.pick(request, 10.0)
    await picks.close()


@given(
    script=st.lists(st.tuples(st.sampled_from(["issue", "end", "wait"]), st.integers(0, 3), st.floats(0, 3)))
)
def test_leases_are_counted_until_they_end_or_run_out(script: list[tuple[str, int, float]]) -> None:
    clock = ManualClock()
    counter = LeaseCounter(prefix="r-", lease_s=2.0, clock=clock)
    issued: list[tuple[str, ReplicaId, float]] = []
    for what, which, seconds in script:
        if what == "issue":
            replica = ReplicaId(f"r{which}")
            issued.append((counter.issue(replica), replica, clock.now_s() + 2.0 + SPARE_S))
        elif what == "end" and issued:
            lease_id, _, _ = issued.pop(which % len(issued))
            counter.ended([lease_id, "of another router"])
        else:
            clock.advance(seconds)
            counter.sweep()
            issued = [entry for entry in issued if entry[2] > clock.now_s()]
        counter.check_invariants()
        assert sum(counter.per_replica.values()) == len(issued)
    assert len({lease_id for lease_id, _, _ in issued}) == len(issued)

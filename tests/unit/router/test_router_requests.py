"""A request through the router: what is forwarded, what comes back, with which status."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc
import pytest

from loraserve.rpc.internal.v1 import internal_pb2
from loraserve.rpc.v1 import inference_pb2
from placement.types import ReplicaId
from tests.support.router_bench import Bench, MakeBench, ask, code_of, until

Code = grpc.StatusCode


async def hang(request: internal_pb2.Start) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
    await asyncio.Event().wait()
    yield inference_pb2.GenerateResponse()


async def one_then_hang(
    request: internal_pb2.Start,
) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
    yield inference_pb2.GenerateResponse(text="first")
    await asyncio.Event().wait()


async def one_token(request: internal_pb2.Start) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
    yield inference_pb2.GenerateResponse(token_ids=[1], text="a")


async def test_a_stream_passes_every_message_on_and_says_who_served(bench: Bench) -> None:
    call = bench.inference.Generate(ask("one"))
    messages = [message async for message in call]
    assert [message.text for message in messages] == ["a", "b", "c"]
    assert messages[0].adapter_version == "one@0"
    trailers = dict(await call.trailing_metadata())
    assert trailers["loraserve-replica"] == "r0"
    assert trailers["loraserve-table-version"] == "1"
    assert trailers["loraserve-reason"] == "only-holder"
    assert trailers["loraserve-router"] == "router-t"
    outcome = bench.router.outcomes[-1]
    assert (outcome.status, outcome.messages, outcome.attempts) == ("OK", 3, 1)
    assert outcome.replica_id == "r0"


async def test_a_unary_request_gets_the_whole_answer(bench: Bench) -> None:
    answer = await bench.inference.Complete(ask("both"))
    assert answer.text == "abc"
    assert list(answer.token_ids) == [1, 2, 3]


async def test_the_base_model_is_served_by_any_replica_of_the_table(bench: Bench) -> None:
    for _ in range(20):
        await bench.inference.Complete(ask())
    assert all(replica.received for replica in bench.replicas.values())
    assert all(
        received.request.version_id == ""
        for replica in bench.replicas.values()
        for received in replica.received
    )


async def test_the_replica_gets_the_clients_own_bytes(bench: Bench) -> None:
    request = ask("one", request_id="mine", sampling=inference_pb2.SamplingParams(seed=7, max_tokens=3))
    await bench.inference.Complete(request)
    received = bench.replicas["r0"].received[-1]
    assert received.request.generate == request.SerializeToString()
    assert received.request.request_id == "mine"
    assert received.request.version_id == "one@0"
    assert received.request.table_version == 1


async def test_a_missing_request_id_is_made_up_and_unique(bench: Bench) -> None:
    for _ in range(2):
        await bench.inference.Complete(ask("one"))
    ids = [received.request.request_id for received in bench.replicas["r0"].received]
    assert ids == ["router-t-run-1", "router-t-run-2"]


async def test_an_unknown_adapter_is_not_found(bench: Bench) -> None:
    assert await code_of(bench.inference.Complete(ask("nobody"))) is Code.NOT_FOUND
    assert await code_of(bench.inference.Generate(ask("nobody"))) is Code.NOT_FOUND
    await until(lambda: bench.router.counters.refused == 2)


async def test_an_adapter_without_a_holder_is_unavailable(bench: Bench) -> None:
    await bench.publish({"unplaced": ()})
    assert await code_of(bench.inference.Complete(ask("unplaced"))) is Code.UNAVAILABLE


async def test_before_the_first_table_everything_is_unavailable(make_bench: MakeBench) -> None:
    bench = await make_bench()
    assert await code_of(bench.inference.Complete(ask("one"))) is Code.UNAVAILABLE


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (ask(text=""), "text"),
        (ask(sampling=inference_pb2.SamplingParams(n=2)), "sampling.n"),
        (ask(images=[b"png"]), "images"),
        (ask(request_id="x" * 129), "request_id"),
    ],
)
async def test_a_refused_field_is_named(
    bench: Bench, request_: inference_pb2.GenerateRequest, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bench.inference.Complete(request_)
    assert caught.value.code() is Code.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith(f"{field}: ")
    assert not any(replica.received for replica in bench.replicas.values())


async def test_bytes_that_are_no_request_are_refused(bench: Bench) -> None:
    complete: Any = bench.channel.unary_unary("/loraserve.v1.Inference/Complete")
    assert await code_of(complete(b"\xff\xff")) is Code.INVALID_ARGUMENT


async def test_a_full_router_refuses_and_recovers(make_bench: MakeBench) -> None:
    bench = await make_bench(max_in_flight=1)
    await bench.publish({"one": ("r0",)})
    bench.replicas["r0"].script = hang
    held = bench.inference.Generate(ask("one"))
    await bench.replicas["r0"].arrived.wait()
    assert await code_of(bench.inference.Complete(ask("one"))) is Code.RESOURCE_EXHAUSTED
    held.cancel()
    await bench.idle()
    bench.replicas["r0"].script = bench.replicas["r1"].script
    assert await code_of(bench.inference.Complete(ask("one"))) is Code.OK


async def test_a_request_id_in_flight_is_refused_until_it_ends(bench: Bench) -> None:
    bench.replicas["r0"].script = hang
    held = bench.inference.Generate(ask("one", request_id="twice"))
    await bench.replicas["r0"].arrived.wait()
    assert await code_of(bench.inference.Complete(ask("one", request_id="twice"))) is Code.ALREADY_EXISTS
    held.cancel()
    await bench.idle()
    bench.replicas["r0"].script = bench.replicas["r1"].script
    assert await code_of(bench.inference.Complete(ask("one", request_id="twice"))) is Code.OK


@pytest.mark.parametrize("method", ["Generate", "Complete"])
async def test_a_cancelled_request_ends_on_the_replica_and_releases_everything(
    bench: Bench, method: str
) -> None:
    replica = bench.replicas["r0"]
    replica.script = hang
    call = getattr(bench.inference, method)(ask("one"))
    await replica.arrived.wait()
    assert bench.router.counters.in_flight == 1
    call.cancel()
    async with asyncio.timeout(5):
        await replica.cancelled.wait()
    await bench.idle()
    bench.router.check_invariants(idle=True)
    assert bench.router.outcomes[-1].status == "CANCELLED"
    assert bench.router.counters.cancelled == 1


async def test_a_client_that_leaves_mid_stream_ends_the_replicas_work(bench: Bench) -> None:
    replica = bench.replicas["r0"]
    replica.script = one_then_hang
    call = bench.inference.Generate(ask("one"))
    assert (await call.read()).text == "first"
    call.cancel()
    async with asyncio.timeout(5):
        await replica.cancelled.wait()
    await bench.idle()


async def test_the_deadline_travels_as_remaining_time(bench: Bench) -> None:
    await bench.inference.Complete(ask("one"), timeout=7.0)
    remaining_s = bench.replicas["r0"].received[-1].request.remaining_s
    # gRPC rounds a timeout up to the unit that it travels in.
    assert 5.0 < remaining_s <= 7.1


async def test_without_a_deadline_the_default_one_holds(make_bench: MakeBench) -> None:
    bench = await make_bench(default_deadline_s=0.2)
    await bench.publish({"one": ("r0",)})
    bench.replicas["r0"].script = hang
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bench.inference.Complete(ask("one"))
    assert caught.value.code() is Code.DEADLINE_EXCEEDED
    await bench.idle()
    assert bench.router.outcomes[-1].status == "DEADLINE_EXCEEDED"


async def test_a_passed_deadline_releases_everything(bench: Bench) -> None:
    bench.replicas["r0"].script = hang
    assert await code_of(bench.inference.Generate(ask("one"), timeout=0.2)) is Code.DEADLINE_EXCEEDED
    await bench.idle()
    assert bench.router.outcomes[-1].status == "DEADLINE_EXCEEDED"
    assert bench.router.counters.failed == 1


RETRIED = [Code.FAILED_PRECONDITION, Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED]


@pytest.mark.parametrize("code", RETRIED)
@pytest.mark.parametrize("method", ["Generate", "Complete"])
async def test_a_refusal_is_retried_on_another_holder(bench: Bench, code: Code, method: str) -> None:
    bench.replicas["r0"].refusal = code
    for _ in range(10):
        call = getattr(bench.inference, method)(ask("both"))
        assert await code_of(call) is Code.OK
        assert dict(await call.trailing_metadata())["loraserve-replica"] == "r1"
    assert bench.replicas["r0"].received, "the refusing replica was never asked: the test shows nothing"
    assert max(outcome.attempts for outcome in bench.router.outcomes) == 2


async def test_a_replica_that_is_gone_is_retried_on_another_holder(bench: Bench) -> None:
    await bench.replicas["r0"].stop()
    for _ in range(10):
        assert await code_of(bench.inference.Complete(ask("both"))) is Code.OK


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (Code.RESOURCE_EXHAUSTED, Code.RESOURCE_EXHAUSTED),
        (Code.UNAVAILABLE, Code.UNAVAILABLE),
        (Code.FAILED_PRECONDITION, Code.UNAVAILABLE),
        (Code.INVALID_ARGUMENT, Code.INVALID_ARGUMENT),
        (Code.INTERNAL, Code.INTERNAL),
    ],
)
async def test_when_every_holder_refuses_the_client_learns_why(
    bench: Bench, refusal: Code, expected: Code
) -> None:
    for replica in bench.replicas.values():
        replica.refusal = refusal
    assert await code_of(bench.inference.Generate(ask("both"))) is expected


async def test_at_most_two_retries(make_bench: MakeBench) -> None:
    names = tuple(f"r{index}" for index in range(5))
    bench = await make_bench(replicas=names)
    await bench.publish({"all": names})
    for replica in bench.replicas.values():
        replica.refusal = Code.RESOURCE_EXHAUSTED
    assert await code_of(bench.inference.Complete(ask("all"))) is Code.RESOURCE_EXHAUSTED
    assert sorted(len(replica.received) for replica in bench.replicas.values()) == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("code", [Code.FAILED_PRECONDITION, Code.RESOURCE_EXHAUSTED, Code.INTERNAL])
async def test_after_the_first_message_an_error_is_passed_on(bench: Bench, code: Code) -> None:
    for replica in bench.replicas.values():
        replica.script = one_token
        replica.failure = code
    call = bench.inference.Generate(ask("both"))
    assert await code_of(call) is code
    await bench.idle()
    assert bench.router.outcomes[-1].messages == 1
    assert dict(await call.trailing_metadata())["loraserve-replica"] in bench.replicas
    assert sum(len(replica.received) for replica in bench.replicas.values()) == 1
    await bench.idle()
    assert bench.router.counters.failed == 1


async def test_a_stale_refusal_waits_for_the_table_that_is_on_its_way(bench: Bench) -> None:
    old, new = bench.replicas["r0"], bench.replicas["r1"]
    old.refusal = Code.FAILED_PRECONDITION
    call = asyncio.ensure_future(bench.inference.Complete(ask("one")))
    await old.arrived.wait()
    await bench.publish({"one": ("r1",)})
    assert (await call).text == "abc"
    assert new.received[-1].request.table_version == 2


async def test_replicas_with_a_full_queue_are_full(make_bench: MakeBench) -> None:
    bench = await make_bench(replicas=("r0",), max_waiting_per_replica=4)
    await bench.publish({"one": ("r0",)})
    replica = bench.replicas["r0"]
    await replica.watched.wait()
    replica.report(sequence=1, running=8, waiting=4)
    await _until_load(bench, lambda load: load is not None and load.waiting == 4)
    assert await code_of(bench.inference.Complete(ask("one"))) is Code.RESOURCE_EXHAUSTED
    replica.report(sequence=2, running=8, waiting=3)
    await _until_load(bench, lambda load: load is not None and load.waiting == 3)
    assert await code_of(bench.inference.Complete(ask("one"))) is Code.OK


async def _until_load(bench: Bench, condition: Callable[[Any], bool]) -> None:
    await until(lambda: condition(bench.router.loads.view().loads.get(ReplicaId("r0"))))

"""A replica is lost under its requests: they go on elsewhere, or their clients learn why not."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest

from loraserve.router import choice
from loraserve.router.testing import Script, table_of
from loraserve.rpc.internal.v1 import internal_pb2
from loraserve.rpc.server import DEFAULT_MAX_MESSAGE_BYTES
from loraserve.rpc.v1 import inference_pb2
from tests.support.router_bench import Bench, MakeBench, ask, code_of, until

Code = grpc.StatusCode
GREEDY = inference_pb2.SamplingParams(temperature=0.0, max_tokens=8)
STOP = inference_pb2.FINISH_REASON_STOP


def counting(hold_after: int | None = None, *, until_tokens: int = 6) -> Script:
    """Tokens 0, 1, 2, ... from where the request stands, holding still after so many in all."""

    async def script(start: internal_pb2.Start) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        generate = inference_pb2.GenerateRequest.FromString(start.generate)
        begin = len(generate.resume.token_ids) + len(start.resume_token_ids)
        for token in range(begin, until_tokens):
            if hold_after is not None and token >= hold_after:
                await asyncio.Event().wait()
            last = token == until_tokens - 1
            yield inference_pb2.GenerateResponse(
                token_ids=[token],
                text=f"<{token}>",
                output_tokens=token + 1,
                adapter_version=start.version_id if token == begin else "",
                finish_reason=STOP if last else inference_pb2.FINISH_REASON_UNSPECIFIED,
            )

    return script


async def read(call: Any, count: int) -> list[int]:
    """The tokens of the next `count` messages."""
    return [token for _ in range(count) for token in (await call.read()).token_ids]


async def rest(call: Any) -> list[int]:
    """The tokens of all further messages."""
    tokens: list[int] = []
    while (message := await call.read()) is not grpc.aio.EOF:
        tokens += message.token_ids
    return tokens


async def broken_after_three(bench: Bench, request: inference_pb2.GenerateRequest) -> Any:
    """A stream that has given three tokens from r0, which is then gone."""
    bench.replicas["r0"].script = counting(3)
    bench.replicas["r1"].script = counting()
    # r1 looks busy, so that r0 is chosen.
    bench.replicas["r1"].report(sequence=1, running=50)
    view = bench.router.loads.view
    await until(lambda: any(load is not None and load.running == 50 for load in view().loads.values()))
    call = bench.inference.Generate(request)
    assert await read(call, 3) == [0, 1, 2]
    await bench.replicas["r0"].stop()
    return call


async def test_a_stream_goes_on_at_another_holder_from_the_tokens_sent(bench: Bench) -> None:
    call = await broken_after_three(bench, ask("both", request_id="r", sampling=GREEDY))
    assert await rest(call) == [3, 4, 5]
    received = bench.replicas["r1"].received[-1].request
    assert list(received.resume_token_ids) == [0, 1, 2]
    assert (received.version_id, received.request_id, received.router_attempt) == ("both@0", "r", 2)
    trailers = dict(await call.trailing_metadata())
    assert (trailers["loraserve-replica"], trailers["loraserve-failovers"]) == ("r1", "1")
    await bench.idle()
    outcome = bench.router.outcomes[-1]
    assert (outcome.status, outcome.messages, outcome.attempts) == ("OK", 6, 2)
    assert bench.router.counters.failovers == 1


async def test_a_stream_that_goes_on_may_be_refused_like_a_new_one(make_bench: MakeBench) -> None:
    bench: Bench = await make_bench(holder_wait_s=20.0)
    await bench.publish({"both": ("r0", "r1")})
    refusing = bench.replicas["r1"]
    refusing.refusal = Code.FAILED_PRECONDITION
    call = await broken_after_three(bench, ask("both", sampling=GREEDY))
    await until(lambda: bool(refusing.received))
    refusing.refusal = None
    # The router's table was old; the next one brings the holder.
    await bench.controller.publish(
        table_of(2, {name: replica.address for name, replica in bench.replicas.items()}, {"both": ("r1",)})
    )
    assert await rest(call) == [3, 4, 5]
    assert [list(one.request.resume_token_ids) for one in refusing.received] == [[0, 1, 2]] * 2


async def test_what_the_client_has_from_before_comes_first(bench: Bench) -> None:
    resume = inference_pb2.Resume(token_ids=[0, 1], adapter_version="both@0")
    bench.replicas["r0"].script = bench.replicas["r1"].script = counting()
    call = bench.inference.Generate(ask("both", sampling=GREEDY, resume=resume))
    assert await rest(call) == [2, 3, 4, 5]


@pytest.mark.parametrize(
    "sampling",
    [
        inference_pb2.SamplingParams(seed=1, max_tokens=8),
        inference_pb2.SamplingParams(temperature=0.0, presence_penalty=0.5, max_tokens=8),
        inference_pb2.SamplingParams(temperature=0.0, logprobs=2, max_tokens=8),
    ],
)
async def test_what_cannot_be_resumed_exactly_ends_with_the_reason(
    bench: Bench, sampling: inference_pb2.SamplingParams
) -> None:
    call = await broken_after_three(bench, ask("both", sampling=sampling))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rest(call)
    assert caught.value.code() is Code.UNAVAILABLE
    details = caught.value.details() or ""
    assert "replica r0 was lost" in details
    assert "3 tokens were sent" in details
    assert "cannot be resumed exactly" in details
    assert not bench.replicas["r1"].received


@pytest.mark.parametrize("method", ["Generate", "Complete"])
async def test_what_has_sent_nothing_begins_anew_whatever_its_sampling(bench: Bench, method: str) -> None:
    hung = bench.replicas["r0"]
    hung.script = counting(0)
    bench.replicas["r1"].script = counting()
    bench.replicas["r1"].report(sequence=1, running=50)
    await until(lambda: len(bench.router.loads.view().loads) == 2)
    request = ask("one", sampling=inference_pb2.SamplingParams(seed=1, logprobs=1, max_tokens=8))
    call = asyncio.ensure_future(code_of(getattr(bench.inference, method)(request)))
    await hung.arrived.wait()
    await bench.controller.publish(
        table_of(2, {name: replica.address for name, replica in bench.replicas.items()}, {"one": ("r1",)})
    )
    await until(lambda: bench.router.table.version == 2)
    await hung.stop()
    assert await call is Code.OK
    received = bench.replicas["r1"].received[-1].request
    assert not received.resume_token_ids


async def test_a_stream_whose_only_holder_died_waits_for_the_one_that_loads_its_adapter(
    make_bench: MakeBench,
) -> None:
    bench: Bench = await make_bench(holder_wait_s=10.0)
    await bench.publish({"one": ("r0",)})
    bench.replicas["r0"].script = counting(3)
    bench.replicas["r1"].script = counting()
    call = bench.inference.Generate(ask("one", sampling=GREEDY))
    assert await read(call, 3) == [0, 1, 2]
    reading = asyncio.ensure_future(rest(call))
    await bench.replicas["r0"].stop()
    del bench.replicas["r0"]
    # First the table without a holder, as the controller publishes it, then the one with the new one.
    await bench.publish({"one": ()})
    assert not reading.done()
    await bench.publish({"one": ("r1",)})
    assert await reading == [3, 4, 5]


async def test_a_request_that_comes_while_nobody_holds_its_adapter_waits_too(make_bench: MakeBench) -> None:
    bench: Bench = await make_bench(holder_wait_s=10.0)
    await bench.publish({"one": ()})
    waiting = asyncio.ensure_future(code_of(bench.inference.Complete(ask("one"))))
    await until(lambda: bench.router.counters.in_flight == 1)
    await bench.publish({"one": ("r0",)})
    assert await waiting is Code.OK


async def test_a_stream_does_not_go_on_with_other_weights(make_bench: MakeBench) -> None:
    bench: Bench = await make_bench(holder_wait_s=10.0)
    await bench.publish({"one": ("r0",)})
    bench.replicas["r0"].script = counting(3)
    call = bench.inference.Generate(ask("one", sampling=GREEDY))
    assert await read(call, 3) == [0, 1, 2]
    table = table_of(2, {"r1": bench.replicas["r1"].address}, {"one": ("r1",)})
    entry = next(iter(table.entries.values()))
    object.__setattr__(entry, "version_id", "one@1")
    await bench.controller.publish(table)
    await until(lambda: bench.router.table.version == 2)
    await bench.replicas["r0"].stop()
    with pytest.raises(grpc.aio.AioRpcError, match="began with one@0") as caught:
        await rest(call)
    assert caught.value.code() is Code.UNAVAILABLE
    assert not bench.replicas["r1"].received


async def test_a_whole_answer_whose_status_was_lost_is_whole(bench: Bench) -> None:
    bench.replicas["r0"].failure = Code.UNAVAILABLE
    call = bench.inference.Generate(ask("one", sampling=GREEDY))
    assert await rest(call) == [1, 2, 3]
    assert len(bench.replicas["r0"].received) == 1


async def test_a_link_that_breaks_alone_is_made_again_and_its_requests_go_on_there(
    make_bench: MakeBench,
) -> None:
    bench: Bench = await make_bench(replicas=("r0",), holder_wait_s=10.0)
    await bench.publish({"one": ("r0",)})
    replica = bench.replicas["r0"]
    replica.script = counting(3)
    call = bench.inference.Generate(ask("one", sampling=GREEDY))
    assert await read(call, 3) == [0, 1, 2]
    port = int(replica.address.rpartition(":")[2])
    await replica.stop()
    async with asyncio.timeout(5):
        await replica.cancelled.wait()
    replica.script = counting()
    await replica.start(port)
    assert await rest(call) == [3, 4, 5]


async def test_a_router_that_reaches_nobody_sends_its_clients_elsewhere(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "CUT_OFF_WAIT_S", 0.3)
    bench: Bench = await make_bench(holder_wait_s=60.0)
    await bench.publish({"one": ("r0",)})
    await bench.controller.stop()
    for replica in bench.replicas.values():
        await replica.stop()
    async with asyncio.timeout(10):
        with pytest.raises(grpc.aio.AioRpcError, match="cut off from its cluster") as caught:
            await bench.inference.Complete(ask("one"))
    assert caught.value.code() is Code.UNAVAILABLE


async def test_losses_without_end_are_bounded(make_bench: MakeBench) -> None:
    bench: Bench = await make_bench(holder_wait_s=0.2)
    await bench.publish({"one": ("r0",)})
    bench.replicas["r0"].refusal = Code.UNAVAILABLE
    assert await code_of(bench.inference.Complete(ask("one"))) is Code.UNAVAILABLE
    await bench.idle()
    assert bench.router.outcomes[-1].attempts <= 17


async def test_a_later_attempt_ends_the_earlier_one(bench: Bench) -> None:
    bench.replicas["r0"].script = counting(2)
    first = bench.inference.Generate(ask("one", idempotency_key="k", sampling=GREEDY))
    assert await read(first, 2) == [0, 1]
    bench.replicas["r0"].script = counting()
    resume = inference_pb2.Resume(token_ids=[0, 1], adapter_version="one@0")
    later = ask("one", idempotency_key="k", attempt=1, resume=resume, sampling=GREEDY)
    assert await rest(bench.inference.Generate(later)) == [2, 3, 4, 5]
    with pytest.raises(grpc.aio.AioRpcError, match="a later attempt") as caught:
        await rest(first)
    assert caught.value.code() is Code.ABORTED


async def test_the_same_or_an_earlier_attempt_is_refused(bench: Bench) -> None:
    bench.replicas["r0"].script = counting(1)
    held = bench.inference.Generate(ask("one", idempotency_key="k", attempt=1))
    await read(held, 1)
    for attempt in (0, 1):
        again = ask("one", idempotency_key="k", attempt=attempt)
        assert await code_of(bench.inference.Complete(again)) is Code.ALREADY_EXISTS
    held.cancel()


@pytest.mark.parametrize(
    ("fields", "code", "details"),
    [
        (
            {"sampling": inference_pb2.SamplingParams(seed=1)},
            Code.INVALID_ARGUMENT,
            "resume: a request with a seed",
        ),
        ({"sampling": inference_pb2.SamplingParams(max_tokens=2)}, Code.INVALID_ARGUMENT, "nothing is left"),
        (
            {"lease": inference_pb2.Lease(lease_id="x")},
            Code.INVALID_ARGUMENT,
            "lease: for requests to a replica",
        ),
    ],
)
async def test_a_resumption_that_makes_no_sense_is_refused(
    bench: Bench, fields: dict[str, Any], code: Code, details: str
) -> None:
    resume = inference_pb2.Resume(token_ids=[0, 1], adapter_version="one@0")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bench.inference.Complete(ask("one", resume=resume, **fields))
    assert caught.value.code() is code
    assert details in (caught.value.details() or "")


async def test_a_resumption_with_other_weights_is_stale(bench: Bench) -> None:
    resume = inference_pb2.Resume(token_ids=[0, 1], adapter_version="one@9")
    code = await code_of(bench.inference.Complete(ask("one", resume=resume, sampling=GREEDY)))
    assert code is Code.FAILED_PRECONDITION


async def test_a_stopping_router_sends_its_clients_elsewhere(bench: Bench) -> None:
    bench.replicas["r0"].script = counting(1)
    call = bench.inference.Generate(ask("one"))
    await read(call, 1)
    await bench.router.stop(0.0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is Code.UNAVAILABLE


async def test_requests_as_large_as_a_client_may_send_break_no_link(bench: Bench) -> None:
    held = bench.inference.Generate(ask("one", sampling=GREEDY))
    bench.replicas["r0"].script = counting(1)
    await read(held, 1)
    bench.replicas["r0"].script = counting()
    largest = "x" * (DEFAULT_MAX_MESSAGE_BYTES - 1024)
    codes = await asyncio.gather(
        *(
            code_of(bench.inference.Complete(ask("one", text=text)))
            for text in (largest, largest, "x" * 10**6)
        )
    )
    assert codes == [Code.OK] * 3
    too_large = "x" * DEFAULT_MAX_MESSAGE_BYTES
    assert await code_of(bench.inference.Complete(ask("one", text=too_large))) is Code.RESOURCE_EXHAUSTED
    assert bench.router.counters.in_flight == 1
    held.cancel()


async def test_one_stalled_client_among_64_holds_up_nobody(make_bench: MakeBench) -> None:
    bench: Bench = await make_bench(replicas=("r0",))
    await bench.publish({"one": ("r0",)})
    num_tokens = 400
    bench.replicas["r0"].script = _padded(num_tokens)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{bench.port}") as other:
        stub: Any = type(bench.inference)(other)
        # Far more than its connection's windows and buffers take.
        stalled = stub.Generate(ask("one", request_id="large"))
        assert (await stalled.read()).output_tokens == 1
        calls = [bench.inference.Generate(ask("one")) for _ in range(63)]
        counts = await asyncio.gather(*(rest(call) for call in calls))
        assert [len(tokens) for tokens in counts] == [num_tokens] * 63
        assert bench.router.counters.in_flight == 1
        assert len(await rest(stalled)) == num_tokens - 1


def _padded(num_tokens: int) -> Script:
    async def script(start: internal_pb2.Start) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        text = "x" * (256 * 1024 if start.request_id == "large" else 16)
        for token in range(num_tokens):
            yield inference_pb2.GenerateResponse(token_ids=[token], text=text, output_tokens=token + 1)
            if token % 8 == 0:
                await asyncio.sleep(0)

    return script

"""The Open Inference Protocol through a real router, over fake replicas."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest

from loraserve import __version__
from loraserve.router.service_oip import MAX_CONCURRENT_PER_STREAM, SERVICE
from loraserve.rpc.oip import open_inference_pb2 as oip
from loraserve.rpc.oip.open_inference_pb2_grpc import GRPCInferenceServiceStub
from loraserve.rpc.v1 import inference_pb2
from tests.support.oip_messages import infer, is_final, outputs_of
from tests.support.router_bench import Bench, MakeBench, code_of, until

Code = grpc.StatusCode


def stub(bench: Bench) -> Any:
    return GRPCInferenceServiceStub(bench.channel)


async def hang(request: Any) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
    await asyncio.Event().wait()
    yield inference_pb2.GenerateResponse()


async def failure(call: Any) -> tuple[Code, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def read_until(call: Any, ids: set[str]) -> dict[str, list[oip.ModelStreamInferResponse]]:
    """The stream's answers by request until each of these has had its last one."""
    found: dict[str, list[oip.ModelStreamInferResponse]] = {}
    async with asyncio.timeout(20):
        while ids:
            answer = await call.read()
            assert answer is not grpc.aio.EOF
            found.setdefault(answer.infer_response.id, []).append(answer)
            if is_final(answer):
                ids = ids - {answer.infer_response.id}
    return found


async def test_live_at_once_and_ready_with_the_first_table(make_bench: MakeBench) -> None:
    bench = await make_bench()
    client = stub(bench)
    assert (await client.ServerLive(oip.ServerLiveRequest())).live
    assert not (await client.ServerReady(oip.ServerReadyRequest())).ready
    assert not (await client.ModelReady(oip.ModelReadyRequest(name="one"))).ready
    code, details = await failure(client.ModelInfer(infer()))
    assert (code, details) == (
        Code.UNAVAILABLE,
        "the router has no routing table yet; try again later",
    )
    await bench.publish({"one": ("r0",), "unplaced": ()})
    await bench.serving(True)
    assert (await client.ServerReady(oip.ServerReadyRequest())).ready
    assert await bench.health(SERVICE) == "SERVING"
    ready = {
        name: (await client.ModelReady(oip.ModelReadyRequest(name=name, version=version))).ready
        for name, version in (("one", "0"), ("base", ""), ("unplaced", ""), ("nobody", ""))
    }
    assert ready == {"one": True, "base": True, "unplaced": False, "nobody": False}
    assert not (await client.ModelReady(oip.ModelReadyRequest(name="one", version="9"))).ready


async def test_metadata_config_and_index_describe_the_models(bench: Bench) -> None:
    await bench.publish({"one": ("r0",), "unplaced": ()})
    client = stub(bench)
    server = await client.ServerMetadata(oip.ServerMetadataRequest())
    assert (server.name, server.version) == ("loraserve", __version__)
    model = await client.ModelMetadata(oip.ModelMetadataRequest(name="one"))
    assert (model.name, list(model.versions)) == ("one", ["0"])
    assert {tensor.name: tensor.datatype for tensor in model.inputs} == {
        "text_input": "BYTES",
        "streaming": "BOOL",
        "sampling_parameters": "BYTES",
    }
    assert [tensor.name for tensor in model.outputs] == ["text_output", "finish_reason"]
    config = (await client.ModelConfig(oip.ModelConfigRequest(name="base"))).config
    assert config.model_transaction_policy.decoupled
    assert [tensor.optional for tensor in config.input] == [False, True, True]
    index = await client.RepositoryIndex(oip.RepositoryIndexRequest())
    assert [(model.name, model.state) for model in index.models] == [
        ("base", "READY"),
        ("one", "READY"),
        ("unplaced", "UNAVAILABLE"),
    ]
    ready = await client.RepositoryIndex(oip.RepositoryIndexRequest(ready=True))
    assert [model.name for model in ready.models] == ["base", "one"]
    for call in (
        client.ModelMetadata(oip.ModelMetadataRequest(name="nobody")),
        client.ModelConfig(oip.ModelConfigRequest(name="nobody")),
    ):
        assert await code_of(call) is Code.NOT_FOUND
    assert (
        await code_of(client.RepositoryIndex(oip.RepositoryIndexRequest(repository_name="x")))
        is Code.INVALID_ARGUMENT
    )


async def test_a_request_takes_the_native_path_and_comes_back_with_its_id(bench: Bench) -> None:
    call = stub(bench).ModelInfer(infer("one", "hello", id="7", sampling={"max_tokens": 3}))
    answer = await call
    assert outputs_of(answer) == {"text_output": "abc", "finish_reason": "stop"}
    assert (answer.model_name, answer.model_version, answer.id) == ("one", "0", "7")
    assert dict(await call.trailing_metadata())["loraserve-replica"] == "r0"
    received = bench.replicas["r0"].received[-1].generate
    assert received == inference_pb2.GenerateRequest(
        adapter="one", text="hello", sampling=inference_pb2.SamplingParams(max_tokens=3)
    )
    await bench.idle()
    assert bench.router.outcomes[-1].status == "OK"
    assert bench.router.outcomes[-1].adapter == "one"


async def test_the_same_id_twice_at_once_is_two_requests(bench: Bench) -> None:
    client = stub(bench)
    answers = await asyncio.gather(*(client.ModelInfer(infer(id="same")) for _ in range(4)))
    assert {answer.id for answer in answers} == {"same"}


async def test_only_the_outputs_that_are_asked_for_come_back_in_that_order(bench: Bench) -> None:
    request = infer("base", raw=True)
    for name in ("finish_reason", "text_output"):
        request.outputs.add(name=name)
    answer = await stub(bench).ModelInfer(request)
    assert [output.name for output in answer.outputs] == ["finish_reason", "text_output"]
    assert outputs_of(answer) == {"text_output": "abc", "finish_reason": "stop"}
    assert answer.model_version == "1"


@pytest.mark.parametrize(
    ("request_", "code", "said"),
    [
        (infer("nobody"), Code.NOT_FOUND, "model_name: "),
        (infer(shape=(3,)), Code.INVALID_ARGUMENT, "text_input: "),
        (infer(streaming=True), Code.INVALID_ARGUMENT, "streaming: "),
        (infer(sampling={"top_p": 2}), Code.INVALID_ARGUMENT, "sampling.top_p: "),
    ],
)
async def test_a_refusal_says_what_is_wrong(
    bench: Bench, request_: oip.ModelInferRequest, code: Code, said: str
) -> None:
    got, details = await failure(stub(bench).ModelInfer(request_))
    assert got is code
    assert details.startswith(said)


async def test_a_replicas_refusal_arrives_with_its_status_and_who_refused(bench: Bench) -> None:
    bench.replicas["r0"].refusal = Code.INTERNAL
    call = stub(bench).ModelInfer(infer())
    assert (await failure(call))[0] is Code.INTERNAL
    assert dict(await call.trailing_metadata())["loraserve-replica"] == "r0"


async def test_a_stream_gives_one_answer_per_step_and_marks_the_last(bench: Bench) -> None:
    call = stub(bench).ModelStreamInfer()
    await call.write(infer(id="a", streaming=True, raw=True))
    answers = (await read_until(call, {"a"}))["a"]
    assert [outputs_of(answer.infer_response) for answer in answers] == [
        {"text_output": "a", "finish_reason": ""},
        {"text_output": "b", "finish_reason": ""},
        {"text_output": "c", "finish_reason": "stop"},
    ]
    assert [is_final(answer) for answer in answers] == [False, False, True]
    assert {answer.infer_response.model_version for answer in answers} == {"0"}
    await call.write(infer(id="b"))
    (whole,) = (await read_until(call, {"b"}))["b"]
    assert outputs_of(whole.infer_response)["text_output"] == "abc"
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is Code.OK


async def test_a_stream_without_a_finish_reason_still_ends(bench: Bench) -> None:
    async def cut_short(request: Any) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        yield inference_pb2.GenerateResponse(text="a")

    bench.replicas["r0"].script = cut_short
    call = stub(bench).ModelStreamInfer(iter([infer(id="a", streaming=True)]))
    answers = [answer async for answer in call]
    assert [is_final(answer) for answer in answers] == [False, True]
    assert not answers[1].infer_response.outputs


async def test_failures_in_a_stream_are_answers_and_the_others_go_on(bench: Bench) -> None:
    bench.replicas["r1"].refusal = Code.INTERNAL
    await bench.publish({"good": ("r0",), "bad": ("r1",)})
    call = stub(bench).ModelStreamInfer()
    requests = {
        "unknown": (infer("nobody", id="unknown"), "NOT_FOUND: model_name: "),
        "shape": (infer("good", id="shape", shape=()), "INVALID_ARGUMENT: text_input: "),
        "range": (infer("good", id="range", sampling={"n": 2}), "INVALID_ARGUMENT: sampling.n: "),
        "refused": (infer("bad", id="refused", streaming=True), "INTERNAL: "),
        "good": (infer("good", id="good", streaming=True), ""),
    }
    for request, _ in requests.values():
        await call.write(request)
    found = await read_until(call, set(requests))
    for name, (_, said) in requests.items():
        last = found[name][-1]
        assert last.error_message.startswith(said)
        assert bool(last.error_message) is bool(said), last.error_message
        assert [is_final(answer) for answer in found[name][:-1]] == [False] * (len(found[name]) - 1)
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is Code.OK


async def test_a_failure_after_some_steps_is_the_last_answer(bench: Bench) -> None:
    async def fails(request: Any) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        yield inference_pb2.GenerateResponse(text="a")

    bench.replicas["r0"].script = fails
    bench.replicas["r0"].failure = Code.INTERNAL
    call = stub(bench).ModelStreamInfer(iter([infer(id="a", streaming=True)]))
    answers = [answer async for answer in call]
    assert [answer.error_message.partition(":")[0] for answer in answers] == ["", "INTERNAL"]
    assert [is_final(answer) for answer in answers] == [False, True]


async def test_a_stream_runs_a_bounded_number_of_requests_at_a_time(bench: Bench) -> None:
    free, now, most = asyncio.Event(), 0, 0

    async def wait(request: Any) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await free.wait()
        now -= 1
        yield inference_pb2.GenerateResponse(text="x", finish_reason=inference_pb2.FINISH_REASON_STOP)

    bench.replicas["r0"].script = wait
    ids = {str(number) for number in range(2 * MAX_CONCURRENT_PER_STREAM)}
    call = stub(bench).ModelStreamInfer()
    for name in sorted(ids):
        await call.write(infer(id=name, streaming=True))
    await until(lambda: now == MAX_CONCURRENT_PER_STREAM)
    assert bench.router.counters.in_flight == MAX_CONCURRENT_PER_STREAM
    free.set()
    found = await read_until(call, ids)
    assert {name: len(answers) for name, answers in found.items()} == dict.fromkeys(ids, 1)
    assert most == MAX_CONCURRENT_PER_STREAM
    await call.done_writing()
    assert await call.code() is Code.OK


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_client_that_leaves_ends_what_its_stream_runs(bench: Bench, streaming: bool) -> None:
    replica = bench.replicas["r0"]
    replica.script = hang
    call = stub(bench).ModelStreamInfer()
    for _ in range(3):
        await call.write(infer(streaming=streaming))
    await until(lambda: bench.router.counters.in_flight == 3)
    await replica.arrived.wait()
    call.cancel()
    await bench.idle()
    assert bench.router.counters.cancelled == 3
    async with asyncio.timeout(5):
        await replica.cancelled.wait()


async def test_a_client_that_leaves_a_unary_request_ends_it(bench: Bench) -> None:
    bench.replicas["r0"].script = hang
    call = stub(bench).ModelInfer(infer())
    await bench.replicas["r0"].arrived.wait()
    call.cancel()
    await bench.idle()
    assert bench.router.outcomes[-1].status == "CANCELLED"


async def test_tritons_timeout_and_grpcs_deadline_end_a_request(bench: Bench) -> None:
    bench.replicas["r0"].script = hang
    request = infer(id="late", streaming=True)
    request.parameters["timeout"].int64_param = 200_000
    call = stub(bench).ModelStreamInfer()
    await call.write(request)
    (answer,) = (await read_until(call, {"late"}))["late"]
    assert answer.error_message.startswith("DEADLINE_EXCEEDED: ")
    await call.done_writing()
    assert await call.code() is Code.OK
    assert await code_of(stub(bench).ModelInfer(infer(), timeout=0.2)) is Code.DEADLINE_EXCEEDED
    await bench.idle()
    assert [one.status for one in bench.router.outcomes] == ["DEADLINE_EXCEEDED"] * 2


async def test_a_stream_goes_on_at_another_holder_when_its_replica_is_lost(bench: Bench) -> None:
    async def first(request: Any) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        yield inference_pb2.GenerateResponse(token_ids=[1], text="a", output_tokens=1)
        await asyncio.Event().wait()

    async def rest(request: Any) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        assert list(request.resume_token_ids) == [1]
        stop = inference_pb2.FINISH_REASON_STOP
        yield inference_pb2.GenerateResponse(token_ids=[2], text="b", output_tokens=2, finish_reason=stop)

    bench.replicas["r0"].script, bench.replicas["r1"].script = first, rest
    # r1 looks busy, so that r0 is chosen.
    bench.replicas["r1"].report(sequence=1, running=50)
    loads = bench.router.loads
    await until(lambda: any(load is not None and load.running == 50 for load in loads.view().loads.values()))
    call = stub(bench).ModelStreamInfer(iter([infer("both", id="a", streaming=True)]))
    texts = [outputs_of((await call.read()).infer_response)["text_output"]]
    await bench.replicas["r0"].stop()
    answers = await read_until(call, {"a"})
    texts += [outputs_of(answer.infer_response)["text_output"] for answer in answers["a"]]
    assert texts == ["a", "b"]

"""Requests, steps, tables and reports across the wire: nothing lost, nothing unheard of let in."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.errors import BadInputError
from loraserve.request import (
    ChatTurn,
    FinishReason,
    GenerationRequest,
    GenerationStep,
    Logprob,
    SamplingParams,
)
from loraserve.rpc import codec, table_codec
from loraserve.rpc.limits import MAX_STOP_STRINGS, SAMPLING_CHECKS
from loraserve.rpc.v1 import inference_pb2
from placement.table import RoutingTable, TableEntry, TableReplica
from placement.types import AdapterName, Holder, ReplicaId, VersionId

Params = inference_pb2.SamplingParams


def message(**fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(**{"text": "hi", **fields})


def parse(sent: inference_pb2.GenerateRequest) -> GenerationRequest:
    return codec.parse_generate(sent, request_id="q", version_id=VersionId("a@1"))


def test_every_field_of_the_proto_has_a_check() -> None:
    assert set(SAMPLING_CHECKS) == {field.name for field in Params.DESCRIPTOR.fields}


def test_what_is_not_set_has_the_documented_default() -> None:
    assert parse(message()).sampling == SamplingParams()
    assert parse(message(sampling=Params())).sampling == SamplingParams()


def test_zero_is_not_unset() -> None:
    sampling = parse(message(sampling=Params(temperature=0.0, seed=0, logprobs=0))).sampling
    assert (sampling.temperature, sampling.seed, sampling.logprobs) == (0.0, 0, 0)


def test_minus_one_and_zero_both_mean_all_tokens() -> None:
    assert parse(message(sampling=Params(top_k=-1))).sampling.top_k == 0
    assert parse(message(sampling=Params(top_k=0))).sampling.top_k == 0


def test_the_three_kinds_of_prompt() -> None:
    assert parse(message()).prompt == "hi"
    ids = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[1, 2]))
    assert parse(ids).prompt == (1, 2)
    turn = inference_pb2.ChatMessage(role="user", content="hello")
    chat = inference_pb2.GenerateRequest(chat=inference_pb2.Chat(messages=[turn]))
    assert parse(chat).prompt == (ChatTurn(role="user", content="hello"),)


guided = inference_pb2.GuidedDecoding


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        (message(sampling=Params(temperature=-0.1)), "sampling.temperature"),
        (message(sampling=Params(temperature=math.inf)), "sampling.temperature"),
        (message(sampling=Params(temperature=math.nan)), "sampling.temperature"),
        (message(sampling=Params(top_p=0.0)), "sampling.top_p"),
        (message(sampling=Params(top_p=1.01)), "sampling.top_p"),
        (message(sampling=Params(top_k=-2)), "sampling.top_k"),
        (message(sampling=Params(min_p=-0.1)), "sampling.min_p"),
        (message(sampling=Params(min_p=1.1)), "sampling.min_p"),
        (message(sampling=Params(stop=[""])), "sampling.stop[0]"),
        (message(sampling=Params(stop=["x"] * (MAX_STOP_STRINGS + 1))), "sampling.stop"),
        (message(sampling=Params(stop_token_ids=[1] * 2000)), "sampling.stop_token_ids"),
        (message(sampling=Params(max_tokens=0)), "sampling.max_tokens"),
        (message(sampling=Params(max_tokens=3, min_tokens=4)), "sampling.min_tokens"),
        (message(sampling=Params(min_tokens=17)), "sampling.min_tokens"),
        (message(sampling=Params(presence_penalty=2.1)), "sampling.presence_penalty"),
        (message(sampling=Params(frequency_penalty=-2.1)), "sampling.frequency_penalty"),
        (message(sampling=Params(repetition_penalty=0.0)), "sampling.repetition_penalty"),
        (message(sampling=Params(logprobs=21)), "sampling.logprobs"),
        (message(sampling=Params(n=2)), "sampling.n"),
        (message(sampling=Params(n=0)), "sampling.n"),
        (message(sampling=Params(beam_width=4)), "sampling.beam_width"),
        (message(sampling=Params(guided=guided(regex="a+"))), "sampling.guided"),
        (message(sampling=Params(guided=guided())), "sampling.guided"),
        (message(images=[b""]), "images"),
        (message(request_id="x" * 129), "request_id"),
        (message(adapter="x" * 257), "adapter"),
        (message(text=""), "text"),
        (inference_pb2.GenerateRequest(), "prompt"),
        (inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds()), "token_ids.ids"),
        (inference_pb2.GenerateRequest(chat=inference_pb2.Chat()), "chat.messages"),
        (
            inference_pb2.GenerateRequest(
                chat=inference_pb2.Chat(messages=[inference_pb2.ChatMessage(content="x")])
            ),
            "chat.messages[0].role",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_field(sent: inference_pb2.GenerateRequest, field: str) -> None:
    with pytest.raises(BadInputError) as caught:
        codec.validate_generate(sent)
    assert str(caught.value).startswith(f"{field}: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInputError):
        parse(sent)


@pytest.mark.parametrize("inside", [False, True])
def test_a_field_of_a_later_release_is_refused(inside: bool) -> None:
    unknown = b"\xf8\x07\x01"  # field 127, varint 1
    sampling = Params(seed=1).SerializeToString() + (unknown if inside else b"")
    sent = message(sampling=Params.FromString(sampling)).SerializeToString() + (b"" if inside else unknown)
    with pytest.raises(BadInputError, match=r"field 127: unknown"):
        codec.validate_generate(inference_pb2.GenerateRequest.FromString(sent))


words = st.text(min_size=1, max_size=20)
sampling_values = st.builds(
    SamplingParams,
    temperature=st.floats(0, 5),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 1000),
    min_p=st.floats(0, 1),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(words, max_size=4).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=4).map(tuple),
    max_tokens=st.integers(10, 2**32 - 1),
    min_tokens=st.integers(0, 10),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.1, 2),
    logprobs=st.none() | st.integers(0, 20),
    ignore_eos=st.booleans(),
)
prompts = (
    words
    | st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=8).map(tuple)
    | st.lists(st.builds(ChatTurn, role=words, content=st.text()), min_size=1, max_size=3).map(tuple)
)


@given(prompts, sampling_values)
def test_a_request_survives_the_wire(prompt: Any, sampling: SamplingParams) -> None:
    request = GenerationRequest(request_id="q", prompt=prompt, version_id=VersionId("a@1"), sampling=sampling)
    sent = codec.encode_generate(request, adapter="a").SerializeToString()
    received = inference_pb2.GenerateRequest.FromString(sent)
    assert received.adapter == "a"
    assert parse(received) == request


logprobs = st.builds(
    Logprob, token_id=st.integers(0, 99), logprob=st.floats(-50, 0), rank=st.integers(1, 99), text=st.text()
)
steps = st.builds(
    GenerationStep,
    token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=4).map(tuple),
    text=st.text(),
    prompt_tokens=st.integers(0, 9999),
    output_tokens=st.integers(0, 9999),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    stop_reason=st.none() | words,
    logprobs=st.lists(st.lists(logprobs, max_size=3).map(tuple), max_size=3).map(tuple),
)


@given(steps, st.booleans())
def test_a_step_survives_the_wire(step: GenerationStep, first: bool) -> None:
    sent = codec.encode_step(step, first=first, request_id="q", version_id=VersionId("a@1"))
    received = inference_pb2.GenerateResponse.FromString(sent.SerializeToString())
    assert codec.decode_step(received) == step
    assert (received.request_id, received.adapter_version) == (("q", "a@1") if first else ("", ""))


def test_an_unknown_finish_reason_is_refused() -> None:
    received = inference_pb2.GenerateResponse.FromString(b"\x18\x63")
    with pytest.raises(BadInputError, match="finish_reason: 99"):
        codec.decode_step(received)


@given(st.lists(steps, min_size=1, max_size=5))
def test_joined_steps_are_the_whole_answer(parts: list[GenerationStep]) -> None:
    whole = codec.join_steps(parts)
    assert whole.text == "".join(part.text for part in parts)
    assert len(whole.token_ids) == sum(len(part.token_ids) for part in parts)
    assert whole.finish_reason == parts[-1].finish_reason
    assert whole.output_tokens == parts[-1].output_tokens


def table() -> RoutingTable:
    r0 = ReplicaId("r0")
    return RoutingTable(
        version=4,
        base_model="base",
        replicas={r0: TableReplica(replica_id=r0, address="127.0.0.1:5", max_lora_rank=64)},
        entries={
            AdapterName("a"): TableEntry(
                name=AdapterName("a"),
                version_id=VersionId("a@1"),
                rank=8,
                holders=(Holder(replica_id=r0, share=1.0),),
            ),
            AdapterName("nowhere"): TableEntry(
                name=AdapterName("nowhere"), version_id=VersionId("n@1"), rank=8, holders=()
            ),
        },
    )


def test_a_table_survives_the_wire() -> None:
    assert table_codec.decode_table(table_codec.encode_table(table())) == table()


def test_a_table_of_another_protocol_is_refused() -> None:
    sent = table_codec.encode_table(table())
    sent.protocol_version = 99
    with pytest.raises(BadInputError, match="the controller speaks version 99"):
        table_codec.decode_table(sent)


def test_a_holder_that_the_table_lacks_is_refused() -> None:
    sent = table_codec.encode_table(table())
    sent.entries[0].holders[0].replica_id = "ghost"
    with pytest.raises(BadInputError, match=r"entries\[a\]: holder ghost"):
        table_codec.decode_table(sent)


def test_a_load_report_survives_the_wire() -> None:
    report = table_codec.LoadReport(
        replica_id=ReplicaId("r0"),
        incarnation="i",
        sequence=3,
        running=1,
        waiting=2,
        outstanding_tokens=300,
        kv_cache_usage=0.25,
        routers=4,
        starts_per_s=12.5,
        token_s=0.02,
        output_tokens=64.0,
    )
    sent = table_codec.encode_load(report)
    assert table_codec.decode_load(sent) == report
    sent.protocol_version = 0
    with pytest.raises(BadInputError, match="replica r0 speaks version 0"):
        table_codec.decode_load(sent)

"""What a router makes of a ModelInferRequest, and what it refuses."""

import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.errors import BadInputError, NotFoundError, StaleError, UnavailableError
from loraserve.router.service_oip_answer import Answers
from loraserve.router.service_oip_models import all_models, find_model
from loraserve.router.service_oip_request import InferCall, parse_infer
from loraserve.router.testing import table_of
from loraserve.rpc.oip import open_inference_pb2 as oip
from loraserve.rpc.v1 import inference_pb2
from placement.table import RoutingTable
from tests.support.oip_messages import element, infer, outputs_of

TABLE = table_of(1, {"r0": "127.0.0.1:1"}, {"one": ("r0",), "unplaced": ()})
TEXT = st.text('a é漢🙂\0\n"', min_size=1, max_size=40)


def parse(request: oip.ModelInferRequest, table: RoutingTable = TABLE) -> InferCall:
    return parse_infer(request, table)


def body_of(request: oip.ModelInferRequest) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest.FromString(parse(request).body)


def named(base_model: str, adapters: dict[str, tuple[str, ...]]) -> RoutingTable:
    table = table_of(1, {"r0": "127.0.0.1:1"}, adapters)
    return RoutingTable(version=1, base_model=base_model, replicas=table.replicas, entries=table.entries)


@given(text=TEXT, raw=st.booleans(), shape=st.sampled_from([(1,), (1, 1)]), streaming=st.booleans())
def test_a_prompt_arrives_as_it_was_sent_in_either_form(
    text: str, raw: bool, shape: tuple[int, ...], streaming: bool
) -> None:
    call = parse(infer(text=text, raw=raw, shape=shape, streaming=streaming, id="7"))
    assert inference_pb2.GenerateRequest.FromString(call.body).text == text
    assert (call.id, call.raw, call.shape, call.streaming) == ("7", raw, shape, streaming)


@given(text=TEXT, raw=st.booleans(), shape=st.sampled_from([(1,), (1, 1)]))
def test_an_answer_comes_in_the_requests_form(text: str, raw: bool, shape: tuple[int, ...]) -> None:
    answers = Answers(parse(infer(raw=raw, shape=shape, id="7")))
    message = inference_pb2.GenerateResponse(
        text=text, adapter_version="one@0", finish_reason=inference_pb2.FINISH_REASON_LENGTH
    )
    answer = answers.take(message.SerializeToString())
    assert outputs_of(answer) == {"text_output": text, "finish_reason": "length"}
    assert bool(answer.raw_output_contents) is raw
    assert {tuple(output.shape) for output in answer.outputs} == {shape}
    assert (answer.model_name, answer.model_version, answer.id) == ("one", "0", "7")


SAMPLING: dict[str, Any] = {
    "max_tokens": 7,
    "temperature": 0.5,
    "top_p": 1,
    "top_k": -1,
    "stop": "end",
    "seed": 3,
    "ignore_eos": True,
}


def test_sampling_parameters_mean_the_same_in_the_tensor_and_in_the_request() -> None:
    as_tensor = body_of(infer(sampling=SAMPLING)).sampling
    as_text = body_of(infer(sampling={name: str(value) for name, value in SAMPLING.items()})).sampling
    request = infer()
    for name, value in SAMPLING.items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
        setattr(request.parameters[name], kind[type(value)], value)
    expected = inference_pb2.SamplingParams(**{**SAMPLING, "stop": ["end"]})
    assert as_tensor == as_text == body_of(request).sampling == expected


def test_a_list_a_null_and_the_requests_own_parameter() -> None:
    request = infer(sampling={"stop": ["a", "b"], "seed": None, "max_tokens": 3})
    request.parameters["max_tokens"].uint64_param = 5
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    assert body_of(request).sampling == inference_pb2.SamplingParams(stop=["a", "b"], max_tokens=5)


def test_a_timeout_is_in_microseconds() -> None:
    request = infer()
    request.parameters["timeout"].int64_param = 1_500_000
    assert parse(request).timeout_s == 1.5


def test_the_inputs_of_tritons_vllm_backend_are_understood() -> None:
    request = infer()
    for name in ("stream", "exclude_input_in_output", "return_finish_reason"):
        request.inputs.add(name=name, datatype="BOOL", shape=[1]).contents.bool_contents.append(True)
    assert parse(request).streaming


def changed(**fields: Any) -> oip.ModelInferRequest:
    """A good request with fields of its first tensor changed; None clears one."""
    request = infer()
    for name, value in fields.items():
        request.inputs[0].ClearField(name)  # type: ignore[arg-type]
        if isinstance(value, oip.InferTensorContents):
            request.inputs[0].contents.CopyFrom(value)
        elif isinstance(value, list):
            getattr(request.inputs[0], name).extend(value)
        elif value is not None:
            setattr(request.inputs[0], name, value)
    return request


def with_parameter(name: str, **value: Any) -> oip.ModelInferRequest:
    request = infer()
    request.parameters[name].CopyFrom(oip.InferParameter(**value))
    return request


def with_raw(*contents: bytes) -> oip.ModelInferRequest:
    request = changed(contents=None)
    request.raw_input_contents.extend(contents)
    return request


def with_input_parameter() -> oip.ModelInferRequest:
    request = infer()
    request.inputs[0].parameters["shared_memory_region"].string_param = "x"
    return request


def twice() -> oip.ModelInferRequest:
    request = infer()
    request.inputs.add().CopyFrom(request.inputs[0])
    return request


def asking(*names: str) -> oip.ModelInferRequest:
    request = infer()
    for name in names:
        request.outputs.add(name=name)
    return request


Contents = oip.InferTensorContents


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (oip.ModelInferRequest(model_name="one"), "text_input: missing"),
        (infer(text=""), "text_input: empty"),
        (changed(name="image"), "image: not an input; the inputs are text_input"),
        (changed(datatype="FP32"), "text_input: datatype FP32; give BYTES"),
        (changed(shape=[2]), r"text_input: shape \[2\]"),
        (changed(shape=[]), r"text_input: shape \[\]"),
        (changed(contents=None), "text_input: contents has nothing; give bytes_contents"),
        (changed(contents=Contents(bytes_contents=[b"a", b"b"])), "text_input: contents has bytes_contents"),
        (changed(contents=Contents(fp32_contents=[1.0])), "text_input: contents has fp32_contents"),
        (changed(contents=Contents(bytes_contents=[b"\xff"])), "text_input: not UTF-8 at byte 0"),
        (with_input_parameter(), "text_input: parameter shared_memory_region is not supported"),
        (twice(), "text_input: given twice"),
        (with_raw(element(b"a"), b"\1"), "raw_input_contents: 2 entries for 1 inputs"),
        (with_raw(b"\1\0"), "text_input: 2 raw bytes that are not one element"),
        (with_raw(element(b"a") + element(b"b")), "text_input: 10 raw bytes that are not one element"),
        (infer(sampling={"max_tokens": "many"}), "sampling_parameters.max_tokens: 'many' is not a whole"),
        (infer(sampling={"max_tokens": -1}), "sampling_parameters.max_tokens: -1 is not a whole number in"),
        (infer(sampling={"max_tokens": True}), "sampling_parameters.max_tokens: True is not"),
        (infer(sampling={"temperature": {}}), "sampling_parameters.temperature: {} is not a number"),
        (infer(sampling={"ignore_eos": "maybe"}), "sampling_parameters.ignore_eos: 'maybe' is not true or"),
        (infer(sampling={"stop": [1]}), r"sampling_parameters.stop: \[1\] is not text"),
        (infer(sampling={"lora_name": "a"}), "sampling_parameters.lora_name: unknown"),
        (infer(sampling={"guided": {}}), "sampling_parameters.guided: not supported"),
        (infer(sampling={"logprobs": 1}), "sampling_parameters.logprobs: not supported"),
        (with_parameter("sequence_id", int64_param=1), "parameters.sequence_id: unknown"),
        (with_parameter("timeout", int64_param=0), "parameters.timeout: 0; give microseconds"),
        (with_parameter("timeout", string_param="1"), "parameters.timeout: '1'; give microseconds"),
        (with_parameter("triton_enable_empty_final_response", int64_param=1), "not a bool"),
        (asking("logits"), "logits: not an output"),
        (asking("text_output", "text_output"), "text_output: asked for twice"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(request_: oip.ModelInferRequest, said: str) -> None:
    with pytest.raises(BadInputError, match=said):
        parse(request_)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"seed": ' + "9" * 30 + "}"])
def test_sampling_parameters_that_are_no_object_are_refused(text: str) -> None:
    request = infer()
    tensor = request.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(text.encode())
    with pytest.raises(BadInputError, match="sampling_parameters"):
        parse(request)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text("1.e-x", max_size=5),
    st.lists(st.integers(), max_size=2),
)
NAMES = st.one_of(
    st.sampled_from([field.name for field in inference_pb2.SamplingParams.DESCRIPTOR.fields]),
    st.text(string.ascii_lowercase, max_size=5),
)


@given(
    names=st.lists(st.sampled_from(["text_input", "streaming", "sampling_parameters", "x"]), max_size=3),
    datatype=st.sampled_from(["BYTES", "BOOL", "", "INT8"]),
    contents=st.lists(st.binary(max_size=9), max_size=3),
    raw=st.booleans(),
    sampling=st.dictionaries(NAMES, JUNK, max_size=3),
)
def test_junk_is_parsed_or_refused_and_nothing_else(
    names: list[str], datatype: str, contents: list[bytes], raw: bool, sampling: dict[str, Any]
) -> None:
    request = infer(sampling=sampling) if raw else oip.ModelInferRequest(model_name="one")
    for name in names:
        tensor = request.inputs.add(name=name, datatype=datatype, shape=[1])
        if not raw:
            tensor.contents.bytes_contents.extend(contents)
    if raw and names:
        request.raw_input_contents.extend(contents)
    try:
        call = parse(request)
    except BadInputError:
        return
    generate = inference_pb2.GenerateRequest.FromString(call.body)
    assert generate.text
    assert generate.adapter == "one"


def test_models_are_the_adapters_and_the_base_model_by_the_end_of_its_path() -> None:
    table = named("org/some-model/", {"one": ("r0",), "unplaced": ()})
    assert find_model(table, "one", "0").adapter == "one"
    for name in ("some-model", "base"):
        model = find_model(table, name, "1")
        assert (model.name, model.adapter, model.ready) == (name, "", True)
    assert not find_model(table, "unplaced", "").ready
    assert [model.name for model in all_models(table)] == ["some-model", "one", "unplaced"]


def test_an_adapter_goes_before_the_base_model() -> None:
    table = named("org/one", {"one": ("r0",)})
    assert find_model(table, "one", "").adapter == "one"
    assert find_model(table, "base", "").adapter == ""
    assert [model.name for model in all_models(table)] == ["base", "one"]
    both = named("org/one", {"one": ("r0",), "base": ("r0",)})
    assert find_model(both, "base", "").adapter == "base"
    assert [model.name for model in all_models(both)] == ["base", "one"]


@pytest.mark.parametrize(
    ("name", "version", "error"),
    [("nobody", "", NotFoundError), ("one", "9", NotFoundError), ("", "", BadInputError)],
)
def test_a_model_that_is_not_served_is_refused(name: str, version: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        find_model(TABLE, name, version)


def test_before_the_first_table_there_are_no_models() -> None:
    with pytest.raises(UnavailableError, match="no routing table"):
        find_model(RoutingTable(), "one", "")
    assert all_models(RoutingTable()) == []


def test_another_version_than_the_one_asked_for_is_not_passed_off_as_it() -> None:
    request = infer()
    request.model_version = "0"
    answers = Answers(parse(request))
    late = inference_pb2.GenerateResponse(text="a", adapter_version="one@1")
    with pytest.raises(StaleError, match="one is served in version 1 now"):
        answers.take(late.SerializeToString())

"""From a ModelInferRequest to the router's own GenerateRequest.

What cannot be honoured is refused by name.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from loraserve.errors import BadInputError
from loraserve.router.service_oip_models import INPUTS, OUTPUTS, Model, find_model
from loraserve.rpc.oip import open_inference_pb2 as oip
from loraserve.rpc.v1 import inference_pb2
from placement.table import RoutingTable

Tensor = oip.ModelInferRequest.InferInputTensor
Value = str | bool

TRITON_INPUTS = (
    ("stream", "BOOL"),
    ("exclude_input_in_output", "BOOL"),
    ("return_finish_reason", "BOOL"),
)
"""What clients of Triton's vLLM backend send besides: `stream` means `streaming`."""

_DATATYPES = (*((name, datatype) for name, datatype, _ in INPUTS), *TRITON_INPUTS)
_CONTENTS = (("BYTES", "bytes_contents"), ("BOOL", "bool_contents"))
_LENGTH = struct.Struct("<I")

TIMEOUT = "timeout"
EMPTY_FINAL = "triton_enable_empty_final_response"
NO_OUTPUT_FOR = ("logprobs",)
"""Sampling parameters whose results this protocol's outputs have no place for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferCall:
    """One request, understood: `body` is the loraserve.v1.GenerateRequest that stands for it.

    `raw`, `shape` and `outputs` say how the answer is to be given; `version` is '' unless the client
    asked for one.
    """

    id: str
    model: Model
    version: str
    body: bytes
    streaming: bool
    raw: bool
    shape: tuple[int, ...]
    outputs: tuple[str, ...]
    timeout_s: float | None


def parse_infer(request: oip.ModelInferRequest, table: RoutingTable) -> InferCall:
    """The request as a value.

    NotFoundError for an unknown model or version; BadInputError, naming the tensor or parameter, for
    what cannot be read or honoured. Ranges of sampling parameters are left to the native service.
    """
    model = find_model(table, request.model_name, request.model_version)
    tensors = _read_tensors(request)
    if "text_input" not in tensors:
        raise BadInputError("text_input: missing; give a BYTES tensor of shape [1] with the prompt")
    text = tensors["text_input"]
    if not text:
        raise BadInputError("text_input: empty; give at least one character")
    if tensors.get("exclude_input_in_output") is False:
        raise BadInputError("exclude_input_in_output: false; the output never repeats the input")
    if "stream" in tensors and "streaming" in tensors:
        raise BadInputError("stream: streaming is given too, and means the same; leave one out")
    parameters, timeout_s = _read_parameters(request)
    sampling = _sampling(str(tensors.get("sampling_parameters", "")), parameters)
    body = inference_pb2.GenerateRequest(adapter=model.adapter, text=str(text), sampling=sampling)
    prompt = next(tensor for tensor in request.inputs if tensor.name == "text_input")
    return InferCall(
        id=request.id,
        model=model,
        version=request.model_version,
        body=body.SerializeToString(),
        streaming=bool(tensors.get("streaming", tensors.get("stream", False))),
        raw=bool(request.raw_input_contents),
        shape=tuple(prompt.shape),
        outputs=_read_outputs(request),
        timeout_s=timeout_s,
    )


def _read_tensors(request: oip.ModelInferRequest) -> dict[str, Value]:
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise BadInputError(
            f"raw_input_contents: {len(raw)} entries for {len(request.inputs)} inputs;"
            " give one per input, or contents in every input"
        )
    datatypes = dict(_DATATYPES)
    values: dict[str, Value] = {}
    for index, tensor in enumerate(request.inputs):
        name = tensor.name
        if name not in datatypes:
            raise BadInputError(f"{name}: not an input; the inputs are {', '.join(datatypes)}")
        if name in values:
            raise BadInputError(f"{name}: given twice; give it once")
        _check_tensor(tensor, datatypes[name])
        content = _raw_content(tensor, raw[index]) if raw else _typed_content(tensor)
        values[name] = _text(name, content) if isinstance(content, bytes) else content
    return values


def _check_tensor(tensor: Tensor, datatype: str) -> None:
    name = tensor.name
    if tensor.datatype != datatype:
        raise BadInputError(f"{name}: datatype {tensor.datatype or 'missing'}; give {datatype}")
    if tuple(tensor.shape) not in ((1,), (1, 1)):
        raise BadInputError(
            f"{name}: shape {list(tensor.shape)}; one request takes one prompt, so give [1] or [1, 1]"
        )
    if tensor.parameters:
        raise BadInputError(
            f"{name}: parameter {min(tensor.parameters)} is not supported; send the content in the message"
        )


def _raw_content(tensor: Tensor, content: bytes) -> bytes | bool:
    name = tensor.name
    if tensor.HasField("contents"):
        raise BadInputError(f"{name}: contents beside raw_input_contents; give one of them")
    if tensor.datatype == "BOOL":
        if content not in (b"\0", b"\1"):
            raise BadInputError(f"{name}: {len(content)} raw bytes; give one byte, 0 or 1")
        return content == b"\1"
    if len(content) < _LENGTH.size or _LENGTH.unpack_from(content)[0] != len(content) - _LENGTH.size:
        raise BadInputError(
            f"{name}: {len(content)} raw bytes that are not one element;"
            " give its length as 4 little-endian bytes, then the element"
        )
    return content[_LENGTH.size :]


def _typed_content(tensor: Tensor) -> bytes | bool:
    field = dict(_CONTENTS)[tensor.datatype]
    given = {descriptor.name for descriptor, _ in tensor.contents.ListFields()}
    elements: list[bytes | bool] = list(getattr(tensor.contents, field))
    if given != {field} or len(elements) != 1:
        has = ", ".join(sorted(given)) or "nothing"
        raise BadInputError(f"{tensor.name}: contents has {has}; give {field} with one element")
    return elements[0]


def _text(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(f"{name}: not UTF-8 at byte {error.start}") from None


def _read_outputs(request: oip.ModelInferRequest) -> tuple[str, ...]:
    names = [output.name for output in request.outputs]
    for output in request.outputs:
        if output.name not in OUTPUTS:
            raise BadInputError(f"{output.name}: not an output; the outputs are {', '.join(OUTPUTS)}")
        if names.count(output.name) > 1:
            raise BadInputError(f"{output.name}: asked for twice; ask once")
        if output.parameters:
            raise BadInputError(
                f"{output.name}: parameter {min(output.parameters)} is not supported; leave it out"
            )
    return tuple(names) or OUTPUTS


def _read_parameters(request: oip.ModelInferRequest) -> tuple[dict[str, Any], float | None]:
    """The sampling parameters among the request's, and its timeout in seconds."""
    values = {
        name: getattr(parameter, parameter.WhichOneof("parameter_choice") or "", None)
        for name, parameter in request.parameters.items()
    }
    if not isinstance(values.pop(EMPTY_FINAL, False), bool):
        raise BadInputError(f"parameters.{EMPTY_FINAL}: not a bool; give bool_param")
    timeout_us = values.pop(TIMEOUT, None)
    if timeout_us is None:
        return values, None
    if isinstance(timeout_us, bool) or not isinstance(timeout_us, int) or timeout_us <= 0:
        raise BadInputError(f"parameters.{TIMEOUT}: {timeout_us!r}; give microseconds, above 0")
    return values, timeout_us / 1e6


def _sampling(text: str, parameters: dict[str, Any]) -> inference_pb2.SamplingParams:
    """From both places; the request's parameters go before those in the tensor."""
    sampling = inference_pb2.SamplingParams()
    for name, value in _json_object(text).items() if text else ():
        if name not in parameters:
            _set(sampling, name, value, f"sampling_parameters.{name}")
    for name, value in parameters.items():
        _set(sampling, name, value, f"parameters.{name}")
    return sampling


def _json_object(text: str) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"sampling_parameters: not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise BadInputError('sampling_parameters: not a JSON object; give one, as in {"max_tokens": 16}')
    return tree


def _set(sampling: inference_pb2.SamplingParams, name: str, value: Any, where: str) -> None:
    if value is None:
        return
    field = sampling.DESCRIPTOR.fields_by_name.get(name)
    if field is None:
        known = ", ".join(_settable(sampling))
        raise BadInputError(f"{where}: unknown; the sampling parameters are {known}")
    if name not in _settable(sampling):
        raise BadInputError(f"{where}: not supported by this protocol's service; leave it out")
    try:
        if field.is_repeated:
            elements = value if isinstance(value, list) else [value]
            getattr(sampling, name).extend(_convert(field, element) for element in elements)
        else:
            setattr(sampling, name, _convert(field, value))
    except (TypeError, ValueError, LookupError, OverflowError):
        several = " (or a list of such)" if field.is_repeated else ""
        raise BadInputError(f"{where}: {repr(value)[:80]} is not {_kind(field)}{several}") from None


def _settable(sampling: Message) -> Iterator[str]:
    for field in sampling.DESCRIPTOR.fields:
        if field.message_type is None and field.name not in NO_OUTPUT_FOR:
            yield field.name


def _kind(field: FieldDescriptor) -> str:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return "text"
        case FieldDescriptor.CPPTYPE_BOOL:
            return "true or false"
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return "a number"
        case _:
            return "a whole number in range"


def _convert(field: FieldDescriptor, value: object) -> str | bool | float | int:
    """TypeError, ValueError or LookupError unless the value says the same in the field's type.

    Numbers may come as text: Triton's own client sends them so.
    """
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            if isinstance(value, str):
                return value
        case FieldDescriptor.CPPTYPE_BOOL:
            if isinstance(value, str):
                return {"true": True, "false": False}[value.lower()]
            if isinstance(value, bool):
                return value
        case FieldDescriptor.CPPTYPE_DOUBLE:
            if isinstance(value, int | float | str) and not isinstance(value, bool):
                return float(value)
        case _:
            if isinstance(value, float) and value.is_integer():
                return int(value)
            if isinstance(value, int | str) and not isinstance(value, bool):
                return int(value)
    raise TypeError

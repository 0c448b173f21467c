"""Open Inference requests for tests."""

import json
import struct
from typing import Any

from loraserve.rpc.oip import open_inference_pb2 as oip


def element(content: bytes) -> bytes:
    """One element of a raw BYTES tensor."""
    return struct.pack("<I", len(content)) + content


def infer(
    model: str = "one",
    text: str = "hi",
    *,
    id: str = "",
    streaming: bool | None = None,
    sampling: dict[str, Any] | None = None,
    raw: bool = False,
    shape: tuple[int, ...] = (1,),
) -> oip.ModelInferRequest:
    """A request in either of the two ways to send tensors; `sampling` goes into the tensor."""
    request = oip.ModelInferRequest(model_name=model, id=id)
    values: list[tuple[str, bytes | bool]] = [("text_input", text.encode())]
    if streaming is not None:
        values.append(("streaming", streaming))
    if sampling is not None:
        values.append(("sampling_parameters", json.dumps(sampling).encode()))
    for name, value in values:
        is_bool = isinstance(value, bool)
        tensor = request.inputs.add(name=name, datatype="BOOL" if is_bool else "BYTES", shape=shape)
        if isinstance(value, bool):
            if raw:
                request.raw_input_contents.append(bytes([value]))
            else:
                tensor.contents.bool_contents.append(value)
        elif raw:
            request.raw_input_contents.append(element(value))
        else:
            tensor.contents.bytes_contents.append(value)
    return request


def outputs_of(response: oip.ModelInferResponse) -> dict[str, str]:
    """Output name to text, whichever way it came; each must be one BYTES element."""
    found = {}
    for index, output in enumerate(response.outputs):
        assert output.datatype == "BYTES"
        if response.raw_output_contents:
            assert not output.HasField("contents")
            content = response.raw_output_contents[index]
            assert content == element(content[4:])
            found[output.name] = content[4:].decode()
        else:
            (typed,) = output.contents.bytes_contents
            found[output.name] = typed.decode()
    return found


def is_final(answer: oip.ModelStreamInferResponse) -> bool:
    """What the answer says of itself."""
    return answer.infer_response.parameters["triton_final_response"].bool_param

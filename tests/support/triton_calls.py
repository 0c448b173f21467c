"""Run by the python of an environment with tritonclient, which knows nothing of LoRAServe.

usage: triton_calls.py ADDRESS MODEL...     prints what the client saw as one JSON object
       triton_calls.py --descriptors        prints the protocol as that package has it, in base64
"""

import asyncio
import base64
import json
import queue
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

PROMPT = "Once upon a time"
SAMPLING = {"temperature": "0", "max_tokens": "12", "ignore_eos": True}
TIMEOUT_S = 60


def tensors(*, streaming: bool) -> list[Any]:
    """The three inputs, as numpy arrays."""
    values = {
        "text_input": (np.array([PROMPT.encode()], dtype=np.object_), "BYTES"),
        "streaming": (np.array([streaming]), "BOOL"),
        "sampling_parameters": (np.array([json.dumps(SAMPLING).encode()], dtype=np.object_), "BYTES"),
    }
    made = []
    for name, (array, datatype) in values.items():
        made.append(triton.InferInput(name, [1], datatype))
        made[-1].set_data_from_numpy(array)
    return made


def text_of(result: Any, name: str = "text_output") -> str:
    """The one element of an output."""
    (element,) = result.as_numpy(name)
    return str(element.decode())


def error_of(call: Any) -> list[str]:
    """The status and message of a call that must fail."""
    try:
        call()
    except InferenceServerException as error:
        return [str(error.status()), str(error.message())]
    raise AssertionError("the call did not fail")


def unary(client: Any, models: list[str]) -> dict[str, Any]:
    """Everything but streaming."""
    unknown = triton.InferInput("image", [1], "BYTES")
    unknown.set_data_from_numpy(np.array([b"x"], dtype=np.object_))
    inputs = tensors(streaming=False)
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": {name: client.is_model_ready(name) for name in [*models, "nobody"]},
        "server": client.get_server_metadata(as_json=True),
        "metadata": client.get_model_metadata(models[0], as_json=True),
        "config": client.get_model_config(models[0], as_json=True),
        "index": client.get_model_repository_index(as_json=True),
        "infer": {
            name: text_of(client.infer(name, inputs, request_id="7", client_timeout=TIMEOUT_S))
            for name in models
        },
        "parameters": text_of(client.infer(models[0], inputs[:1], parameters={"max_tokens": 3})),
        "unknown_model": error_of(lambda: client.infer("nobody", inputs)),
        "unknown_input": error_of(lambda: client.infer(models[0], [*inputs, unknown])),
    }


def streamed(client: Any, models: list[str]) -> dict[str, Any]:
    """All models twice in one stream, and one that there is not."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    asked = {f"{model}/{turn}" for model in models for turn in range(2)}
    for name in sorted(asked):
        client.async_stream_infer(
            name.partition("/")[0],
            tensors(streaming=True),
            request_id=name,
            enable_empty_final_response=True,
        )
    client.async_stream_infer("nobody", tensors(streaming=True), request_id="nobody")
    steps: dict[str, list[str]] = {name: [] for name in asked}
    reasons: dict[str, str] = {}
    errors: list[str] = []
    while len(reasons) < len(asked) or not errors:
        result, error = answers.get(timeout=TIMEOUT_S)
        if error is not None:
            errors.append(error.message())
            continue
        response = result.get_response()
        assert response.id not in reasons, f"{response.id} was answered after its last answer"
        steps[response.id].append(text_of(result))
        if response.parameters["triton_final_response"].bool_param:
            reasons[response.id] = text_of(result, "finish_reason")
    client.stop_stream()
    assert answers.empty()
    return {"steps": steps, "reasons": reasons, "errors": errors}


async def streamed_async(address: str, model: str) -> list[str]:
    """The same with the package's asyncio client, whose stream ends when its requests are answered."""

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": model, "inputs": tensors(streaming=True), "request_id": "a"}

    async with triton_aio.InferenceServerClient(address) as client:
        found = []
        async for result, error in client.stream_infer(requests(), stream_timeout=TIMEOUT_S):
            assert error is None, error
            found.append(text_of(result))
    return found


def descriptors() -> str:
    """The files of the protocol, as a FileDescriptorSet."""
    files = FileDescriptorSet()
    for module in (service_pb2, model_config_pb2):
        module.DESCRIPTOR.CopyToProto(files.file.add())
    return base64.b64encode(files.SerializeToString()).decode()


def main(arguments: list[str]) -> None:
    """What the usage says."""
    if arguments == ["--descriptors"]:
        print(descriptors())
        return
    address, *models = arguments
    with triton.InferenceServerClient(address) as client:
        seen = unary(client, models) | {"stream": streamed(client, models)}
    seen["async"] = asyncio.run(streamed_async(address, models[0]))
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1:])

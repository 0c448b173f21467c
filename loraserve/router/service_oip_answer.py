"""From the native service's messages to ModelInferResponses."""

import struct

from grpc import StatusCode

from loraserve.errors import StaleError
from loraserve.router.service_oip_models import FINISH_REASON, TEXT_OUTPUT, version_of
from loraserve.router.service_oip_request import InferCall
from loraserve.rpc.codec import decode_step
from loraserve.rpc.oip import open_inference_pb2 as oip
from loraserve.rpc.v1 import inference_pb2

FINAL = "triton_final_response"


class Answers:
    """The answers to one request, in order; `final` once the last one is made.

    `ended` is the caller's to set, once the last one is on its way.
    """

    def __init__(self, call: InferCall) -> None:
        self.final = False
        self.ended = False
        self._call = call
        self._version = ""

    def take(self, message: bytes) -> oip.ModelInferResponse:
        """The answer for one loraserve.v1.GenerateResponse.

        StaleError if the weights are not those that the client asked for: the model has changed since
        the request was read.
        """
        call = self._call
        generated = inference_pb2.GenerateResponse.FromString(message)
        step = decode_step(generated)
        if not self._version:
            self._version = version_of(generated.adapter_version)
            if call.version not in ("", self._version):
                raise StaleError(f"model_version: {call.model.name} is served in version {self._version} now")
        self.final = step.finish_reason is not None
        answer = self._empty()
        reason = step.finish_reason.value if step.finish_reason else ""
        contents = {TEXT_OUTPUT: step.text.encode(), FINISH_REASON: reason.encode()}
        for name in call.outputs:
            output = answer.outputs.add(name=name, datatype="BYTES", shape=call.shape)
            if call.raw:
                answer.raw_output_contents.append(raw_element(contents[name]))
            else:
                output.contents.bytes_contents.append(contents[name])
        return answer

    def stream(self, message: bytes) -> oip.ModelStreamInferResponse:
        """The same for a stream, where it says whether it is the last."""
        answer = self.take(message)
        answer.parameters[FINAL].bool_param = self.final
        return oip.ModelStreamInferResponse(infer_response=answer)

    def end(self) -> oip.ModelStreamInferResponse:
        """A last answer without outputs."""
        self.final = True
        answer = self._empty()
        answer.parameters[FINAL].bool_param = True
        return oip.ModelStreamInferResponse(infer_response=answer)

    def _empty(self) -> oip.ModelInferResponse:
        call = self._call
        return oip.ModelInferResponse(model_name=call.model.name, model_version=self._version, id=call.id)


def failed(request: oip.ModelInferRequest, code: StatusCode, details: str) -> oip.ModelStreamInferResponse:
    """The last answer to a request that has failed; the message begins with the name of its status."""
    answer = oip.ModelInferResponse(
        model_name=request.model_name, model_version=request.model_version, id=request.id
    )
    answer.parameters[FINAL].bool_param = True
    return oip.ModelStreamInferResponse(error_message=f"{code.name}: {details}", infer_response=answer)


def raw_element(content: bytes) -> bytes:
    """A BYTES tensor of one element as raw contents have it."""
    return struct.pack("<I", len(content)) + content

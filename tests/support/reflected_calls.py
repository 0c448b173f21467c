"""What grpcurl does, in Python: calls a server about which only its reflection is known.

usage: reflected_calls.py ADDRESS METHOD JSON...     each METHOD as package.Service/Method, its request as
                                                     JSON; prints the services and the answers as one object
"""

import json
import sys
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

TIMEOUT_S = 60


def call(channel: grpc.Channel, pool: Any, path: str, request: str) -> list[Any]:
    """The method's answers, each as JSON; messages are made from what the server says of them."""
    service, _, name = path.partition("/")
    method = pool.FindServiceByName(service).FindMethodByName(name)
    assert not method.client_streaming
    make = channel.unary_stream if method.server_streaming else channel.unary_unary
    stub: Any = make(
        f"/{path}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    message = json_format.Parse(request, GetMessageClass(method.input_type)(), descriptor_pool=pool)
    answer = stub(message, timeout=TIMEOUT_S)
    answers = list(answer) if method.server_streaming else [answer]
    return [json_format.MessageToDict(one, preserving_proto_field_name=True) for one in answers]


def main(arguments: list[str]) -> None:
    """What the usage says."""
    address, *rest = arguments
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        calls = zip(rest[::2], rest[1::2], strict=True)
        answers = {path: call(channel, pool, path, request) for path, request in calls}
        print(json.dumps({"services": sorted(database.get_services()), "answers": answers}))


if __name__ == "__main__":
    main(sys.argv[1:])

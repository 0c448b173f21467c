"""The replica's gRPC handlers: requests in, engine steps out, load reports to routers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from loraserve.errors import BadInputError
from loraserve.replica.server import ReplicaServer
from loraserve.request import GenerationRequest
from loraserve.rpc import server as rpc_server
from loraserve.rpc.codec import check_protocol, encode_step, join_steps, parse_generate
from loraserve.rpc.internal.v1 import internal_pb2, internal_pb2_grpc
from loraserve.rpc.status import abort_with
from loraserve.rpc.table_codec import encode_load
from loraserve.rpc.v1 import inference_pb2
from placement.types import VersionId

HEARTBEAT_S = 1.0
SERVICE = "loraserve.internal.v1.Replica"


class ReplicaService(internal_pb2_grpc.ReplicaServicer):
    """Thin: parse, run, encode, map errors to statuses."""

    def __init__(self, replica: ReplicaServer) -> None:
        self._replica = replica

    async def Execute(
        self, request: internal_pb2.ExecuteRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Stream one request's steps."""
        try:
            parsed = _parse(request)
            first = True
            async with aclosing(self._replica.generate(parsed)) as steps:
                async for step in steps:
                    yield encode_step(
                        step, first=first, request_id=parsed.request_id, version_id=parsed.version_id
                    )
                    first = False
        except Exception as error:
            await abort_with(context, error)

    async def ExecuteUnary(
        self, request: internal_pb2.ExecuteRequest, context: Any
    ) -> inference_pb2.GenerateResponse:
        """Run one request to its end and answer once."""
        try:
            parsed = _parse(request)
            async with aclosing(self._replica.generate(parsed)) as steps:
                joined = join_steps([step async for step in steps])
            return encode_step(joined, first=True, request_id=parsed.request_id, version_id=parsed.version_id)
        except Exception as error:
            await abort_with(context, error)

    async def WatchLoad(
        self, request: internal_pb2.WatchLoadRequest, context: Any
    ) -> AsyncIterator[internal_pb2.LoadReport]:
        """Report the load whenever it has changed, and as a heartbeat when it has not."""
        try:
            check_protocol(request.protocol_version, f"router {request.router_id}")
        except BadInputError as error:
            await abort_with(context, error)
        interval_s = self._replica.config.replica.report_interval_s
        last: tuple[object, ...] = ()
        silent_s = 0.0
        while True:
            report = self._replica.load_report()
            content = (report.running, report.waiting, report.outstanding_tokens, report.kv_cache_usage)
            if content != last or silent_s >= HEARTBEAT_S:
                yield encode_load(report)
                last, silent_s = content, 0.0
            await asyncio.sleep(interval_s)
            silent_s += interval_s


def _parse(request: internal_pb2.ExecuteRequest) -> GenerationRequest:
    check_protocol(request.protocol_version, "the router")
    try:
        message = inference_pb2.GenerateRequest.FromString(request.generate)
    except DecodeError as error:
        raise BadInputError("generate: not a serialized loraserve.v1.GenerateRequest") from error
    version = VersionId(request.version_id) if request.version_id else None
    return parse_generate(message, request_id=request.request_id, version_id=version)


def add_replica_service(replica: ReplicaServer, server: grpc.aio.Server) -> rpc_server.Health:
    """Register the replica's service with its health; the caller binds and starts the server."""
    internal_pb2_grpc.add_ReplicaServicer_to_server(ReplicaService(replica), server)
    return rpc_server.Health(server, (SERVICE,))

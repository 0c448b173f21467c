"""The replica's gRPC handlers: the link to each router, and requests that clients bring themselves."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from loraserve.errors import BadInputError, StaleError, verdict_of
from loraserve.replica.in_flight import Turn
from loraserve.replica.server import ReplicaServer
from loraserve.request import GenerationRequest
from loraserve.rpc import server as rpc_server
from loraserve.rpc.codec import encode_step, join_steps, parse_generate
from loraserve.rpc.internal.v1 import internal_pb2, internal_pb2_grpc
from loraserve.rpc.link_server import LinkServer
from loraserve.rpc.status import abort_with
from loraserve.rpc.table_codec import encode_load
from loraserve.rpc.v1 import inference_pb2, inference_pb2_grpc
from placement.types import VersionId

SERVICE = "loraserve.internal.v1.Replica"
INFERENCE = "loraserve.v1.Inference"


class ReplicaService(internal_pb2_grpc.ReplicaServicer):
    """What routers use. Thin: parse, run, encode; the link does the rest."""

    def __init__(self, replica: ReplicaServer) -> None:
        self._replica = replica

    async def Connect(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        """One router's requests, for as long as it stays."""
        self._replica.routers += 1
        try:
            interval_s = self._replica.config.replica.report_interval_s
            await LinkServer(self, context, report_interval_s=interval_s).serve()
        finally:
            self._replica.routers -= 1

    async def open(self, start: internal_pb2.Start) -> AsyncGenerator[bytes, None]:
        """One request that a router has sent here."""
        message = _message(start.generate)
        request = _request(message, start.request_id, start.version_id, tuple(start.resume_token_ids))
        turn = Turn(
            order=(message.attempt, start.router_attempt),
            waited_s=start.waited_s,
            has_missed=start.has_missed,
        )
        shown_id = message.request_id or start.request_id
        # A request that goes on here has given its id and version elsewhere.
        first = not start.resume_token_ids
        async with aclosing(self._replica.generate(request, turn)) as steps:
            if start.unary:
                joined = join_steps([step async for step in steps])
                yield encode_step(
                    joined, first=True, request_id=shown_id, version_id=request.version_id
                ).SerializeToString()
                return
            async for step in steps:
                yield encode_step(
                    step, first=first, request_id=shown_id, version_id=request.version_id
                ).SerializeToString()
                first = False

    def grant(self, lease: internal_pb2.LeaseGrant, ended: Callable[[str], None]) -> None:
        """A client will come with this lease."""
        version = VersionId(lease.version_id) if lease.version_id else None
        self._replica.leases.grant(
            lease.lease_id,
            version,
            lease.lease_s,
            ended,
            waited_s=lease.waited_s,
            has_missed=lease.has_missed,
        )

    def refused(self, refusal: internal_pb2.Refusal) -> None:
        """It was asked for all the same."""
        version = VersionId(refusal.version_id)
        self._replica.tokens.refused(version, refusal.prompt_tokens, refusal.max_tokens)
        self._replica.service.refused(version)

    def load(self) -> internal_pb2.LoadReport:
        """The replica's load now."""
        self._replica.leases.sweep()
        return encode_load(self._replica.load_report())


class DirectService(inference_pb2_grpc.InferenceServicer):
    """What clients use that have picked this replica through a router."""

    def __init__(self, replica: ReplicaServer) -> None:
        self._replica = replica

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> None:  # type: ignore[override]
        """Stream one request's steps."""
        # Written here and not yielded: a cancelled write would end the call behind a generator's back.
        write = context.write
        try:
            parsed, turn = self._parse(request)
            shown_id = request.request_id or parsed.request_id
            first = True
            async with aclosing(self._replica.generate(parsed, turn)) as steps:
                async for step in steps:
                    await write(
                        encode_step(step, first=first, request_id=shown_id, version_id=parsed.version_id)
                    )
                    first = False
        except asyncio.CancelledError as cancelled:
            await _end(context, cancelled)
        except grpc.aio.InternalError:
            # A write that failed: gRPC has ended the call, mostly because the client has gone.
            raise asyncio.CancelledError from None
        except Exception as error:
            await abort_with(context, error)

    async def Complete(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> inference_pb2.GenerateResponse:
        """Run one request to its end and answer once."""
        try:
            parsed, turn = self._parse(request)
            shown_id = request.request_id or parsed.request_id
            async with aclosing(self._replica.generate(parsed, turn)) as steps:
                joined = join_steps([step async for step in steps])
            return encode_step(joined, first=True, request_id=shown_id, version_id=parsed.version_id)
        except asyncio.CancelledError as cancelled:
            await _end(context, cancelled)
        except Exception as error:
            await abort_with(context, error)

    async def Pick(self, request: inference_pb2.PickRequest, context: Any) -> inference_pb2.PickResponse:
        """Routers alone choose."""
        return await context.abort(  # type: ignore[no-any-return]
            grpc.StatusCode.UNIMPLEMENTED, "Pick: this is a replica; ask a router"
        )

    def PickMany(self, request_iterator: Any, context: Any) -> AsyncIterator[inference_pb2.PickManyResponse]:
        """Routers alone choose."""
        return self._refuse(context)

    async def _refuse(self, context: Any) -> AsyncIterator[inference_pb2.PickManyResponse]:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "PickMany: this is a replica; ask a router")
        yield inference_pb2.PickManyResponse()

    def _parse(self, message: inference_pb2.GenerateRequest) -> tuple[GenerationRequest, Turn]:
        lease = message.lease
        if not lease.lease_id:
            raise BadInputError("lease: missing; a replica takes requests that a router's Pick has sent")
        name = lease.adapter_version.rpartition("@")[0]
        if name != message.adapter:
            raise BadInputError(
                f"lease.adapter_version: {lease.adapter_version!r} is no version of adapter"
                f" {message.adapter!r}; send the answer to Pick as it came"
            )
        request_id = message.request_id or f"direct {lease.lease_id}"
        turn = Turn(order=(message.attempt, 0), lease_id=lease.lease_id)
        return _request(message, request_id, lease.adapter_version, ()), turn


async def _end(context: Any, cancelled: asyncio.CancelledError) -> NoReturn:
    """Tell the client why the replica has cancelled its request; if it was not the replica, nobody asks."""
    verdict, task = verdict_of(cancelled), asyncio.current_task()
    if verdict is None or task is None:
        raise cancelled
    task.uncancel()
    await abort_with(context, verdict)


def _message(body: bytes) -> inference_pb2.GenerateRequest:
    try:
        return inference_pb2.GenerateRequest.FromString(body)
    except DecodeError as error:
        raise BadInputError("generate: not a serialized loraserve.v1.GenerateRequest") from error


def _request(
    message: inference_pb2.GenerateRequest, request_id: str, version_id: str, resumed: tuple[int, ...]
) -> GenerationRequest:
    if message.HasField("resume") and message.resume.adapter_version != version_id:
        raise StaleError(
            f"resume.adapter_version: {message.resume.adapter_version!r} is not what the adapter is now"
            f" ({version_id!r}); send the request again from its beginning"
        )
    version = VersionId(version_id) if version_id else None
    return parse_generate(
        message,
        request_id=message.idempotency_key or request_id,
        version_id=version,
        resumed_token_ids=resumed,
    )


def add_replica_service(replica: ReplicaServer, server: grpc.aio.Server) -> rpc_server.Health:
    """Register the replica's services with their health; the caller binds and starts the server."""
    internal_pb2_grpc.add_ReplicaServicer_to_server(ReplicaService(replica), server)
    inference_pb2_grpc.add_InferenceServicer_to_server(DirectService(replica), server)
    return rpc_server.Health(server, (SERVICE, INFERENCE))

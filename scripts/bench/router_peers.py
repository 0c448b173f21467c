"""The processes that `scripts/bench/router` measures with, each on an event loop of its own.

`replica`: a replica and a controller in one, answering with canned bytes. `bare`: a gRPC
pass-through of a dozen lines, the floor for any router written on grpc.aio. Each prints its port
and serves until its standard input closes.
"""

import asyncio
import math
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from loraserve.rpc.tuning import tune_grpc

tune_grpc()

import grpc  # noqa: E402
import uvloop  # noqa: E402

from loraserve.rpc.codec import PROTOCOL_VERSION  # noqa: E402
from loraserve.rpc.internal.v1 import internal_pb2, internal_pb2_grpc  # noqa: E402
from loraserve.rpc.link_server import LinkServer  # noqa: E402
from loraserve.rpc.server import bind, make_channel, make_server  # noqa: E402
from loraserve.rpc.table_codec import encode_table  # noqa: E402
from loraserve.rpc.v1 import inference_pb2  # noqa: E402
from placement.table import RoutingTable, TableEntry, TableReplica  # noqa: E402
from placement.types import AdapterName, Holder, ReplicaId, VersionId  # noqa: E402

INFERENCE = "loraserve.v1.Inference"
STEP_S = 0.02
REPORT_PERIOD_S = 0.1
ADAPTER = "tenant"
MESSAGE = inference_pb2.GenerateResponse(
    token_ids=[1234], text=" token", prompt_tokens=16, output_tokens=8
).SerializeToString()

Context = grpc.aio.ServicerContext[Any, Any]


class StepClock:
    """All streams step together, as the sequences of one engine's batch do."""

    def __init__(self) -> None:
        self._step: asyncio.Event | None = None

    async def next_step(self) -> None:
        """Wait for the next multiple of `STEP_S`."""
        if self._step is None:
            loop = asyncio.get_running_loop()
            self._step = asyncio.Event()
            loop.call_at((math.floor(loop.time() / STEP_S) + 1) * STEP_S, self._fire)
        await self._step.wait()

    def _fire(self) -> None:
        assert self._step is not None
        self._step.set()
        self._step = None


class CannedReplica(internal_pb2_grpc.ReplicaServicer):
    """`max_tokens` messages per stream: one per step when `ignore_eos` is set, else at once."""

    def __init__(self) -> None:
        self._clock = StepClock()
        self._sequence = 0

    async def stream(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        """Write the messages."""
        for _ in range(request.sampling.max_tokens):
            if request.sampling.ignore_eos:
                await self._clock.next_step()
            await context.write(MESSAGE)

    async def Connect(self, request_iterator: Any, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        """A router's link."""
        await LinkServer(self, context, report_interval_s=REPORT_PERIOD_S).serve()

    async def open(self, start: internal_pb2.Start) -> AsyncGenerator[bytes, None]:
        """One request of the link."""
        request = inference_pb2.GenerateRequest.FromString(start.generate)
        if start.unary:
            yield MESSAGE
            return
        for _ in range(request.sampling.max_tokens):
            if request.sampling.ignore_eos:
                await self._clock.next_step()
            yield MESSAGE

    def grant(self, lease: internal_pb2.LeaseGrant, ended: Callable[[str], None]) -> None:
        """Over at once, as if the client had come."""
        ended(lease.lease_id)

    def refused(self, refusal: internal_pb2.Refusal) -> None:
        """Nobody is turned away here."""

    def load(self) -> internal_pb2.LoadReport:
        """The same load every time."""
        self._sequence += 1
        return internal_pb2.LoadReport(
            protocol_version=PROTOCOL_VERSION,
            replica_id="r0",
            incarnation="canned",
            sequence=self._sequence,
            running=self._sequence % 2,
            routers=1,
        )

    async def generate(self, body: bytes, context: Context) -> None:
        """`Inference.Generate`, for a client without a router."""
        await self.stream(inference_pb2.GenerateRequest.FromString(body), context)

    async def complete(self, body: bytes, context: Context) -> bytes:
        """`Inference.Complete`, for a client without a router."""
        inference_pb2.GenerateRequest.FromString(body)
        return MESSAGE


class CannedController(internal_pb2_grpc.ControlServicer):
    """One table, naming one replica and one adapter on it."""

    def __init__(self, address: str) -> None:
        replica = TableReplica(replica_id=ReplicaId("r0"), address=address, max_lora_rank=64)
        entry = TableEntry(
            name=AdapterName(ADAPTER),
            version_id=VersionId(f"{ADAPTER}@0123456789abcdef"),
            rank=8,
            holders=(Holder(replica_id=replica.replica_id, share=1.0),),
        )
        self._table = RoutingTable(
            version=1,
            base_model="canned",
            replicas={replica.replica_id: replica},
            entries={entry.name: entry},
        )

    async def WatchTable(  # noqa: N802
        self, request: internal_pb2.WatchTableRequest, context: Context
    ) -> AsyncIterator[internal_pb2.RoutingTable]:
        """The table, then nothing more."""
        yield encode_table(self._table)
        await asyncio.Event().wait()


async def serve_replica() -> None:
    """Run the replica and the controller until the standard input closes."""
    server = make_server()
    replica = CannedReplica()
    stream, unary = grpc.unary_stream_rpc_method_handler, grpc.unary_unary_rpc_method_handler
    public: dict[str, Any] = {"Generate": stream(replica.generate), "Complete": unary(replica.complete)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(INFERENCE, public),))
    internal_pb2_grpc.add_ReplicaServicer_to_server(replica, server)
    port = bind(server, "127.0.0.1", 0)
    internal_pb2_grpc.add_ControlServicer_to_server(CannedController(f"127.0.0.1:{port}"), server)
    await _serve(server, port)


async def serve_bare(upstream: str) -> None:
    """The pass-through: no checks, no choice, no records, no deadline."""
    server, channel = make_server(), make_channel(upstream)
    upstream_stream: Any = channel.unary_stream(f"/{INFERENCE}/Generate")
    upstream_unary: Any = channel.unary_unary(f"/{INFERENCE}/Complete")

    async def generate(body: bytes, context: Context) -> AsyncIterator[bytes]:
        async for message in upstream_stream(body):
            yield message

    async def complete(body: bytes, context: Context) -> bytes:
        answer: bytes = await upstream_unary(body)
        return answer

    handlers: dict[str, Any] = {
        "Generate": grpc.unary_stream_rpc_method_handler(generate),
        "Complete": grpc.unary_unary_rpc_method_handler(complete),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(INFERENCE, handlers),))
    await _serve(server, bind(server, "127.0.0.1", 0))
    await channel.close()


async def _serve(server: grpc.aio.Server, port: int) -> None:
    await server.start()
    print(f'{{"port": {port}}}', flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    uvloop.run(serve_bare(sys.argv[2]) if sys.argv[1] == "bare" else serve_replica())

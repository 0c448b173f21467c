"""A router's link to one replica, with calls that look like gRPC's own, for tests of replicas."""

import asyncio
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import grpc

from loraserve.rpc.internal.v1 import internal_pb2
from loraserve.rpc.link_client import Link, LinkStream, StreamEndedError
from loraserve.rpc.server import make_channel
from loraserve.rpc.v1 import inference_pb2

WAIT_S = 10.0


class LinkCall:
    """One request: read or iterate a stream, await a unary answer; `cancel` ends it."""

    def __init__(self, stream: LinkStream) -> None:
        self.stream = stream

    async def read(self) -> Any:
        """The next message, or EOF."""
        try:
            body = await self.stream.read()
        except StreamEndedError as error:
            metadata = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(error.code, metadata, metadata, str(error)) from error
        return grpc.aio.EOF if body is None else inference_pb2.GenerateResponse.FromString(body)

    async def __aiter__(self) -> AsyncIterator[inference_pb2.GenerateResponse]:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message

    def __await__(self) -> Generator[Any, None, inference_pb2.GenerateResponse]:
        return self.read().__await__()

    def cancel(self) -> None:
        """End the request at the replica."""
        self.stream.close()


class LinkBench:
    """A link that is up, its load reports and ended leases."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.reports: list[internal_pb2.LoadReport] = []
        self.ended_leases: list[str] = []

    def call(self, start: internal_pb2.Start, *, unary: bool = False, timeout: float = WAIT_S) -> LinkCall:
        """Send a request."""
        start.unary = unary
        start.remaining_s = timeout
        return LinkCall(self.link.start(start))


@asynccontextmanager
async def linked(
    address: str, *, router_id: str = "router", on_state: Callable[[bool], None] = lambda up: None
) -> AsyncIterator[LinkBench]:
    """Connect to a replica for the block."""
    channel = make_channel(address)
    up = asyncio.Event()

    def note(is_up: bool) -> None:
        if is_up:
            up.set()
        on_state(is_up)

    link = Link(
        channel,
        peer="replica",
        router_id=router_id,
        rng=Random(1),
        on_load=lambda report: bench.reports.append(report),
        on_leases_ended=lambda leases: bench.ended_leases.extend(leases),
        on_state=note,
    )
    bench = LinkBench(link)
    keeper = asyncio.create_task(link.run())
    try:
        async with asyncio.timeout(WAIT_S):
            await up.wait()
        yield bench
    finally:
        keeper.cancel()
        await asyncio.wait([keeper])
        link.close()
        await channel.close()

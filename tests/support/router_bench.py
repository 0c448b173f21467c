"""A router between a fake controller and fake replicas, all on real gRPC servers of this process."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraserve.router.router import Router
from loraserve.router.testing import FakeController, FakeReplica, table_of
from loraserve.rpc.v1 import inference_pb2, inference_pb2_grpc, management_pb2_grpc

DEADLINE_S = 20.0


@dataclass
class Bench:
    """What a test talks to; `publish` waits until the router has the table."""

    controller: FakeController
    replicas: dict[str, FakeReplica]
    router: Router
    port: int
    channel: grpc.aio.Channel
    version: int = 0

    @property
    def inference(self) -> Any:
        return inference_pb2_grpc.InferenceStub(self.channel)

    @property
    def management(self) -> Any:
        return management_pb2_grpc.ManagementStub(self.channel)

    async def publish(self, adapters: dict[str, tuple[str, ...]], *, wait: bool = True) -> None:
        self.version += 1
        addresses = {name: replica.address for name, replica in self.replicas.items()}
        await self.controller.publish(table_of(self.version, addresses, adapters))
        if wait:
            await until(lambda: self.router.table.version >= self.version)

    async def health(self, service: str = "") -> str:
        stub: Any = health_pb2_grpc.HealthStub(self.channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

    async def serving(self, expected: bool) -> None:
        await until(lambda: self.router.serving is expected)

    async def idle(self) -> None:
        await until(lambda: self.router.counters.in_flight == 0)


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Return when the condition holds; what changes it runs on this very loop."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def ask(adapter: str = "", text: str = "hi", **fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(adapter=adapter, text=text, **fields)


async def code_of(call: Any) -> grpc.StatusCode:
    """The status of a unary call, or of a stream read to its end."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


MakeBench = Callable[..., Any]

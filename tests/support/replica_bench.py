"""A replica with an emulated engine that a test can hold, and its stubs over real gRPC."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from loraserve.clock import ManualClock
from loraserve.config import parse_config
from loraserve.engines.base import AdapterFiles
from loraserve.engines.emulated import EmulatedEngine
from loraserve.errors import EngineDeadError, WorkFailedError
from loraserve.replica.server import ReplicaServer
from loraserve.rpc.internal.v1 import internal_pb2
from loraserve.rpc.v1 import inference_pb2
from placement.types import ReplicaId, VersionId
from tests.support.link_calls import LinkBench, LinkCall, linked

WAIT_S = 10.0


async def eventually(condition: Callable[[], bool]) -> None:
    """Give the other tasks turns until the condition holds, which nobody announces."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


class HeldEngine(EmulatedEngine):
    """An engine that takes as many steps and finishes as many loads as the test allows, None: all."""

    def __init__(self, *sections: Any) -> None:
        super().__init__(*sections, clock=ManualClock(), sleep=self._step_when_allowed)
        self.loads_begun = 0
        self.finishes_cancelled_loads = False
        self.deaf = False
        self.failing_unloads = 0
        self.unloads_begun = 0
        self.may_unload = asyncio.Event()
        self.may_unload.set()
        self._steps: int | None = None
        self._loads: int | None = None
        self._news = asyncio.Condition()

    async def allow(self, *, steps: int | None = None, loads: int | None = None) -> None:
        """What may happen from now on."""
        async with self._news:
            self._steps, self._loads = steps, loads
            self._news.notify_all()

    async def load_adapter(self, adapter: AdapterFiles) -> None:
        """Load once allowed; as vLLM does, finish a load whose caller has gone, if told so."""
        self.loads_begun += 1
        try:
            async with self._news:
                await self._news.wait_for(lambda: self._loads is None or self._loads > 0)
                self._loads = None if self._loads is None else self._loads - 1
        except asyncio.CancelledError:
            if self.finishes_cancelled_loads:
                self._adapters[adapter.version_id] = adapter
            raise
        await super().load_adapter(adapter)

    async def unload_adapter(self, version_id: VersionId) -> None:
        """Unload once allowed, or fail as often as the test says."""
        self.unloads_begun += 1
        await self.may_unload.wait()
        if self.failing_unloads:
            self.failing_unloads -= 1
            raise WorkFailedError("not now")
        await super().unload_adapter(version_id)

    async def abort(self, request_id: str) -> None:
        """End the request, unless deaf."""
        if not self.deaf:
            await super().abort(request_id)

    async def _step_when_allowed(self, seconds: float) -> None:
        async with self._news:
            await self._news.wait_for(lambda: self._steps is None or self._steps > 0)
            self._steps = None if self._steps is None else self._steps - 1
        await asyncio.sleep(0)


@dataclass(kw_only=True, slots=True)
class ReplicaBench:
    """A started replica and a way to it."""

    server: ReplicaServer
    engine: HeldEngine
    router: LinkBench

    def message(
        self, request_id: str = "q", *, version: str = "", text: str = "hello", **sampling: Any
    ) -> internal_pb2.Start:
        """What a router sends."""
        generate = inference_pb2.GenerateRequest(
            text=text, sampling=inference_pb2.SamplingParams(ignore_eos=True, **sampling)
        )
        return internal_pb2.Start(
            request_id=request_id,
            version_id=version,
            generate=generate.SerializeToString(),
        )

    def execute(self, request_id: str = "q", *, unary: bool = False, **options: Any) -> LinkCall:
        """Begin a request."""
        return self.router.call(self.message(request_id, **options), unary=unary)

    async def running(self, request_id: str = "q", **options: Any) -> Any:
        """A streamed request that has given its first token and is then held in the engine."""
        load = self.engine.load()
        before = load.running + load.waiting
        await self.engine.allow(steps=0)
        call = self.execute(request_id, **{"max_tokens": 1000, **options})
        await eventually(lambda: (now := self.engine.load()).running + now.waiting > before)
        # A busy engine has already composed its next step, without this request.
        await self.engine.allow(steps=2 if before else 1)
        assert (await call.read()).output_tokens == 1
        return call


class MakeBench(Protocol):
    """Builds a bench from configuration sections."""

    async def __call__(self, **sections: dict[str, Any]) -> ReplicaBench:
        """A started replica; its accounts are checked at the end of the test."""
        ...


@asynccontextmanager
async def replica_bench(**sections: dict[str, Any]) -> AsyncIterator[ReplicaBench]:
    """A replica that at the end must hold nothing for anybody, in step with its engine."""
    tree: dict[str, dict[str, Any]] = {
        "engine": {"kind": "emulated", "pool_adapters": 2, "pool_bytes": 10_000},
        "replica": {"drain_timeout_s": WAIT_S, "report_interval_s": 0.005},
    }
    for name, section in sections.items():
        tree.setdefault(name, {}).update(section)
    config = parse_config(tree)
    engine = HeldEngine(config.engine, config.emulated, config.model)
    server = ReplicaServer(ReplicaId("r0"), config, engine)
    description = await server.start()
    try:
        async with linked(description.address) as router:
            yield ReplicaBench(server=server, engine=engine, router=router)
            await engine.allow()
            await eventually(lambda: server.load_report().outstanding_tokens == 0)
        server.check_invariants(idle=True)
        engine.check_invariants()
        assert engine.load().running == engine.load().waiting == 0
        with suppress(EngineDeadError):  # one that a test has killed
            assert await engine.resident() == frozenset(server.pool.resident())
    finally:
        await server.stop(0.0)


async def status_of_call(call: Any) -> tuple[grpc.StatusCode, str]:
    """How a call ended; a streamed one is read to its end."""
    try:
        if hasattr(call, "read"):
            while await call.read() is not grpc.aio.EOF:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""

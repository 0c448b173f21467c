"""A router in this process: the public protocol over real gRPC, answered by one emulated engine."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from loraserve.clock import WallClock
from loraserve.config import EmulatedSection, EngineSection, ModelSection
from loraserve.engines.base import AdapterFiles, EngineLoad
from loraserve.engines.emulated import EmulatedEngine
from loraserve.errors import AlreadyExistsError, LoraServeError, NotFoundError
from loraserve.rpc import codec
from loraserve.rpc.server import Health, bind, make_server
from loraserve.rpc.status import abort_with
from loraserve.rpc.v1 import inference_pb2 as inference
from loraserve.rpc.v1 import inference_pb2_grpc, management_pb2_grpc
from loraserve.rpc.v1 import management_pb2 as management
from placement.types import AdapterName, VersionId, version_id

TRAILER = (
    ("loraserve-replica", "replica-0"),
    ("loraserve-table-version", "7"),
    ("loraserve-reason", "only holder"),
)


class FakeRouter(inference_pb2_grpc.InferenceServicer, management_pb2_grpc.ManagementServicer):
    """Serves its engine's adapters by name; with `refusal` set it refuses every request so."""

    def __init__(self, engine: EmulatedEngine) -> None:
        self.engine = engine
        self.refusal: LoraServeError | None = None
        self.adapters: dict[str, tuple[VersionId, int]] = {}
        self.requests: list[inference.GenerateRequest] = []
        self.health: Health
        self.address = ""
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Return when no request runs here any more; TimeoutError and AssertionError if one leaked."""
        async with asyncio.timeout(10):
            await self._idle.wait()
        assert self.engine.load() == EngineLoad(running=0, waiting=0, kv_cache_usage=0.0)
        self.engine.check_invariants()

    async def add(self, name: str, rank: int) -> VersionId:
        """Serve an adapter under this name."""
        version = version_id(AdapterName(name), "0" * 64)
        files = AdapterFiles(version_id=version, directory=Path("unused"), rank=rank, size_bytes=1)
        await self.engine.load_adapter(files)
        self.adapters[name] = (version, rank)
        return version

    async def Generate(  # noqa: N802
        self, request: inference.GenerateRequest, context: Any
    ) -> AsyncIterator[inference.GenerateResponse]:
        """Stream the engine's steps."""
        self.requests.append(request)
        name = request.request_id or f"fake-{len(self.requests)}"
        context.set_trailing_metadata(TRAILER)
        self._active += 1
        self._idle.clear()
        try:
            if self.refusal is not None:
                raise self.refusal
            version = self._version(request.adapter)
            value = codec.parse_generate(request, request_id=name, version_id=version)
            first = True
            async with aclosing(self.engine.generate(value)) as steps:
                async for step in steps:
                    yield codec.encode_step(step, first=first, request_id=name, version_id=version)
                    first = False
        except LoraServeError as error:
            await abort_with(context, error, TRAILER)
        finally:
            self._active -= 1
            if self._active == 0:
                self._idle.set()

    async def Complete(  # noqa: N802
        self, request: inference.GenerateRequest, context: Any
    ) -> inference.GenerateResponse:
        """The same as one message."""
        parts = [part async for part in self.Generate(request, context)]
        whole = codec.join_steps(codec.decode_step(part) for part in parts)
        return codec.encode_step(
            whole, first=True, request_id=parts[0].request_id, version_id=self._version(request.adapter)
        )

    async def RegisterAdapter(  # noqa: N802
        self, request: management.RegisterAdapterRequest, context: Any
    ) -> management.RegisterAdapterResponse:
        """Any source will do; its last letters are the rank."""
        if request.name in self.adapters:
            await abort_with(context, AlreadyExistsError(f"adapter {request.name} is registered"))
        await self.add(request.name, int(request.source.rpartition("r")[2]))
        return management.RegisterAdapterResponse(adapter=self._adapter(request.name), table_version=7)

    async def RemoveAdapter(  # noqa: N802
        self, request: management.RemoveAdapterRequest, context: Any
    ) -> management.RemoveAdapterResponse:
        """Forget a name."""
        if request.name not in self.adapters:
            await abort_with(context, NotFoundError(f"adapter {request.name} is not registered"))
        version, _ = self.adapters.pop(request.name)
        await self.engine.unload_adapter(version)
        return management.RemoveAdapterResponse(table_version=8)

    async def ListAdapters(  # noqa: N802
        self, request: management.ListAdaptersRequest, context: Any
    ) -> management.ListAdaptersResponse:
        """All names."""
        return management.ListAdaptersResponse(adapters=[self._adapter(name) for name in self.adapters])

    async def GetStatus(  # noqa: N802
        self, request: management.GetStatusRequest, context: Any
    ) -> management.GetStatusResponse:
        """One replica, and the adapters."""
        return management.GetStatusResponse(
            cluster="fake",
            base_model="emulated",
            policy="none",
            table_version=7,
            controller_reachable=True,
            replicas=[management.Replica(replica_id="replica-0", state="ready", resident=["a@0"])],
            adapters=[self._adapter(name) for name in self.adapters],
            router=management.RouterStats(router_id="router-0", requests=len(self.requests)),
        )

    def _version(self, name: str) -> VersionId | None:
        if not name:
            return None
        if name not in self.adapters:
            raise NotFoundError(f"adapter {name} is not registered")
        return self.adapters[name][0]

    def _adapter(self, name: str) -> management.Adapter:
        version, rank = self.adapters[name]
        holder = management.Holder(replica_id="replica-0", share=1.0)
        return management.Adapter(name=name, version=version, rank=rank, size_bytes=1, holders=[holder])


@asynccontextmanager
async def fake_router(*, speed: float = 20.0, serving: bool = True) -> AsyncIterator[FakeRouter]:
    """A running fake; its engine's conservation laws are checked when it ends."""
    config = EngineSection(kind="emulated", max_num_seqs=256, adapter_slots=8)
    engine = EmulatedEngine(config, EmulatedSection(speed=speed), ModelSection(), clock=WallClock())
    await engine.start()
    router = FakeRouter(engine)
    server = make_server()
    inference_pb2_grpc.add_InferenceServicer_to_server(router, server)
    management_pb2_grpc.add_ManagementServicer_to_server(router, server)
    router.health = Health(server, ())
    router.address = f"127.0.0.1:{bind(server, '127.0.0.1', 0)}"
    await server.start()
    await router.health.set_serving(serving)
    try:
        yield router
        await router.wait_idle()
    finally:
        await server.stop(0)
        await engine.close()

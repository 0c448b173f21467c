"""A replica that clients reach directly, over real gRPC, which fails by script; and its way of answering.

What it says comes from an emulated engine, which several fakes may share: greedy output is then the same
wherever a request goes on.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from loraserve.engines.emulated import EmulatedEngine
from loraserve.errors import LoraServeError, NotFoundError
from loraserve.rpc import codec
from loraserve.rpc.server import bind, make_server
from loraserve.rpc.status import abort_with
from loraserve.rpc.v1 import inference_pb2 as inference
from loraserve.rpc.v1 import inference_pb2_grpc
from placement.types import VersionId

Adapters = Mapping[str, tuple[VersionId, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Break:
    """How one request ends too early: after so many messages, by an error or by the server's death.

    With `when` it waits for that event first: a dying server's last messages may never arrive.
    """

    after: int = 0
    error: LoraServeError | None = None
    when: asyncio.Event | None = None


class Pace:
    """Keeps an engine from stepping while what it said is being sent: a message is one step, on any machine.

    `sleep` is what the engine sleeps with.
    """

    def __init__(self) -> None:
        self._num_sending = 0
        self._sent = asyncio.Event()
        self._sent.set()

    async def sleep(self, seconds: float) -> None:
        """Sleep, and then until everything is sent; consumers come first."""
        await asyncio.sleep(seconds)
        # Those that the last step has woken run before this one is woken again.
        await asyncio.sleep(0)
        await self._sent.wait()

    @contextmanager
    def sending(self) -> Iterator[None]:
        """While a message is on its way out."""
        self._num_sending += 1
        self._sent.clear()
        try:
            yield
        finally:
            self._num_sending -= 1
            if self._num_sending == 0:
                self._sent.set()


class FakeAnswers(inference_pb2_grpc.InferenceServicer):
    """Answers requests from an engine; each takes the next entry of `script`, if there is one."""

    trailers: tuple[tuple[str, str], ...] = ()

    def __init__(self, engine: EmulatedEngine, adapters: Adapters, pace: Pace) -> None:
        self.engine = engine
        self.pace = pace
        self.served = adapters
        self.script: deque[Break | None] = deque()
        self.requests: list[inference.GenerateRequest] = []
        self.server: grpc.aio.Server
        self.address = ""
        self.num_active = 0
        self._stopping = asyncio.Lock()
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Return when no request runs here any more; TimeoutError if one leaked."""
        async with asyncio.timeout(10):
            await self._idle.wait()

    async def Generate(  # noqa: N802
        self, request: inference.GenerateRequest, context: Any
    ) -> AsyncIterator[inference.GenerateResponse]:
        """Stream the engine's steps, as far as the script lets them."""
        self.requests.append(request)
        broken = self.script.popleft() if self.script else None
        context.set_trailing_metadata(self.trailers)
        self.num_active += 1
        self._idle.clear()
        try:
            sent = 0
            async with aclosing(self._steps(request)) as steps:
                async for step in steps:
                    if broken is not None and sent >= broken.after:
                        await self._break(broken)
                    with self.pace.sending():
                        yield step
                    sent += 1
            if broken is not None:
                await self._break(broken)
        except LoraServeError as error:
            await abort_with(context, error, self.trailers)
        finally:
            self.num_active -= 1
            if self.num_active == 0:
                self._idle.set()

    async def Complete(  # noqa: N802
        self, request: inference.GenerateRequest, context: Any
    ) -> inference.GenerateResponse:
        """The same as one message."""
        parts = [part async for part in self.Generate(request, context)]
        whole = codec.join_steps(codec.decode_step(part) for part in parts)
        return codec.encode_step(
            whole, first=True, request_id=parts[0].request_id, version_id=self.version(request.adapter)
        )

    async def Pick(self, request: inference.PickRequest, context: Any) -> inference.PickResponse:  # noqa: N802
        """Routers alone choose."""
        raise NotImplementedError

    def PickMany(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        """Routers alone choose."""
        raise NotImplementedError

    def check(self, request: inference.GenerateRequest) -> None:
        """Raise what the request is refused with."""

    def version(self, name: str) -> VersionId | None:
        """The weights of a name; NotFoundError if it is unknown."""
        if not name:
            return None
        if name not in self.served:
            raise NotFoundError(f"adapter {name} is not registered")
        return self.served[name][0]

    async def listen(self, port: int = 0) -> None:
        """Serve at a new port, or again at an old one after `die`."""
        self.server = make_server()
        self.add_services(self.server)
        self.address = f"127.0.0.1:{bind(self.server, '127.0.0.1', port)}"
        await self.server.start()

    def add_services(self, server: grpc.aio.Server) -> None:
        """Register what this fake serves."""
        inference_pb2_grpc.add_InferenceServicer_to_server(self, server)

    async def die(self) -> None:
        """Drop every connection and listen no more."""
        # One at a time: gRPC crashes when a server is stopped twice at once.
        async with self._stopping:
            await self.server.stop(None)

    async def come_back(self) -> None:
        """Listen again where it did before."""
        await self.listen(int(self.address.rpartition(":")[2]))

    async def _steps(
        self, request: inference.GenerateRequest
    ) -> AsyncGenerator[inference.GenerateResponse, None]:
        self.check(request)
        version = self.version(request.adapter)
        # Of this fake and attempt alone: what a dead server has let go of is not reported to anyone.
        name = f"{id(self)} {len(self.requests)} {request.request_id}"
        value = codec.parse_generate(request, request_id=name, version_id=version)
        first = True
        async with aclosing(self.engine.generate(value)) as steps:
            async for step in steps:
                yield codec.encode_step(
                    step, first=first, request_id=request.request_id or "fake", version_id=version
                )
                first = False

    async def _break(self, broken: Break) -> None:
        if broken.when is not None:
            await broken.when.wait()
        if broken.error is not None:
            raise broken.error
        # In a task of its own: stopping the server cancels this one.
        dying = asyncio.ensure_future(self.die())
        await asyncio.wait([dying])
        await asyncio.Event().wait()


class FakeReplica(FakeAnswers):
    """Takes requests with a lease alone, as replicas do."""

    def __init__(self, replica_id: str, engine: EmulatedEngine, adapters: Adapters, pace: Pace) -> None:
        super().__init__(engine, adapters, pace)
        self.replica_id = replica_id

    def check(self, request: inference.GenerateRequest) -> None:
        """The fake router's leases end in the replica's name."""
        assert request.lease.lease_id.endswith(f" {self.replica_id}"), request.lease

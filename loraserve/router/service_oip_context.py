"""The context that a request of another protocol has inside the router's own Inference service."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, Protocol

import grpc

Context = grpc.aio.ServicerContext[Any, Any]
Trailers = tuple[tuple[str, str], ...]


class NativeService(Protocol):
    """The two methods of `loraserve.v1.Inference` that such requests go through, as bytes."""

    async def generate(self, body: bytes, context: Any) -> None:
        """One message per engine step, each given to `context.write`."""

    async def complete(self, body: bytes, context: Any) -> bytes:
        """The whole answer."""


class CallEndedError(grpc.aio.AbortError):
    """What `InnerContext.abort` raises: the status that the request has ended with."""

    def __init__(self, code: grpc.StatusCode, details: str, trailers: Trailers) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details
        self.trailers = trailers


class InnerContext:
    """What the service uses of a gRPC context, for one request of the call `outer`.

    Messages go to `on_message`; the deadline is the outer call's, or `timeout_s` from now if that is
    sooner; cancelling is cancelling the task.
    """

    def __init__(
        self,
        outer: Context,
        *,
        on_message: Callable[[bytes], Awaitable[None]],
        timeout_s: float | None,
    ) -> None:
        self.trailers: Trailers = ()
        self._outer = outer
        self._on_message = on_message
        self._deadline_s = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s

    async def write(self, message: bytes) -> None:
        """Pass one message on; returns when there is room for the next."""
        await self._on_message(message)

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Trailers = ()
    ) -> NoReturn:
        """End this request, and not the call that it came by."""
        raise CallEndedError(code, details, tuple(trailing_metadata))

    def set_trailing_metadata(self, trailing_metadata: Trailers) -> None:
        """Kept in `trailers`."""
        self.trailers = tuple(trailing_metadata)

    def time_remaining(self) -> float | None:
        """Seconds until the deadline, None without one."""
        outer_s = self._outer.time_remaining()
        if self._deadline_s is None:
            return outer_s
        own_s = self._deadline_s - asyncio.get_running_loop().time()
        return own_s if outer_s is None else min(own_s, outer_s)

    def invocation_metadata(self) -> Any:
        """The outer call's."""
        return self._outer.invocation_metadata()

    def peer(self) -> str:
        """The outer call's."""
        return self._outer.peer()

    def done(self) -> bool:
        """Whether the outer call is over."""
        return self._outer.done()

    def cancelled(self) -> bool:
        """Whether the outer call's client has gone."""
        return self._outer.cancelled()

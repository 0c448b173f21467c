"""What a request gives its caller: a stream of steps, or one completion."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Self

import grpc

from loraserve.client.failures import is_unavailable
from loraserve.client.submission import StreamCall, Submission
from loraserve.client_types import ServedBy
from loraserve.errors import LoraServeError
from loraserve.request import FinishReason, GenerationStep
from loraserve.rpc import codec
from loraserve.rpc.v1 import inference_pb2

Spawn = Callable[[Coroutine[Any, Any, StreamCall]], "asyncio.Task[StreamCall]"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer; `step` holds all of its tokens and text, `attempts` is how often it was sent."""

    step: GenerationStep
    request_id: str
    adapter_version: str | None
    served_by: ServedBy
    attempts: int = 1


class GenerationStream:
    """The steps of one request, in order; the last one carries a finish reason.

    When the replica or the router that serves it is lost, it goes on elsewhere without a seam, if it can.
    Iterating raises the request's error. Leaving early needs `aclose`, which cancels the request on the
    server; ending the iteration, failing, and cancelling the reading task need nothing.
    """

    def __init__(self, submission: Submission, spawn: Spawn) -> None:
        self._submission = submission
        self._spawn = spawn
        # A task per attempt, not per message: it chooses where to send, and waits where it must.
        self._opening: asyncio.Task[StreamCall] | None = spawn(submission.stream())
        self._call: StreamCall | None = None
        self._messages: AsyncIterator[inference_pb2.GenerateResponse] | None = None
        self._heard = False
        self._finished = False
        self._over = False
        self._prompt_tokens = 0

    @property
    def request_id(self) -> str:
        """The request's name in all logs."""
        return self._submission.request_id

    @property
    def adapter_version(self) -> str | None:
        """`name@digest16` of the weights, once the first step has come; None for the base model."""
        return self._submission.adapter_version or None

    @property
    def served_by(self) -> ServedBy:
        """Who served the last attempt; through a router that is known when the stream has ended."""
        return self._submission.served_by

    @property
    def attempts(self) -> int:
        """How often the request was sent."""
        return self._submission.attempts

    @property
    def resumed(self) -> bool:
        """Whether the answer went on elsewhere after some of its tokens."""
        return self._submission.resumed

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GenerationStep:
        while not self._over:
            try:
                messages = self._messages or await self._begin()
                return self._take(await anext(messages))
            except StopAsyncIteration:
                self._over = True
                if self._call is not None:
                    self._submission.note_trailers(await self._call.trailing_metadata())
            except grpc.aio.AioRpcError as error:
                last = self._go_on(error)
                if last is not None:
                    return last
            except (LoraServeError, asyncio.CancelledError):
                self.cancel()
                raise
        raise StopAsyncIteration

    def cancel(self) -> None:
        """Cancel the request if it still runs."""
        self._over = True
        if self._opening is not None:
            self._opening.cancel()
            self._opening.add_done_callback(_cancel_call)
        if self._call is not None:
            self._call.cancel()

    async def aclose(self) -> None:
        """The same as `cancel`, for `contextlib.aclosing`."""
        self.cancel()

    async def _begin(self) -> AsyncIterator[inference_pb2.GenerateResponse]:
        assert self._opening is not None, "neither sent nor being sent"
        self._call = await self._opening
        self._opening = None
        self._heard = False
        self._messages = aiter(self._call)
        return self._messages

    def _take(self, message: inference_pb2.GenerateResponse) -> GenerationStep:
        if not self._heard:
            self._heard = True
            self._submission.heard(message)
            self._prompt_tokens = message.prompt_tokens
        step = codec.decode_step(message)
        self._submission.add(step)
        self._finished = step.finish_reason is not None
        return step

    def _go_on(self, error: grpc.aio.AioRpcError) -> GenerationStep | None:
        """Begin the next attempt, or raise the request's error, or end it with the step returned."""
        self._messages = self._call = None
        if is_unavailable(error) and (self._finished or self._submission.all_tokens_came):
            # Only the end of an answer that the caller has was lost.
            self._over = True
            return None if self._finished else self._last_step()
        try:
            self._submission.failed(error)
        except LoraServeError as final:
            self._over = True
            raise final from error
        self._opening = self._spawn(self._submission.stream())
        return None

    def _last_step(self) -> GenerationStep:
        return GenerationStep(
            token_ids=(),
            text="",
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._submission.num_tokens,
            finish_reason=FinishReason.LENGTH,
        )


def _cancel_call(opening: "asyncio.Task[StreamCall]") -> None:
    """End the call that a task had made before its cancellation reached it."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().cancel()

"""Calls into a vLLM engine that do not wait for ever, and work that outlives its caller."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from loraserve.errors import EngineDeadError, LoraServeError, WorkFailedError

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 600.0
_LIVENESS_POLL_S = 0.5


class EngineCalls:
    """The engine's client, called so that an engine that dies is noticed."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self._tasks: set[asyncio.Task[None]] = set()

    async def workers(self, method: str, *args: object) -> list[Any]:
        """Call a method of every worker rank, between two engine steps; one answer each.

        EngineDeadError, or WorkFailedError for whatever else went wrong.
        """
        try:
            answers: list[Any] = await self.call(self.client.collective_rpc(method, args=args))
        except LoraServeError:
            raise
        except Exception as error:  # vLLM sends what happened in its process as a bare Exception
            raise WorkFailedError(f"vLLM's workers failed in {method}: {error}") from error
        return answers

    async def call(self, call: Coroutine[Any, Any, Any]) -> Any:
        """The call's result. vLLM never answers a call that its engine died under: watch that too."""
        task = asyncio.ensure_future(call)
        try:
            for _ in range(int(CALL_TIMEOUT_S / _LIVENESS_POLL_S)):
                done, _ = await asyncio.wait({task}, timeout=_LIVENESS_POLL_S)
                if self.client.errored:
                    if done:
                        task.exception()  # seen: it says the same
                    raise EngineDeadError("the vLLM engine process is gone")
                if done:
                    return task.result()
            raise WorkFailedError(f"vLLM did not answer within {CALL_TIMEOUT_S:.0f} s")
        finally:
            task.cancel()

    async def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work to its end even if the caller goes away, so that records and engine never differ."""
        await asyncio.shield(self.start(work))

    def start(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Begin the work; it is kept until it ends, and its error is taken as seen."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, LoraServeError):
            logger.error("work on a vLLM engine failed: %r", error)

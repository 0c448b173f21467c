"""A process that stands for an engine's own: it does nothing, and its end is the engine's end."""

import asyncio
import contextlib
from collections.abc import Callable


class StandInProcess:
    """Reads a pipe that nobody writes to, so that it also ends with its parent, however that ends."""

    def __init__(self, process: asyncio.subprocess.Process, on_end: Callable[[str], None]) -> None:
        self.pid = process.pid
        self._process = process
        self._watch = asyncio.create_task(self._report(on_end), name="emulated-engine-process")

    @classmethod
    async def start(cls, on_end: Callable[[str], None]) -> "StandInProcess":
        """Start it; `on_end` is called on this loop, with the reason, when it ends before `close`."""
        process = await asyncio.create_subprocess_exec(
            "cat", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL
        )
        return cls(process, on_end)

    async def close(self) -> None:
        """End it and wait until it has gone; safe to call twice."""
        self._watch.cancel()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def _report(self, on_end: Callable[[str], None]) -> None:
        status = await self._process.wait()
        on_end(f"the engine's process {self.pid} has ended with status {status}")

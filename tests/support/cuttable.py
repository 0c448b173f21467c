"""A network path that a test can cut: bytes are held back, nothing is closed, until it is healed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

SLICE_BYTES = 65_536


class Path:
    """Forwards TCP from `port` of 127.0.0.1 to a target."""

    def __init__(self) -> None:
        self.port = 0
        self._whole = asyncio.Event()
        self._whole.set()

    def cut(self) -> None:
        """Let no byte through."""
        self._whole.clear()

    def heal(self) -> None:
        """Let through what was held back, and all that comes."""
        self._whole.set()

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
        """Carry one connection until one side ends it."""
        there, back = await asyncio.open_connection("127.0.0.1", port)
        pumps = [asyncio.create_task(self._pump(*way)) for way in ((reader, back), (there, writer))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for one in (writer, back):
                one.close()
                with suppress(OSError):
                    await one.wait_closed()

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(SLICE_BYTES):
                await self._whole.wait()
                target.write(data)
                await target.drain()


@asynccontextmanager
async def cuttable_path(target_port: int) -> AsyncIterator[Path]:
    """A path to a port of 127.0.0.1."""
    path, tasks = Path(), set[asyncio.Task[None]]()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(path.forward(reader, writer, target_port)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    path.port = server.sockets[0].getsockname()[1]
    try:
        yield path
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

"""A process of `bench fetch`: a fabric, and perhaps an engine, told over its standard input what to do.

`python -m loraserve.bench.fetch_worker` reads one JSON object per line and answers each with one. One such
process holds adapters, another fetches them; it ends when its input does.
"""

import asyncio
import gc
import json
import mmap
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from pathlib import Path
from typing import IO, Any

from loraserve.bench.fetch_subject import MAX_RANK
from loraserve.engines.base import AdapterFiles, Engine
from loraserve.errors import LoraServeError, WorkFailedError
from loraserve.fabric.fabric import Fabric
from loraserve.fabric.wanted import Acquired, FabricOptions, PeerAddress, Wanted
from loraserve.request import GenerationRequest, SamplingParams
from loraserve.transport.base import Region, Transport
from loraserve.transport.listener import Listener
from loraserve.transport.registry import OpenTransports, open_transports
from placement.types import VersionId

IDLE_TIMEOUT_S = 10.0
_ACTIVE_TIMEOUT_S = 120.0
_LOOK_AGAIN_S = 0.0005
_PROMPT = (8, 9, 10, 11)

Answer = dict[str, Any]


class FetchWorker:
    """Does what each command says; made on the loop that runs it."""

    def __init__(self) -> None:
        self._transports: tuple[Transport, ...] = ()
        self._fabric: Fabric | None = None
        self._engine: Engine | None = None
        self._places: dict[int, memoryview] = {}

    async def handle(self, command: Mapping[str, Any]) -> Answer:
        """The answer to one command; LoraServeError."""
        actions: Mapping[str, Callable[..., Awaitable[Answer]]] = {
            "open": self._open,
            "start_engine": self._start_engine,
            "hold": self._hold,
            "drop": self._drop,
            "fetch": self._fetch,
            "publish": self._publish,
            "withdraw": self._withdraw,
            "read": self._read,
        }
        arguments = dict(command)
        return await actions[arguments.pop("do")](**arguments)

    async def close(self) -> None:
        """End the engine, then the fabric."""
        if self._engine is not None:
            await self._engine.close()
        if self._fabric is not None:
            await self._fabric.close()

    @property
    def fabric(self) -> Fabric:
        """The fabric that `open` made."""
        assert self._fabric is not None, "open comes first"
        return self._fabric

    async def _open(self, *, host: str, schemes: list[str], capacity_bytes: int, tls: str = "") -> Answer:
        """Bring the fabric up; `tls` is what UCX may use, '' for its own choice."""
        opened = _opened(schemes, host, tls)
        self._transports = opened.transports
        options = FabricOptions(inflight_bytes=capacity_bytes, idle_timeout_s=IDLE_TIMEOUT_S)
        self._fabric = Fabric(opened.transports, capacity_bytes=capacity_bytes, options=options)
        addresses = {scheme: address.hex() for scheme, address in self._fabric.addresses}
        return {"addresses": addresses, "left_out": dict(opened.left_out), "pid": os.getpid()}

    async def _start_engine(self, *, config: dict[str, Any]) -> Answer:
        from loraserve.config import parse_config
        from loraserve.engines.factory import make_engine

        self._engine = make_engine(parse_config(config))
        info = await self._engine.start()
        return {"pids": list(info.pids)}

    async def _hold(self, *, wanted: dict[str, Any]) -> Answer:
        acquired = await self.fabric.acquire(wanted_of(wanted))
        return {"size_bytes": acquired.size_bytes}

    async def _drop(self, *, version: str) -> Answer:
        await self._forget(VersionId(version))
        return {}

    async def _fetch(self, *, wanted: dict[str, Any]) -> Answer:
        """Until it is resident, and with an engine until it is active; afterwards it is gone again."""
        asked = wanted_of(wanted)
        gc.collect()
        began_s = time.perf_counter()
        acquired = await self.fabric.acquire(asked)
        resident_s = time.perf_counter() - began_s
        answer: Answer = {
            "resident_s": resident_s,
            "active_s": None,
            "source": acquired.scheme or acquired.source,
            "size_bytes": acquired.size_bytes,
            "verify_s": acquired.seconds.verify_s,
        }
        try:
            if self._engine is not None:
                active_s = await self._activate(asked, acquired, self._engine)
                answer["active_s"] = active_s - began_s
                await self._engine.unload_adapter(asked.version_id)
        finally:
            await self._forget(asked.version_id)
        return answer

    async def _activate(self, asked: Wanted, acquired: Acquired, engine: Engine) -> float:
        """When it was active."""
        version = asked.version_id
        files = AdapterFiles(
            version_id=version,
            directory=asked.directory or Path(),  # the segment is there: nobody reads files
            rank=asked.rank,
            size_bytes=acquired.size_bytes,
            digest=asked.digest,
            segment=acquired.segment,
        )
        await engine.load_adapter(files)
        # Some engines give a slot to what is asked for only.
        asking = asyncio.create_task(_ask(engine, version))
        try:
            async with asyncio.timeout(_ACTIVE_TIMEOUT_S):
                # Nobody announces it.
                while not engine.is_active(version):  # noqa: ASYNC110
                    await asyncio.sleep(_LOOK_AGAIN_S)
                active_s = time.perf_counter()
                await asking
        except TimeoutError:
            raise WorkFailedError(f"{version}: not active within {_ACTIVE_TIMEOUT_S:g} s") from None
        finally:
            asking.cancel()
        return active_s

    async def _forget(self, version: VersionId) -> None:
        self.fabric.release(version)
        if not self.fabric.forget(version):
            raise WorkFailedError(f"{version}: still in use")
        while self.fabric.counts().leaving_bytes:  # noqa: ASYNC110 a peer may still end its transfer
            await asyncio.sleep(_LOOK_AGAIN_S)

    # -- a transport alone -----------------------------------------------------------------------

    def _of(self, scheme: str) -> Transport:
        return next(one for one in self._transports if one.scheme == scheme)

    async def _publish(self, *, key: str, size_bytes: int) -> Answer:
        """Serve so many bytes over every scheme, from a memfd as a segment is one."""
        fd = os.memfd_create("loraserve-bench", os.MFD_CLOEXEC)
        await asyncio.to_thread(_fill, fd, size_bytes)
        body = memoryview(mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ))
        region = Region(head=b"", body=body, size_bytes=size_bytes, fd=fd, owner=_Descriptor(fd))
        for transport in self._transports:
            transport.publish(key, region)
        return {}

    async def _withdraw(self, *, key: str) -> Answer:
        for transport in self._transports:
            transport.withdraw(key)
        return {}

    async def _read(self, *, scheme: str, address: str, key: str, size_bytes: int, times: int) -> Answer:
        """Seconds of each of so many transfers into memory that is there already."""
        place = self._places.get(size_bytes)
        if place is None:
            self._places.clear()
            place = self._places[size_bytes] = await asyncio.to_thread(_touched, size_bytes)
        transport, peer = self._of(scheme), bytes.fromhex(address)
        return {
            "seconds": await asyncio.to_thread(
                lambda: [self._timed(transport, peer, key, place) for _ in range(times)]
            )
        }

    def _timed(self, transport: Transport, address: bytes, key: str, place: memoryview) -> float:
        began_s = time.perf_counter()
        transport.fetch(
            address,
            key,
            place,
            on_bytes=lambda begin, end: None,
            idle_timeout_s=IDLE_TIMEOUT_S,
            stop=lambda: False,
        )
        return time.perf_counter() - began_s


async def _ask(engine: Engine, version: VersionId) -> None:
    """A request of one token for this adapter."""
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    request = GenerationRequest(
        request_id=f"fetch-{version}", prompt=_PROMPT, version_id=version, sampling=sampling
    )
    async with aclosing(engine.generate(request)) as steps:
        async for _ in steps:
            pass


def _opened(schemes: list[str], host: str, tls: str) -> OpenTransports:
    if not tls:
        return open_transports(schemes, host=host)
    from loraserve.transport.ucx import open_ucx

    try:
        return OpenTransports(transports=(open_ucx(Listener(host), tls=tls),), left_out={})
    except (ImportError, LoraServeError) as error:
        return OpenTransports(transports=(), left_out={"ucx": str(error)})


class _Descriptor:
    """Closes what a region reads from once nobody reads it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __del__(self) -> None:
        os.close(self._fd)


def _touched(size_bytes: int) -> memoryview:
    """Memory as a segment has it, of which every page is there."""
    fd = os.memfd_create("loraserve-bench", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size_bytes)
        mapping = mmap.mmap(fd, size_bytes)
    finally:
        os.close(fd)
    for begin in range(0, size_bytes, mmap.PAGESIZE):
        mapping[begin] = 1
    return memoryview(mapping)


def _fill(fd: int, size_bytes: int) -> None:
    piece = os.urandom(1024**2)
    done = 0
    while done < size_bytes:
        done += os.pwrite(fd, piece[: size_bytes - done], done)


def wanted_of(tree: Mapping[str, Any]) -> Wanted:
    """What `wanted_tree` gave."""
    peers = tuple(
        PeerAddress(replica_id=name, addresses=((scheme, bytes.fromhex(address)),))
        for name, scheme, address in tree["peers"]
    )
    return Wanted(
        version_id=VersionId(tree["version"]),
        digest=tree["digest"],
        rank=tree["rank"],
        size_bytes=tree["size_bytes"],
        head_sha256=tree["head_sha256"],
        directory=Path(tree["directory"]) if tree["directory"] else None,
        peers=peers,
        max_lora_rank=MAX_RANK,
    )


async def _serve(lines: asyncio.StreamReader, answers: IO[str]) -> None:
    worker = FetchWorker()
    try:
        while line := await lines.readline():
            try:
                answer = await worker.handle(json.loads(line))
            except (LoraServeError, OSError, MemoryError) as error:
                answer = {"error": str(error) or type(error).__name__}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    finally:
        await worker.close()


async def _main() -> None:
    # What an engine prints must not come among the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines = asyncio.StreamReader(limit=2**20)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), os.fdopen(0, "rb")
    )
    with suppress(BrokenPipeError):
        await _serve(lines, answers)


if __name__ == "__main__":
    asyncio.run(_main())

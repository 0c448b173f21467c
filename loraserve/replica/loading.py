"""How copies come to a replica and go: each version for itself, and one at a time into the engine."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace

from loraserve.engines.base import AdapterFiles, Engine
from loraserve.engines.description import Fetched
from loraserve.errors import LoraServeError, OverloadedError, WorkFailedError
from loraserve.fabric.advice import CacheAdvice
from loraserve.fabric.fabric import Fabric
from loraserve.fabric.wanted import ORIGIN, Acquired, PeerAddress, Wanted
from loraserve.replica.fabric_view import fetched_of
from loraserve.replica.pool import AdapterPool, Residency
from placement.types import ReplicaId, VersionId

logger = logging.getLogger(__name__)

FETCH_TIMEOUT_S = 110.0
"""A little less than the controller waits for a load: its failure has a reason then, and nothing goes on here
that nobody waits for."""


class _Turns:
    """A lock for each version that somebody loads or waits for."""

    def __init__(self) -> None:
        self._locks: dict[VersionId, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def of(self, version: VersionId) -> AsyncIterator[None]:
        lock, users = self._locks.get(version, (asyncio.Lock(), 0))
        self._locks[version] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks.pop(version)
            if users > 1:
                self._locks[version] = lock, users - 1


class Copies:
    """Loads and drops of one replica. Without a fabric the engine reads the files itself.

    Several versions are fetched at once, and none waits for another's bytes; the engine takes them one after
    the other. `end_running` ends requests by their ids.
    """

    def __init__(
        self,
        replica_id: ReplicaId,
        *,
        pool: AdapterPool,
        engine: Engine,
        fabric: Fabric | None,
        max_lora_rank: int,
        max_bytes: int,
        drain_timeout_s: float,
        end_running: Callable[[Iterable[str]], Awaitable[None]],
    ) -> None:
        self._replica_id = replica_id
        self._pool = pool
        self._engine = engine
        self._fabric = fabric
        self._max_lora_rank = max_lora_rank
        self._max_bytes = max_bytes
        self._drain_timeout_s = drain_timeout_s
        self._end_running = end_running
        self._changing = asyncio.Lock()
        self._turns = _Turns()
        self._acquired: set[VersionId] = set()
        self._drops: dict[VersionId, asyncio.Task[None]] = {}
        self._prefetch: asyncio.Task[None] | None = None

    async def load(self, files: AdapterFiles, peers: tuple[PeerAddress, ...] = ()) -> Fetched | None:
        """Make the version usable, and say where its bytes came from; a resident one is no error (None), a
        refusal or a cancellation leaves nothing behind."""
        version = files.version_id
        async with self._turns.of(version):
            if not self._pool.begin_load(files):
                return None
            try:
                ready, fetched = await self._fetched(files, peers)
                async with self._changing:
                    await self._engine.load_adapter(ready)
            except asyncio.CancelledError:
                # A second cancellation must not keep it from being taken back.
                await asyncio.shield(asyncio.ensure_future(self._take_back(version)))
                raise
            except BaseException:
                self._let_go(version)
                self._pool.abandon_load(version)
                raise
            self._pool.finish_load(version)
        source = "" if fetched is None else f" from {fetched.peer or 'the'} {fetched.source}"
        logger.info("loaded %s (rank %d, %d bytes)%s", version, files.rank, files.size_bytes, source)
        return fetched

    async def unload(self, version: VersionId) -> None:
        """Take no new requests for the version, let running ones end (aborting those that outlast the
        drain timeout), then free it; a version that is not here is no error.

        WorkFailedError if requests outlast their abort by another drain timeout: the copy stays, takes no
        requests, and goes when they end, whether or not somebody asks again.
        """
        drop = self._drops.get(version)
        if drop is None:
            drop = self._drops[version] = asyncio.create_task(self._drop(version), name=f"drop-{version}")
            drop.add_done_callback(lambda done: self._forget_drop(version, done))
        # Neither the timeout nor a caller that goes away ends the drop.
        timeout_s = 2 * self._drain_timeout_s
        done, _ = await asyncio.wait({drop}, timeout=timeout_s)
        if not done:
            raise WorkFailedError(
                f"{version} is still on replica {self._replica_id} after {timeout_s:g} s: its requests, or a"
                " load before it, have not ended; it takes no requests and goes when they have"
            )
        drop.result()

    def advise(self, advice: CacheAdvice) -> None:
        """Take in what the controller knows, and begin to fetch what will be wanted here soon, instead of
        what was said before."""
        if self._fabric is None:
            return
        self._fabric.advise(advice)
        if self._prefetch is not None:
            self._prefetch.cancel()
        self._prefetch = asyncio.create_task(self._fetch_ahead(self._fabric, advice.soon))

    async def _fetch_ahead(self, fabric: Fabric, soon: tuple[Wanted, ...]) -> None:
        for wanted in soon:
            try:
                await fabric.prefetch(
                    replace(wanted, max_lora_rank=self._max_lora_rank, max_bytes=self._max_bytes)
                )
            except LoraServeError as error:
                logger.info("%s is not fetched ahead: %s", wanted.version_id, error)

    async def stop(self) -> None:
        """End what is being dropped or fetched ahead; the engine is closed next."""
        ending = [*self._drops.values(), *filter(None, (self._prefetch,))]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    async def _fetched(
        self, files: AdapterFiles, peers: tuple[PeerAddress, ...]
    ) -> tuple[AdapterFiles, Fetched | None]:
        """The files with their segment, where there is a fabric to bring it."""
        if self._fabric is None:
            return files, None
        # What is not seen here, another machine's folder, comes from the controller.
        has_files = files.directory.is_dir()
        wanted = Wanted(
            version_id=files.version_id,
            digest=files.digest,
            rank=files.rank,
            size_bytes=files.size_bytes,
            head_sha256=files.head_sha256,
            directory=files.directory if has_files else None,
            peers=tuple(one for one in peers if not (has_files and one.replica_id == ORIGIN)),
            max_lora_rank=self._max_lora_rank,
            max_bytes=self._max_bytes,
        )
        acquired = await _acquire(self._fabric, wanted)
        self._acquired.add(files.version_id)
        return replace(files, segment=acquired.segment), fetched_of(acquired)

    def _let_go(self, version: VersionId) -> None:
        if self._fabric is not None and version in self._acquired:
            self._acquired.discard(version)
            self._fabric.release(version)

    async def _take_back(self, version: VersionId) -> None:
        """Undo a load that nobody waits for any more: an engine may finish what it began."""
        try:
            async with self._changing:
                await self._engine.unload_adapter(version)
        except LoraServeError as error:
            logger.warning("%s: its load was cancelled and cannot be taken back: %s", version, error)
        finally:
            self._let_go(version)
            self._pool.abandon_load(version)

    async def _drop(self, version: VersionId) -> None:
        if self._pool.residency(version) is Residency.LOADING:
            async with self._turns.of(version):
                entry = self._pool.begin_drop(version)
        else:
            entry = self._pool.begin_drop(version)
        if entry is None:
            return
        while not entry.unpinned.is_set():
            try:
                async with asyncio.timeout(self._drain_timeout_s):
                    await entry.unpinned.wait()
            except TimeoutError:
                logger.warning("%s: %d requests outlast the drain", version, len(entry.pinned_by))
                await self._end_running(entry.pinned_by)
        # With its turn, so that a load that comes meanwhile waits for the end of this.
        async with self._turns.of(version), self._changing:
            await self._engine.unload_adapter(version)
            self._let_go(version)
            self._pool.finish_drop(version)
        logger.info("dropped %s", version)

    def _forget_drop(self, version: VersionId, drop: "asyncio.Task[None]") -> None:
        del self._drops[version]
        if not drop.cancelled() and (error := drop.exception()) is not None:
            logger.warning("%s was not dropped: %s", version, error)


async def _acquire(fabric: Fabric, wanted: Wanted) -> Acquired:
    """As `Fabric.acquire`, of a version that the pool has room for: what is in its way is only kept, as the
    last one that replicas have, and in the store too."""
    try:
        return await fabric.acquire(wanted, deadline_s=FETCH_TIMEOUT_S)
    except OverloadedError:
        kept = fabric.cached()
        if not kept:
            raise
    logger.warning("%s: room is made for it among the last copies that are cached here", wanted.version_id)
    for version in kept:
        fabric.mark_last(version, False)
    return await fabric.acquire(wanted, deadline_s=FETCH_TIMEOUT_S)

"""Starts, watches and ends the replicas, and carries commands to them.

Each replica has one life at a time: found or started, watched, lost or stopped; the next begins when it
has ended. An answer from a process that has been replaced since is thrown away.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from loraserve.adapters import AdapterStore
from loraserve.config import Config
from loraserve.controller.demand import DemandBook
from loraserve.controller.fleet import Fleet, ReplicaLink
from loraserve.controller.heads import SegmentHeads
from loraserve.controller.sources import AdapterSources
from loraserve.engines.base import AdapterFiles, EngineInfo
from loraserve.engines.description import ReplicaReport, RequestReport
from loraserve.errors import LoraServeError, ReplicaStartError
from loraserve.fabric.advice import CacheAdvice
from placement.cluster import messages
from placement.profile import Slo
from placement.types import AdapterName, AdapterTerms, AdapterVersion, ReplicaId, VersionId

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 120.0
REPORT_TIMEOUT_S = 10.0
STATUS_TIMEOUT_S = 0.5
MOVE_TIMEOUT_S = 10.0
MAX_BACKOFF_S = 10.0
MAX_KILLS = 5
"""How often a replica that is to stay ended is killed before its process is left to the next start."""

DRAIN_MARGIN_S = 30.0
"""What a drain may take beyond its deadline before its replica is ended without an answer."""


class ReplicaKeeper:
    """Gives every outcome to `dispatch`, answers to loads and drops to `answered`, and what replicas
    count to `demand`; a replica starts with the configuration that `starting` gives then. `close` ends the
    tasks; the replicas stay."""

    def __init__(
        self,
        config: Config,
        *,
        fleet: Fleet,
        library: AdapterStore,
        dispatch: Callable[[messages.Event], None],
        answered: Callable[[messages.Answer], None],
        demand: DemandBook,
        starting: Callable[[ReplicaId], Config],
        seed: int,
        first_backoff_s: float,
    ) -> None:
        self.fleet = fleet
        self.reports: dict[ReplicaId, ReplicaReport] = {}
        self.engines: dict[ReplicaId, EngineInfo] = {}
        self.pids: dict[ReplicaId, int] = {}
        self.start_errors: dict[ReplicaId, ReplicaStartError] = {}
        self.moved: dict[ReplicaId, int] = {}
        self.terms: Mapping[AdapterName, AdapterTerms] = {}
        """What is wanted of adapters, as it is now: replicas are told the targets with a load."""
        self._config = config
        self._library = library
        self._dispatch = dispatch
        self._answered = answered
        self._demand = demand
        self._starting = starting
        self._random = random.Random(seed)
        self._first_backoff_s = first_backoff_s
        self.sources = AdapterSources(config.fabric.racks)
        self._heads = SegmentHeads(library)
        self._links: dict[ReplicaId, ReplicaLink] = {}
        self._lives: dict[ReplicaId, asyncio.Task[None]] = {}
        self._drains: dict[ReplicaId, asyncio.Task[None]] = {}
        self._unloading: set[tuple[ReplicaLink, VersionId]] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    # -- what the controller asks for ----------------------------------------------------------

    def begin(self, replica: ReplicaId, *, find: bool) -> None:
        """The replica's first life: with `find`, one that an earlier controller started."""
        self._lives[replica] = self.spawn(self._begin(replica, find=find))

    def start(self, replica: ReplicaId, attempt: int) -> None:
        """Start the replica once its life before has ended; `attempt` 0 does so without a pause."""
        self._lives[replica] = self.spawn(self._start_after(self._lives.get(replica), replica, attempt))

    def stop(self, replica: ReplicaId) -> None:
        """End the replica's process, or its start."""
        self._lives[replica] = self.spawn(self._stop(self._lives.get(replica), replica))

    def load(self, replica: ReplicaId, adapter: AdapterVersion) -> None:
        """Have the replica load."""
        if (link := self._links.get(replica)) is not None:
            self.spawn(self._load(replica, link, adapter))

    def tell_targets(self, replica: ReplicaId, adapter: AdapterVersion) -> None:
        """Have a replica that holds the version take in the targets that there are now."""
        if (link := self._links.get(replica)) is not None:
            self.spawn(self._tell_targets(replica, link, adapter))

    def unload(self, replica: ReplicaId, version: VersionId) -> None:
        """Have the replica drop, unless it has been asked and has not answered."""
        link = self._links.get(replica)
        if link is not None and (link, version) not in self._unloading:
            self._unloading.add((link, version))
            self.spawn(self._unload(replica, link, version))

    def drain(self, replica: ReplicaId, deadline_s: float) -> None:
        """Have the replica finish its work, by this deadline instead of an earlier one."""
        if (link := self._links.get(replica)) is not None:
            if (before := self._drains.get(replica)) is not None:
                # Its answer would come first, and knows nothing of what the new deadline ends.
                before.cancel()
            self._drains[replica] = self.spawn(self._drain(replica, link, deadline_s))

    async def in_flight(self, replica: ReplicaId) -> tuple[RequestReport, ...]:
        """The requests in a replica; none if it does not answer in time."""
        link = self._links.get(replica)
        with contextlib.suppress(LoraServeError, TimeoutError):
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                return await link.in_flight() if link is not None else ()
        return ()

    async def move(self, replica: ReplicaId, request_ids: tuple[str, ...]) -> int:
        """Have requests end there, to go on elsewhere; how many did in time."""
        link = self._links.get(replica)
        try:
            async with asyncio.timeout(MOVE_TIMEOUT_S):
                return await link.move(request_ids) if link is not None else 0
        except (LoraServeError, TimeoutError) as error:
            logger.warning("%s did not let all requests go: %s", replica, error)
            return 0

    def advise(self, replica: ReplicaId, advice: CacheAdvice) -> None:
        """Tell the replica's fabric what is known here of what it caches."""
        if (link := self._links.get(replica)) is not None:
            self.spawn(self._advise(replica, link, advice))

    async def refresh_reports(self) -> None:
        """Ask every replica for its report now; one that is slow keeps its last one."""

        async def refresh(replica: ReplicaId, link: ReplicaLink) -> None:
            # What a failed report means is the watcher's to decide.
            with contextlib.suppress(LoraServeError, TimeoutError):
                async with asyncio.timeout(STATUS_TIMEOUT_S):
                    report = await link.report()
                if self._links.get(replica) is link:
                    self._keep(replica, report)

        await asyncio.gather(*(refresh(replica, link) for replica, link in list(self._links.items())))

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a task that ends with the keeper."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    async def close(self) -> None:
        """Cancel every task and wait for it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a controller task failed: %s", error, exc_info=error)

    # -- lives ---------------------------------------------------------------------------------

    async def _begin(self, replica: ReplicaId, *, find: bool) -> None:
        if not find:
            await self._live(replica, self.fleet.start(replica, self._starting(replica)), is_first=True)
            return
        link = await self.fleet.find(replica)
        if link is None:
            self._dispatch(messages.ReplicaLost(replica, "it was gone when the controller came back"))
            return
        await self._live(replica, _at_hand(link), is_first=False)

    async def _start_after(
        self, before: "asyncio.Task[None] | None", replica: ReplicaId, attempt: int
    ) -> None:
        if before is not None:
            await asyncio.wait({before})
        if attempt > 0:
            await asyncio.sleep(self._backoff_s(attempt))
        await self._live(replica, self.fleet.start(replica, self._starting(replica)), is_first=False)

    async def _stop(self, before: "asyncio.Task[None] | None", replica: ReplicaId) -> None:
        if before is not None:
            before.cancel()
            await asyncio.wait({before})
        for attempt in range(1, MAX_KILLS):
            if await self._kill(replica):
                return
            await asyncio.sleep(self._backoff_s(attempt))
        await self._kill(replica)

    async def _kill(self, replica: ReplicaId) -> bool:
        """End the replica's process; False, and a line in the log, if that failed."""
        try:
            await self.fleet.kill(replica)
        except LoraServeError as error:
            logger.error("%s is not ended in order: %s", replica, error)
            return False
        return True

    async def _live(
        self, replica: ReplicaId, coming: Coroutine[Any, Any, ReplicaLink], *, is_first: bool
    ) -> None:
        """From the link to its loss."""
        try:
            link = await coming
            description = await link.describe()
        except LoraServeError as error:
            self._not_started(replica, error, is_first=is_first)
            return
        self._demand.met(replica, description.incarnation, description.tokens)
        self._links[replica] = link
        self.sources.met(replica, description.fabric, description.resident)
        self.engines[replica] = description.engine
        self.pids[replica] = description.pid
        self.start_errors.pop(replica, None)
        try:
            self._dispatch(
                messages.ReplicaReady(
                    description.spec,
                    description.address,
                    resident=frozenset(description.resident),
                    loading=frozenset(description.loading),
                    dropping=frozenset(description.dropping),
                    draining=description.draining,
                )
            )
            reason = await self._watch(replica, link)
        finally:
            del self._links[replica]
            self.sources.lost(replica)
            self.reports.pop(replica, None)
            self.pids.pop(replica, None)
        logger.warning("lost %s: %s", replica, reason)
        # At once, for the kill may take its time or fail; the next start waits for it and kills again.
        self._dispatch(messages.ReplicaLost(replica, reason))
        await self._kill(replica)

    def _not_started(self, replica: ReplicaId, error: LoraServeError, *, is_first: bool) -> None:
        failed = error if isinstance(error, ReplicaStartError) else ReplicaStartError(replica, str(error))
        self.start_errors[replica] = failed
        logger.error("%s", failed)
        if is_first:
            self._dispatch(messages.ReplicaGivenUp(replica, failed.reason))
        else:
            self._dispatch(messages.ReplicaLost(replica, failed.reason))

    def _backoff_s(self, attempt: int) -> float:
        ceiling_s = min(MAX_BACKOFF_S, self._first_backoff_s * 2**attempt)
        return self._random.uniform(ceiling_s / 2, ceiling_s)

    async def _watch(self, replica: ReplicaId, link: ReplicaLink) -> str:
        """Collect reports until the process or its engine is gone; returns the reason."""
        lost = asyncio.ensure_future(link.wait_lost())
        try:
            while True:
                try:
                    # Not wait_for: in Python 3.11 it swallows a cancellation that meets its result.
                    async with asyncio.timeout(REPORT_TIMEOUT_S):
                        self._keep(replica, await link.report())
                except LoraServeError as error:
                    return str(error)
                except TimeoutError:
                    return f"no report within {REPORT_TIMEOUT_S:.0f} s"
                except Exception as error:
                    # Else nobody would watch it any more, and its end would never be known.
                    logger.exception("a report of %s cannot be taken in", replica)
                    return f"its report cannot be taken in: {type(error).__name__}: {error}"
                done, _ = await asyncio.wait({lost}, timeout=self._config.replica.check_interval_s)
                if done:
                    return lost.result()
        finally:
            lost.cancel()

    def _keep(self, replica: ReplicaId, report: ReplicaReport) -> None:
        self.reports[replica] = report
        self.sources.caches(replica, report.fabric.cached)
        self._demand.heard(replica, report)

    # -- commands ------------------------------------------------------------------------------

    async def _load(self, replica: ReplicaId, link: ReplicaLink, adapter: AdapterVersion) -> None:
        version = adapter.version_id
        event: messages.Answer
        try:
            await self._heads.prepare(adapter)
            files = self.files_of(adapter)
            async with self.sources.turn(replica, version, adapter.size_bytes) as peers:
                async with asyncio.timeout(LOAD_TIMEOUT_S):
                    fetched = await link.load_adapter(files, self.sources.with_origin(peers))
                if self._links.get(replica) is link:
                    self.sources.has(replica, version, fetched)
            event = messages.AdapterLoaded(replica, version)
            if files.slo != self._slo(adapter):
                self.tell_targets(replica, adapter)  # They have changed since.
        except TimeoutError:
            # The load may still come to an end there: its room is free only once the copy is gone.
            await self._take_back(link, version)
            reason = f"not loaded within {LOAD_TIMEOUT_S:.0f} s"
            event = messages.AdapterLoadFailed(replica, version, reason)
        except LoraServeError as error:
            logger.warning("%s did not load %s: %s", replica, version, error)
            event = messages.AdapterLoadFailed(replica, version, str(error))
        except Exception as error:
            # Without an answer the copy would be taken for one that loads, for ever.
            logger.exception("%s did not load %s", replica, version)
            await self._take_back(link, version)
            event = messages.AdapterLoadFailed(replica, version, f"{type(error).__name__}: {error}")
        if self._links.get(replica) is link:
            self._answered(event)

    async def _tell_targets(self, replica: ReplicaId, link: ReplicaLink, adapter: AdapterVersion) -> None:
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                # Of what it has it takes in the targets alone. If it is late the copy stays, as requests
                # are sent there.
                await link.load_adapter(self.files_of(adapter))
        except (LoraServeError, TimeoutError) as error:
            logger.warning("%s has not heard of the targets of %s: %s", replica, adapter.name, error)

    def files_of(self, adapter: AdapterVersion) -> AdapterFiles:
        """What a replica must know to load it; NotFoundError for content that the store does not hold."""
        return AdapterFiles(
            version_id=adapter.version_id,
            directory=self._library.directory_of(adapter.sha256),
            rank=adapter.rank,
            size_bytes=adapter.size_bytes,
            slo=self._slo(adapter),
            digest=adapter.sha256,
            head_sha256=self._heads.sha256_of(adapter),
        )

    def _slo(self, adapter: AdapterVersion) -> Slo | None:
        return self.terms.get(adapter.name, AdapterTerms()).slo

    async def _take_back(self, link: ReplicaLink, version: VersionId) -> None:
        with contextlib.suppress(LoraServeError, TimeoutError):
            async with asyncio.timeout(self._unload_timeout_s):
                await link.unload_adapter(version)

    async def _advise(self, replica: ReplicaId, link: ReplicaLink, advice: CacheAdvice) -> None:
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                await link.advise(advice)
        except (LoraServeError, TimeoutError) as error:
            logger.info("%s was not advised: %s", replica, error)

    async def _unload(self, replica: ReplicaId, link: ReplicaLink, version: VersionId) -> None:
        self.sources.has_not(replica, version)
        try:
            async with asyncio.timeout(self._unload_timeout_s):
                await link.unload_adapter(version)
        except (LoraServeError, TimeoutError) as error:
            # The copy stays RETIRING: the next epoch asks again.
            logger.warning("%s did not drop %s: %s", replica, version, error)
            return
        finally:
            self._unloading.discard((link, version))
        if self._links.get(replica) is link:
            self._answered(messages.AdapterUnloaded(replica, version))

    async def _drain(self, replica: ReplicaId, link: ReplicaLink, deadline_s: float) -> None:
        try:
            async with asyncio.timeout(deadline_s + DRAIN_MARGIN_S):
                moved = await link.drain(deadline_s)
        except (LoraServeError, TimeoutError) as error:
            # It gets no new work and is ended next: what it had goes on elsewhere.
            logger.warning("%s did not drain in order: %s", replica, error)
            moved = 0
        self.moved[replica] = moved
        if self._links.get(replica) is link:
            self._dispatch(messages.ReplicaDrained(replica))

    @property
    def _unload_timeout_s(self) -> float:
        """A drop may drain, then abort what outlasts the drain."""
        return 3 * self._config.replica.drain_timeout_s


async def _at_hand(link: ReplicaLink) -> ReplicaLink:
    return link

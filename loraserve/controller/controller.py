"""The controller's shell: executes the state machine's commands and feeds their outcomes back.

One event loop owns the state. Commands that touch the store run at once and in order; loads, drops and
starts run as tasks whose answers come back as events. An answer from a replica process that has been
replaced since is thrown away.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any

from loraserve.adapters import AdapterStore
from loraserve.config import Config
from loraserve.controller.fleet import Fleet, ReplicaLink
from loraserve.controller.store import Store, StoredRegistration
from loraserve.engines.base import AdapterFiles, EngineInfo
from loraserve.engines.description import ReplicaReport
from loraserve.errors import (
    AdapterRejectedError,
    AlreadyExistsError,
    LoraServeError,
    NotFoundError,
    OverloadedError,
    ReplicaStartError,
    WorkFailedError,
)
from placement import cluster_messages as messages
from placement.cluster import ClusterState
from placement.cluster_records import CopyPhase, ReplicaPhase
from placement.policies import policy
from placement.types import AdapterName, AdapterVersion, ReplicaId, VersionId, version_id

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 120.0
REPORT_TIMEOUT_S = 10.0
STATUS_TIMEOUT_S = 0.5
MAX_BACKOFF_S = 10.0


class Controller:
    """Tracks adapters and replicas, publishes routing tables. `start` once, `stop` once."""

    def __init__(
        self,
        config: Config,
        *,
        store: Store,
        fleet: Fleet,
        library: AdapterStore,
        recovering: bool = False,
        seed: int = 0,
    ) -> None:
        self.config = config
        self.fleet = fleet
        self.library = library
        self.reports: dict[ReplicaId, ReplicaReport] = {}
        self.engines: dict[ReplicaId, EngineInfo] = {}
        self.pids: dict[ReplicaId, int] = {}
        self.start_errors: dict[ReplicaId, ReplicaStartError] = {}
        self._store = store
        self._random = random.Random(seed)
        self._links: dict[ReplicaId, ReplicaLink] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._registering: dict[str, asyncio.Lock] = {}
        registrations = store.adapters()
        self.registrations = {entry.adapter.version_id: entry for entry in registrations}
        self._recovering = recovering
        self.state = ClusterState(
            replica_ids=[ReplicaId(f"replica-{index}") for index in range(config.cluster.replicas)],
            policy=policy(config.placement.policy),
            base_model=config.model.path,
            seed=config.placement.seed,
            max_restarts=config.replica.max_restarts,
            adapters=[entry.adapter for entry in registrations],
            plan=store.plan(),
            table_version=store.table_version(),
            recovering=recovering,
        )

    # -- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start, or find again, every replica; returns at once."""
        for replica in self.state.replicas:
            self._spawn(self._bring_up(replica, attempt=0))
        self._spawn(self._epochs())

    async def stop(self) -> None:
        """End the tasks; replicas stay for whoever comes next."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._store.close()

    async def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Return once the condition holds, looking again after every event; TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                changed = self._changed
                await changed.wait()

    def is_ready(self) -> bool:
        """Whether the first table is out and every replica is up or given up."""
        waiting = {ReplicaPhase.STARTING, ReplicaPhase.UNKNOWN}
        return self.state.published and not any(
            record.phase in waiting for record in self.state.replicas.values()
        )

    # -- adapters ------------------------------------------------------------------------------

    async def register(self, name: str, source: str, *, replace: bool) -> VersionId:
        """Validate, place and load an adapter; returns once the routing table names the version.

        AlreadyExistsError for a name that is taken, unless `replace`; AdapterRejectedError or
        OverloadedError if nobody can serve it, and then the registration is undone.
        """
        lock = self._registering.setdefault(name, asyncio.Lock())
        async with lock:
            if AdapterName(name) in self.state.active and not replace:
                raise AlreadyExistsError(
                    f"adapter {name} is registered; choose another name, or replace its weights (--replace)"
                )
            timeout_s = self.config.adapters.fetch_timeout_s
            manifest = (await self.library.add_async(name, source, timeout_s=timeout_s)).manifest
            adapter = AdapterVersion(
                version_id=version_id(AdapterName(name), manifest.sha256),
                name=AdapterName(name),
                sha256=manifest.sha256,
                rank=manifest.rank,
                size_bytes=manifest.size_bytes,
            )
            version = adapter.version_id
            registration = StoredRegistration(
                adapter=adapter, source=source, target_modules=manifest.target_modules
            )
            self._store.save_adapter(registration)
            self.registrations[version] = registration
            self.dispatch(messages.AdapterRegistered(adapter))
            await self._wait_served(version)
            return version

    async def _wait_served(self, version: VersionId) -> None:
        state = self.state
        try:
            await self.wait_until(
                lambda: state.is_served(version) or state.refusal(version) is not None, LOAD_TIMEOUT_S
            )
        except TimeoutError:
            self.dispatch(messages.AdapterWithdrawn(version))
            raise WorkFailedError(f"{version}: no replica loaded it within {LOAD_TIMEOUT_S:.0f} s") from None
        reason = state.refusal(version)
        if state.is_served(version) or reason is None:
            return
        self.dispatch(messages.AdapterWithdrawn(version))
        if "no replica has" in reason:
            raise OverloadedError(f"{version}: {reason}")
        raise AdapterRejectedError(f"{version}: {reason}")

    def remove(self, name: str) -> None:
        """Take the name out of the routing table; copies are dropped as their requests end."""
        if AdapterName(name) not in self.state.active:
            known = ", ".join(sorted(self.state.active)) or "none"
            raise NotFoundError(f"adapter {name} is not registered; registered: {known}")
        self.dispatch(messages.AdapterRemoved(AdapterName(name)))

    # -- events and commands -------------------------------------------------------------------

    def dispatch(self, event: messages.Event) -> None:
        """Give the state machine an event and execute what it asks for, in order."""
        logger.debug("event %s", event)
        commands = self.state.handle(event)
        for command in commands:
            self._execute(command)
        if isinstance(event, messages.AdapterUnloaded) or any(
            isinstance(command, messages.DeleteAdapter) for command in commands
        ):
            self._collect_files()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _execute(self, command: messages.Command) -> None:
        match command:
            case messages.SaveAdapter():
                pass  # `register` saved it before the state machine heard of it
            case messages.DeleteAdapter(version_id=version):
                self._store.delete_adapter(version)
            case messages.SavePlan(plan=plan):
                self._store.save_plan(plan)
            case messages.PublishTable(table=table):
                self._store.save_table_version(table.version)
                logger.info("routing table %d: %d adapters", table.version, len(table.entries))
            case messages.StartReplica(replica_id=replica, attempt=attempt):
                self._spawn(self._bring_up(replica, attempt=attempt))
            case messages.LoadAdapter(replica_id=replica, adapter=adapter):
                self._spawn(self._load(replica, adapter))
            case messages.UnloadAdapter(replica_id=replica, version_id=version):
                self._spawn(self._unload(replica, version))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a controller task failed: %s", error, exc_info=error)

    def _collect_files(self) -> None:
        """Delete the files of versions that nobody registers or holds any more."""
        held = {version for record in self.state.replicas.values() for version in record.copies}
        for version in [key for key in self.registrations if key not in self.state.adapters]:
            if version in held:
                continue
            sha256 = self.registrations.pop(version).adapter.sha256
            if all(entry.adapter.sha256 != sha256 for entry in self.registrations.values()):
                self.library.remove(sha256)

    # -- tasks ---------------------------------------------------------------------------------

    async def _bring_up(self, replica: ReplicaId, *, attempt: int) -> None:
        """Find or start one replica, then watch it until it is lost."""
        link: ReplicaLink | None = None
        if attempt == 0 and self._recovering:
            link = await self.fleet.find(replica)
            if link is None:
                self.dispatch(messages.ReplicaLost(replica, "it was gone when the controller came back"))
                return
        try:
            if link is None:
                if attempt > 0:
                    await asyncio.sleep(self._backoff_s(attempt))
                link = await self.fleet.start(replica)
            description = await link.describe()
        except LoraServeError as error:
            self._not_started(replica, error, attempt)
            return
        self._links[replica] = link
        self.engines[replica] = description.engine
        self.pids[replica] = description.pid
        self.start_errors.pop(replica, None)
        self.dispatch(
            messages.ReplicaReady(description.spec, description.address, frozenset(description.resident))
        )
        reason = await self._watch(replica, link)
        del self._links[replica]
        self.reports.pop(replica, None)
        self.pids.pop(replica, None)
        await self.fleet.kill(replica)
        logger.warning("lost %s: %s", replica, reason)
        self.dispatch(messages.ReplicaLost(replica, reason))

    def _not_started(self, replica: ReplicaId, error: LoraServeError, attempt: int) -> None:
        failed = error if isinstance(error, ReplicaStartError) else ReplicaStartError(replica, str(error))
        self.start_errors[replica] = failed
        logger.error("%s", failed)
        if attempt == 0:
            self.dispatch(messages.ReplicaGivenUp(replica, failed.reason))
        else:
            self.dispatch(messages.ReplicaLost(replica, failed.reason))

    def _backoff_s(self, attempt: int) -> float:
        ceiling_s = min(MAX_BACKOFF_S, 0.25 * 2**attempt)
        return self._random.uniform(ceiling_s / 2, ceiling_s)

    async def _watch(self, replica: ReplicaId, link: ReplicaLink) -> str:
        """Collect reports until the process or its engine is gone; returns the reason."""
        lost = asyncio.ensure_future(link.wait_lost())
        try:
            while True:
                try:
                    # Not wait_for: in Python 3.11 it swallows a cancellation that meets its result.
                    async with asyncio.timeout(REPORT_TIMEOUT_S):
                        self.reports[replica] = await link.report()
                except LoraServeError as error:
                    return str(error)
                except TimeoutError:
                    return f"no report within {REPORT_TIMEOUT_S:.0f} s"
                done, _ = await asyncio.wait({lost}, timeout=self.config.replica.check_interval_s)
                if done:
                    return lost.result()
        finally:
            lost.cancel()

    async def refresh_reports(self) -> None:
        """Ask every replica for its report now; one that is slow keeps its last one."""

        async def refresh(replica: ReplicaId, link: ReplicaLink) -> None:
            # What a failed report means is the watcher's to decide.
            with contextlib.suppress(LoraServeError, TimeoutError):
                async with asyncio.timeout(STATUS_TIMEOUT_S):
                    report = await link.report()
                if self._links.get(replica) is link:
                    self.reports[replica] = report

        await asyncio.gather(*(refresh(replica, link) for replica, link in list(self._links.items())))

    async def _load(self, replica: ReplicaId, adapter: AdapterVersion) -> None:
        link = self._links.get(replica)
        if link is None:
            return
        files = AdapterFiles(
            version_id=adapter.version_id,
            directory=self.library.directory_of(adapter.sha256),
            rank=adapter.rank,
            size_bytes=adapter.size_bytes,
        )
        event: messages.Event
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                await link.load_adapter(files)
            event = messages.AdapterLoaded(replica, adapter.version_id)
        except TimeoutError:
            reason = f"not loaded within {LOAD_TIMEOUT_S:.0f} s"
            # The load may still come to an end there: its room is free only once the copy is gone.
            await self._take_back(link, adapter.version_id)
            event = messages.AdapterLoadFailed(replica, adapter.version_id, reason)
        except LoraServeError as error:
            reason = str(error)
            logger.warning("%s did not load %s: %s", replica, adapter.version_id, reason)
            event = messages.AdapterLoadFailed(replica, adapter.version_id, reason)
        if self._links.get(replica) is link:
            self.dispatch(event)

    async def _take_back(self, link: ReplicaLink, version: VersionId) -> None:
        with contextlib.suppress(LoraServeError, TimeoutError):
            async with asyncio.timeout(self._unload_timeout_s):
                await link.unload_adapter(version)

    async def _unload(self, replica: ReplicaId, version: VersionId) -> None:
        link = self._links.get(replica)
        if link is None:
            return
        try:
            async with asyncio.timeout(self._unload_timeout_s):
                await link.unload_adapter(version)
        except (LoraServeError, TimeoutError) as error:
            # The copy stays RETIRING: the next epoch asks again.
            logger.warning("%s did not drop %s: %s", replica, version, error)
            return
        if self._links.get(replica) is link:
            self.dispatch(messages.AdapterUnloaded(replica, version))

    @property
    def _unload_timeout_s(self) -> float:
        """A drop may drain, then abort what outlasts the drain."""
        return 3 * self.config.replica.drain_timeout_s

    async def _epochs(self) -> None:
        while True:
            await asyncio.sleep(self.config.placement.epoch_s)
            self.dispatch(messages.EpochElapsed())

    def copies(self, replica: ReplicaId) -> tuple[VersionId, ...]:
        """The versions a replica has acknowledged."""
        record = self.state.replicas[replica]
        return tuple(
            version for version, copy in sorted(record.copies.items()) if copy.phase is CopyPhase.HELD
        )

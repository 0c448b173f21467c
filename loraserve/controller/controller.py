"""The controller's shell: executes the state machine's commands and feeds their outcomes back.

One event loop owns the state. What must be durable goes through the journal, in order; loads, drops,
starts and drains are carried to the replicas by the keeper, whose answers come back as events.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

from loraserve.adapters import AdapterStore
from loraserve.clock import Clock, WallClock
from loraserve.config import Config
from loraserve.controller.advice import advise_replicas
from loraserve.controller.demand import DemandBook
from loraserve.controller.fleet import Fleet
from loraserve.controller.journal import Dependent, Journal
from loraserve.controller.keeper import LOAD_TIMEOUT_S, ReplicaKeeper
from loraserve.controller.library import is_removed
from loraserve.controller.migration import Migrator
from loraserve.controller.origin import Origin
from loraserve.controller.periodic import every
from loraserve.controller.ranks import resizer_of, with_max_lora_rank
from loraserve.controller.sizing import sized
from loraserve.controller.store import Changes, Store, StoredRegistration
from loraserve.engines.base import EngineInfo
from loraserve.engines.description import ReplicaReport
from loraserve.errors import (
    AdapterRejectedError,
    AlreadyExistsError,
    NotFoundError,
    OverloadedError,
    ReplicaStartError,
    WorkFailedError,
)
from placement.cluster import messages
from placement.cluster.records import CopyPhase, ReplicaPhase
from placement.cluster.state import ClusterState
from placement.policies import policy
from placement.profile import Profile
from placement.table import RoutingTable
from placement.types import AdapterName, AdapterVersion, ReplicaId, VersionId, version_id

logger = logging.getLogger(__name__)

Checkpoint = Callable[[messages.Event | messages.Command, str], None]


def _pass(step: messages.Event | messages.Command, stage: str) -> None:
    pass


class Controller:
    """Tracks adapters and replicas, publishes routing tables. `start` once, `stop` once.

    `table` is what routers may see: the last one whose version is durable. `profile` is what each replica
    can do, None: nothing is known. `on_step` is called before and after each event is taken in and each
    command executed; a test may let it fail there.
    """

    def __init__(
        self,
        config: Config,
        *,
        store: Store,
        fleet: Fleet,
        library: AdapterStore,
        recovering: bool = False,
        seed: int = 0,
        first_backoff_s: float = 0.25,
        on_step: Checkpoint = _pass,
        clock: Clock | None = None,
        profile: Profile | None = None,
    ) -> None:
        self.config = config
        self.fleet = fleet
        self.library = library
        self.table = RoutingTable()
        self._store = store
        self._on_step = on_step
        self._changed = asyncio.Event()
        self._registering: dict[str, asyncio.Lock] = {}
        self._num_storing = 0
        self._waiting: list[messages.Together] = []
        self._recovering = recovering
        self._journal = Journal(store, publish=self._publish, release=self._release)
        registrations = store.adapters()
        self.demand = DemandBook(
            config.placement, store, clock or WallClock(), [entry.adapter for entry in registrations]
        )
        self.keeper = ReplicaKeeper(
            config,
            fleet=fleet,
            library=library,
            dispatch=self.dispatch,
            answered=self.answered,
            demand=self.demand,
            starting=self._starting,
            seed=seed,
            first_backoff_s=first_backoff_s,
        )
        self.registrations = {entry.adapter.version_id: entry for entry in registrations}
        self.state = ClusterState(
            replica_ids=[ReplicaId(f"replica-{index}") for index in range(config.cluster.replicas)],
            policy=policy(config.placement.policy),
            base_model=config.model.path,
            seed=config.placement.seed,
            max_restarts=config.replica.max_restarts,
            adapters=[entry.adapter for entry in registrations],
            plan=store.plan(),
            frozen_plan=store.frozen_plan(),
            earlier_plans=store.earlier_plans(),
            table_version=store.table_version(),
            drains=store.drains(),
            recovering=recovering,
            profiles={} if profile is None else {"": profile},
            epoch_s=config.placement.epoch_s,
            resizer=resizer_of(config, None if profile is None else profile.speeds),
            max_lora_ranks=store.max_lora_ranks(),
            terms=store.terms(),
        )
        self.state.demand_tokens_per_s = self.demand.forecast
        self.keeper.terms = self.state.terms
        self.origin = Origin(library, lambda: self.state.adapters)
        self.keeper.sources.origin = lambda: self.origin.peer
        self.migrator = Migrator(self)

    def _starting(self, replica: ReplicaId) -> Config:
        """The configuration of a replica that starts now."""
        config = with_max_lora_rank(self.config, self.state.replicas[replica].max_lora_rank)
        return sized(config, self.library.base, self.state.adapters.values())

    # -- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start, or find again, every replica; returns at once."""
        for replica, record in self.state.replicas.items():
            if record.phase is ReplicaPhase.DRAINED:
                # An earlier controller may have died before it ended the process.
                self.keeper.stop(replica)
            else:
                self.keeper.begin(replica, find=self._recovering)
        section = self.config.placement
        self.keeper.spawn(every(section.epoch_s, "an epoch", self._epoch))
        if section.migration != "off":
            self.keeper.spawn(every(section.migration_period_s, "a migration", self.migrator.look))
        self.keeper.spawn(self._journal.retry(self._news))

    async def stop(self) -> None:
        """End the tasks; replicas stay for whoever comes next."""
        await self.keeper.close()
        await asyncio.to_thread(self.origin.close)
        self._store.close()

    async def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Return once the condition holds, looking again after every event; TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                await self._changed.wait()

    def is_ready(self) -> bool:
        """Whether the first table is out and every replica is up, drained or given up."""
        phases = {record.phase for record in self.state.replicas.values()}
        return self.table.version > 0 and not phases & {ReplicaPhase.STARTING, ReplicaPhase.UNKNOWN}

    # -- what others ask -----------------------------------------------------------------------

    @property
    def problem(self) -> str | None:
        """Why changes cannot be saved at the moment, or None."""
        return self._journal.problem

    @property
    def reports(self) -> dict[ReplicaId, ReplicaReport]:
        """The last report of each replica."""
        return self.keeper.reports

    @property
    def engines(self) -> dict[ReplicaId, EngineInfo]:
        """What each replica's engine says of itself."""
        return self.keeper.engines

    @property
    def start_errors(self) -> dict[ReplicaId, ReplicaStartError]:
        """Why replicas did not start, the last time they were tried."""
        return self.keeper.start_errors

    async def refresh_reports(self) -> None:
        """Ask every replica for its report now."""
        await self.keeper.refresh_reports()

    def copies(self, replica: ReplicaId) -> tuple[VersionId, ...]:
        """The versions a replica has acknowledged."""
        record = self.state.replicas[replica]
        return tuple(
            version for version, copy in sorted(record.copies.items()) if copy.phase is CopyPhase.HELD
        )

    def is_served(self, version: VersionId) -> bool:
        """Whether the table that routers may see names this version and a holder of it."""
        entry = self.table.entries.get(AdapterName(version.rpartition("@")[0]))
        return entry is not None and entry.version_id == version and bool(entry.holders)

    # -- adapters ------------------------------------------------------------------------------

    async def register(self, name: str, source: str, *, replace: bool) -> VersionId:
        """Validate, place and load an adapter; returns once the routing table names the version.

        AlreadyExistsError for a name that is taken, unless `replace`; AdapterRejectedError or
        OverloadedError if nobody can serve it, WorkFailedError if it cannot be saved, and then the
        registration is undone. WorkFailedError, too, if it is loaded but the table with it cannot be
        saved: it stays registered, and the table that names it follows when there is room.
        """
        lock = self._registering.setdefault(name, asyncio.Lock())
        async with lock:
            if AdapterName(name) in self.state.active and not replace:
                raise AlreadyExistsError(
                    f"adapter {name} is registered; choose another name, or replace its weights (--replace)"
                )
            registration = await self._stored(name, source)
            adapter = registration.adapter
            self._waiting.append(messages.AdapterRegistered(adapter))
            try:
                await asyncio.sleep(0)  # With what else is registered now: one plan for all.
            finally:
                self._take_waiting()
            await self._wait_served(adapter.version_id)
            return adapter.version_id

    async def _stored(self, name: str, source: str) -> StoredRegistration:
        """The adapter's files and its row are in the store; no files are deleted meanwhile.

        They may be the content of a version whose last copy goes at this moment, found there and reused.
        """
        self._num_storing += 1
        try:
            timeout_s = self.config.adapters.fetch_timeout_s
            manifest = (await self.library.add_async(name, source, timeout_s=timeout_s)).manifest
            adapter = AdapterVersion(
                version_id=version_id(AdapterName(name), manifest.sha256),
                name=AdapterName(name),
                sha256=manifest.sha256,
                rank=manifest.rank,
                size_bytes=manifest.size_bytes,
            )
            registration = StoredRegistration(
                adapter=adapter, source=source, target_modules=manifest.target_modules
            )
            try:
                self._journal.save(registration)
            except WorkFailedError as error:
                if self._num_storing == 1:
                    self._delete_files(manifest.sha256)
                self._news()
                raise WorkFailedError(f"adapter {name} is not registered: {error}") from error
            self.registrations[adapter.version_id] = registration
            return registration
        finally:
            self._num_storing -= 1

    async def _wait_served(self, version: VersionId) -> None:
        state = self.state
        try:
            await self.wait_until(
                lambda: (
                    self.is_served(version)
                    or state.refusal(version) is not None
                    or (state.is_served(version) and self.problem is not None)
                ),
                LOAD_TIMEOUT_S,
            )
            reason = state.refusal(version)
        except TimeoutError:
            reason = None
        if self.is_served(version):
            return
        if state.is_served(version):
            # The version before it is forgotten, so that taking this one back would lose the name.
            raise WorkFailedError(
                f"{version} is registered, but served only once the table can be saved: {self.problem}"
            )
        self.dispatch(messages.AdapterWithdrawn(version))
        if reason is None:
            raise WorkFailedError(f"{version}: no replica loaded it within {LOAD_TIMEOUT_S:.0f} s")
        if "no replica has" in reason:
            raise OverloadedError(f"{version}: {reason}")
        raise AdapterRejectedError(f"{version}: {reason}")

    def remove(self, name: str) -> None:
        """Take the name out of the routing table; copies are dropped as their requests end.

        NotFoundError for an unknown name; WorkFailedError if it cannot be saved, and then it stays.
        """
        active = self.state.active.get(AdapterName(name))
        if active is None:
            known = ", ".join(sorted(self.state.active)) or "none"
            raise NotFoundError(f"adapter {name} is not registered; registered: {known}")
        versions = self.state.holdings.versions_of(AdapterName(name))
        try:
            # Before anything happens, so that what is answered for is durable.
            self._journal.write(Changes(deleted=set(versions)))
        except WorkFailedError as error:
            raise WorkFailedError(f"adapter {name} is not removed: {error}") from error
        self.dispatch(messages.AdapterRemoved(AdapterName(name)))

    def save_wish(self, changes: Changes) -> None:
        """Make what an operator wants durable before it is acted on; WorkFailedError."""
        self._journal.write(changes)

    # -- events and commands -------------------------------------------------------------------

    def dispatch(self, event: messages.Event) -> None:
        """Give the state machine an event and execute what it asks for, in order."""
        self._take_waiting()
        self._step([event], lambda: self.state.handle(event))

    def answered(self, answer: messages.Answer) -> None:
        """Take in an answer to a load or drop, with what waits already and before any other event."""
        self._waiting.append(answer)
        if len(self._waiting) == 1:
            self.keeper.spawn(self._waiting_are_here())

    async def _waiting_are_here(self) -> None:
        self._take_waiting()

    def _take_waiting(self) -> None:
        events, self._waiting = self._waiting, []
        if events:
            self._step(events, lambda: self.state.handle_many(events))

    def _step(self, events: Sequence[messages.Event], handle: Callable[[], list[messages.Command]]) -> None:
        for event in events:
            logger.debug("event %s", event)
            self._on_step(event, "before")
        commands = handle()
        for command in commands:
            self._on_step(command, "before")
            self._execute(command)
        self._journal.flush()
        for command in commands:
            self._on_step(command, "after")
        self._collect_files()
        for event in events:
            self._on_step(event, "after")
        self._news()

    def _execute(self, command: messages.Command) -> None:
        match command:
            case messages.SaveAdapter():
                pass  # `register` saved it before the state machine heard of it
            case messages.StartReplica(replica_id=replica, attempt=attempt):
                self.keeper.start(replica, attempt)
            case messages.StopReplica(replica_id=replica):
                self.keeper.stop(replica)
            case messages.LoadAdapter(replica_id=replica, adapter=adapter):
                self.keeper.load(replica, adapter)
            case _:
                self._journal.put(command)

    def _publish(self, table: RoutingTable) -> None:
        self._on_step(messages.PublishTable(table), "durable")
        self.table = table
        self._news()

    def _release(self, command: Dependent) -> None:
        """Carry out what waited for a write, if it is still what the state machine wants."""
        record = self.state.replicas[command.replica_id]
        self._on_step(command, "released")
        match command:
            case messages.UnloadAdapter(replica_id=replica, version_id=version):
                copy = record.copies.get(version)
                if copy is not None and copy.phase is CopyPhase.RETIRING:
                    self.keeper.unload(replica, version)
            case messages.DrainReplica(replica_id=replica, deadline_s=deadline_s):
                if record.leaving:
                    self.keeper.drain(replica, deadline_s)

    def _news(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _collect_files(self) -> None:
        """Delete the files of versions that nobody registers or holds any more, once nothing is stored."""
        if self._num_storing:
            return
        held = {version for record in self.state.replicas.values() for version in record.copies}
        for version, entry in list(self.registrations.items()):
            needed = version in held or version in self.state.adapters
            if not needed and self._delete_files(entry.adapter.sha256, version):
                del self.registrations[version]

    def _delete_files(self, sha256: str, version: VersionId | None = None) -> bool:
        """Delete content that no registration names, but for this version's; False if it is to be tried
        again."""
        others = (entry.adapter.sha256 for key, entry in self.registrations.items() if key != version)
        return sha256 in others or is_removed(self.library, sha256)

    def end_epoch(self) -> None:
        """Plan the next epoch, for the demand that is forecast for it."""
        self.dispatch(messages.EpochElapsed(self.demand.end_epoch(self.state.adapters.values())))

    async def _epoch(self) -> None:
        await self.refresh_reports()
        self.end_epoch()
        advise_replicas(self)

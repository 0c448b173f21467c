"""Makes durable what must be, in order, and holds back what rests on it while the disk does not take it.

A table is given out only once its version is on the disk, and copies are dropped and replicas drained only
after the table that does without them. While writes fail, what is to be written is merged into one
write, which is tried again with every new one and by itself; loads and starts are not the journal's and
go on. What waits is bounded: one plan with those before it, one table, and at most one command per copy
and replica.
"""

import asyncio
import logging
from collections.abc import Callable

from loraserve.controller.store import Changes, Store, StoredRegistration
from loraserve.errors import WorkFailedError
from placement.cluster import messages
from placement.plans.book import EarlierPlan
from placement.table import RoutingTable

logger = logging.getLogger(__name__)

FIRST_RETRY_S = 1.0
MAX_RETRY_S = 10.0

Durable = (
    messages.SavePlan
    | messages.KeepPlan
    | messages.SaveFreeze
    | messages.DeleteAdapter
    | messages.SaveDrain
    | messages.SaveMaxLoraRank
    | messages.PublishTable
)
Dependent = messages.UnloadAdapter | messages.DrainReplica


class Journal:
    """`put` what must be durable and what depends on it, then `flush`; `retry` runs beside.

    `publish` is called with a table whose version is on the disk, `release` with a dependent command
    once everything put before it is.
    """

    def __init__(
        self,
        store: Store,
        *,
        publish: Callable[[RoutingTable], None],
        release: Callable[[Dependent], None],
    ) -> None:
        self.problem: str | None = None
        self._store = store
        self._publish = publish
        self._release = release
        self._changes = Changes()
        self._table: RoutingTable | None = None
        self._waiting: dict[Dependent, None] = {}
        self._failed = asyncio.Event()

    def save(self, registration: StoredRegistration) -> None:
        """Write a registration now; WorkFailedError if the disk does not take it, and then it is not
        there."""
        try:
            self._store.save_adapter(registration)
        except WorkFailedError as error:
            self._has_failed(error)
            raise
        self._changes.deleted.discard(registration.adapter.version_id)

    def write(self, changes: Changes) -> None:
        """Write something that is answered for, now or not at all; WorkFailedError."""
        try:
            self._store.write(changes)
        except WorkFailedError as error:
            self._has_failed(error)
            raise

    def put(self, command: Durable | Dependent) -> None:
        """Take a command in; `flush` carries it out."""
        match command:
            case messages.SavePlan(plan=plan):
                self._changes.plan = plan
            case messages.KeepPlan(number=number, plan=plan, ended_by=why):
                kept = None if plan is None else EarlierPlan(number=number, plan=plan, ended_by=why)
                self._changes.earlier_plans[number] = kept
            case messages.SaveFreeze(plan=frozen):
                self._changes.frozen = [frozen]
            case messages.DeleteAdapter(version_id=version):
                self._changes.deleted.add(version)
            case messages.SaveDrain(replica_id=replica, order=order):
                self._changes.drains[replica] = order
            case messages.SaveMaxLoraRank(replica_id=replica, max_lora_rank=rank):
                self._changes.max_lora_ranks[replica] = rank
                shown = "the one of the configuration" if rank is None else rank
                logger.info("%s is to start with another max_lora_rank: %s", replica, shown)
            case messages.PublishTable(table=table):
                self._changes.table_version, self._table = table.version, table
            case messages.UnloadAdapter() | messages.DrainReplica():
                self._waiting[command] = None

    def flush(self) -> None:
        """Write what has been put and carry out what rests on it, or leave all of it for later."""
        if self._changes:
            self._touch()
            try:
                self._store.write(self._changes)
            except WorkFailedError as error:
                self._has_failed(error)
                return
            if self.problem is not None:
                logger.warning("the store takes writes again; nothing was lost")
                self.problem = None
        self._changes = Changes()
        table, self._table = self._table, None
        waiting, self._waiting = self._waiting, {}
        if table is not None:
            logger.info("routing table %d: %d adapters", table.version, len(table.entries))
            self._publish(table)
        for command in waiting:
            self._release(command)

    async def retry(self, on_recovered: Callable[[], None]) -> None:
        """Flush again while there is a problem, with growing pauses; for ever."""
        while True:
            await self._failed.wait()
            self._failed.clear()
            pause_s = FIRST_RETRY_S
            while self.problem is not None:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_RETRY_S)
                self._probe()
            on_recovered()

    def _probe(self) -> None:
        self._touch()
        self.flush()

    def _touch(self) -> None:
        """While there is a problem, write more than deletions: one of what is not there succeeds on a
        full disk, and only a real write tells whether there is room again."""
        if self.problem is not None and self._changes.table_version is None:
            self._changes.table_version = self._store.table_version()

    def _has_failed(self, error: WorkFailedError) -> None:
        if self.problem is None:
            logger.error("%s; routers serve on, changes wait until it can be written", error)
        self.problem = str(error)
        self._failed.set()

"""Tables that follow one another: what their maker remembers of the last one changes none of them."""

from random import Random
from types import MappingProxyType

from hypothesis import given, settings
from hypothesis import strategies as st

from placement.cluster.records import Copy, CopyPhase, DrainOrder, Holdings, ReplicaPhase, ReplicaRecord
from placement.cluster.tables import TableMaker
from placement.routing.replica_cost import CostBook
from placement.table import RoutingTable
from placement.types import AdapterName, AdapterVersion, Holder, Placement, ReplicaId, VersionId
from tests.support.cluster_kit import adapter, spec

REPLICAS = tuple(ReplicaId(f"replica-{index}") for index in range(4))
NAMES = ("a", "b", "c")
OLDER, NEWER = ({name: adapter(name, digest=digit * 64) for name in NAMES} for digit in "01")
VERSIONS = {one.version_id: one for versions in (OLDER, NEWER) for one in versions.values()}


class Cluster:
    """Anything that records could say, changed a little at a time, and not always as a cluster would."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.records = {one: ReplicaRecord(one, ReplicaPhase.READY, spec(one, slots=3)) for one in REPLICAS}
        self.active = {AdapterName(name): OLDER[name].version_id for name in NAMES}
        self.superseded: dict[AdapterName, list[VersionId]] = {}
        self.plan = Placement()
        self.full: frozenset[ReplicaId] = frozenset()
        self.replan()
        for version, holders in self.plan.holders.items():
            for holder in holders:
                self.records[holder.replica_id].copies[version] = Copy(CopyPhase.HELD, 1)

    def replan(self) -> None:
        """Each version that is active on some of the replicas."""
        holders: dict[VersionId, tuple[Holder, ...]] = {}
        for version in self.active.values():
            chosen = sorted(self.rng.sample(REPLICAS, self.rng.randint(1, 3)))
            idle = self.rng.random() < 0.3 and len(chosen) > 1
            share = 1 / (len(chosen) - idle)
            holders[version] = tuple(
                Holder(replica_id=one, share=0.0, spill=True)
                if idle and one == chosen[0]
                else Holder(replica_id=one, share=share)
                for one in chosen
            )
        self.plan = Placement(MappingProxyType(holders))

    def change(self) -> None:
        """One thing is otherwise."""
        rng, record = self.rng, self.records[self.rng.choice(REPLICAS)]
        version = rng.choice(sorted(VERSIONS))
        match rng.choices(("copy", "full", "refused", "plan", "phase", "version"), (8, 3, 2, 1, 1, 1))[0]:
            case "copy":
                record.copies.pop(version, None)
                if rng.random() < 0.7:
                    record.copies[version] = Copy(rng.choice(tuple(CopyPhase)), 1)
            case "full":
                self.full = frozenset(rng.sample(REPLICAS, rng.randint(0, 2)))
            case "refused":
                record.refused = {} if record.refused else {version: "no room"}
            case "plan":
                self.replan()
            case "phase":
                record.phase = rng.choice((ReplicaPhase.READY, ReplicaPhase.DRAINING, ReplicaPhase.STARTING))
                record.drain = DrainOrder(deadline_s=1.0, force=rng.random() < 0.5)
            case "version":
                name = AdapterName(rng.choice(NAMES))
                self.active[name] = NEWER[name].version_id
                self.superseded[name] = rng.choice(([], [OLDER[name].version_id]))

    @property
    def holdings(self) -> Holdings:
        adapters: dict[VersionId, AdapterVersion] = VERSIONS
        return Holdings(
            replicas=self.records,
            adapters=adapters,
            active=self.active,
            superseded=self.superseded,
            plan=self.plan,
            planned_on={},
        )


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_a_table_is_the_same_whatever_was_made_before(seed: int) -> None:
    cluster, kept, before = Cluster(Random(seed)), TableMaker(CostBook({})), RoutingTable()
    for _ in range(30):
        table = kept.make(cluster.holdings, before, cluster.full)
        assert table == TableMaker(CostBook({})).make(cluster.holdings, before, cluster.full)
        before = table
        cluster.change()


def test_an_entry_of_which_nothing_has_changed_is_not_made_again() -> None:
    cluster, maker = Cluster(Random(0)), TableMaker(CostBook({}))
    first = maker.make(cluster.holdings, RoutingTable(), frozenset())
    # Half of what is planned is there.
    cluster.records[REPLICAS[0]].copies.clear()
    second = maker.make(cluster.holdings, first, frozenset())
    third = maker.make(cluster.holdings, second, frozenset({REPLICAS[0]}))
    assert second.entries != first.entries
    assert all(third.entries[name] is entry for name, entry in second.entries.items())

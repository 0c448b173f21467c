"""Which `max_lora_rank` each replica should run with, where the engine charges every row its setting.

Owns the choice, whether it repays its restarts, and which replica is next. Pure: a restart is carried out by
the cluster's state machine (`cluster.resize`). Replicas whose kernel is not `padded_config` keep their
setting.

A replica set to m serves every rank up to m, and sustains op(m) of any of them. So ranks nest, and tokens can
be split over replicas such that none is used above U exactly if for every rank r the demand of r and above is
at most U times the capacity of the replicas set to r and above. For one U the best settings follow from the
highest rank down: each gets the fewest replicas with which that holds, and with which its adapters are held.
The lowest U is found by bisection.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from placement.capacity import kernel_of, tokens_per_s
from placement.engine_sizes import RANK_STEPS
from placement.latency import RankKernel
from placement.types import AdapterVersion, ReplicaId, ReplicaSpec, Snapshot

BISECTIONS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSizingLimits:
    """When restarts are worth it.

    A replica that restarts takes no more requests for `drain_s`, is away for `restart_s`, and then loads its
    adapters at `load_bytes_per_s`; meanwhile the others may fall behind by `max_backlog_s` of work, as under
    a load that is carried nobody is to wait for a better setting. The gain counts over `horizon_epochs`
    epochs, has to be `margin` times the cost, and the highest utilisation to fall by `min_gain` of it. Every
    rank keeps `min_holders` replicas, and so does `kept`, whether or not an adapter of it is registered; no
    setting is above `highest`.
    """

    restart_s: float = 60.0
    drain_s: float = 15.0
    load_bytes_per_s: float = 1e9
    horizon_epochs: int = 20
    margin: float = 2.0
    max_backlog_s: float = 0.0
    min_gain: float = 0.1
    min_holders: int = 1
    kept: int = 0
    highest: int = RANK_STEPS[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """A setting for every replica that can have one, empty where it is better to leave all as they are.

    `utilisation` is the highest with the settings now and `planned_utilisation` with the best ones, infinite
    where a registered rank has no replica.
    """

    max_lora_ranks: Mapping[ReplicaId, int] = field(default_factory=lambda: MappingProxyType({}))
    utilisation: float = 0.0
    planned_utilisation: float = 0.0
    reason: str = ""


def size_ranks(
    snapshot: Snapshot,
    limits: RankSizingLimits | None = None,
    *,
    begun: Mapping[ReplicaId, int] = MappingProxyType({}),
    held: frozenset[ReplicaId] = frozenset(),
) -> RankPlan:
    """The settings that make the highest utilisation lowest, if they repay the restarts they need.

    The gain is what the cluster is spared: the part by which the highest utilisation falls, of all tokens of
    the horizon; of a utilisation above 1, the part down to 1: so many would be late. The cost is what others
    have to serve of a replica that drains, is away or loads, once for each restart. Whatever the gain, a
    registered adapter that no replica admits is made room for. Settings that were chosen before and `begun`
    are gone on with while none are better by `min_gain`, if what is left of them repays. Those `held` keep
    their setting. The order of the snapshot's tuples does not matter.
    """
    limits = limits or RankSizingLimits()
    fleet = _Fleet(snapshot, limits, held)
    if not fleet.sized:
        return RankPlan(reason="no replica's cost follows from its max_lora_rank")
    now = {spec.replica_id: spec.max_lora_rank for spec in fleet.specs}
    before = fleet.utilisation(now)
    best = fleet.best()
    if best is None:
        return RankPlan(utilisation=before, planned_utilisation=before, reason="the replicas cannot hold all")
    begun = {replica: setting for replica, setting in begun.items() if replica not in held}
    wanted, min_gain = _gone_on_with(fleet, best, {**now, **begun})
    after = fleet.utilisation(wanted)
    changed = [spec for spec in fleet.resizable if wanted[spec.replica_id] != spec.max_lora_rank]
    gain = _gain_tokens(fleet, before, after)
    cost = sum(_cost_tokens(fleet, spec, before) for spec in changed)
    found = RankPlan(utilisation=before, planned_utilisation=after, reason="as it is")
    if not changed:
        return found
    must = not fleet.holds_all(fleet.specs)
    if not must and (after > before * (1 - min_gain) or gain <= limits.margin * cost):
        return replace(found, reason="restarts would not repay their cost")
    why = "a registered adapter has no replica" if must else "the gain repays the restarts"
    ours = {spec.replica_id: wanted[spec.replica_id] for spec in fleet.sized}
    return replace(found, max_lora_ranks=MappingProxyType(dict(sorted(ours.items()))), reason=why)


def _gone_on_with(
    fleet: "_Fleet", best: dict[ReplicaId, int], begun: dict[ReplicaId, int]
) -> tuple[dict[ReplicaId, int], float]:
    """The settings to come to, and the part by which utilisation has to fall for it: none if they were chosen
    before, as the rest of a change is worth less than all of it."""
    limits = fleet.limits
    specs = [replace(spec, max_lora_rank=begun[spec.replica_id]) for spec in fleet.specs]
    is_same = all(spec.max_lora_rank == begun[spec.replica_id] for spec in fleet.specs)
    is_possible = all(begun[spec.replica_id] <= limits.highest for spec in fleet.resizable)
    if is_same or not is_possible or not fleet.holds_all(specs):
        return best, limits.min_gain
    if fleet.utilisation(begun) * (1 - limits.min_gain) <= fleet.utilisation(best):
        return begun, 0.0
    return best, limits.min_gain


def next_restart(
    snapshot: Snapshot,
    max_lora_ranks: Mapping[ReplicaId, int],
    *,
    restarting: frozenset[ReplicaId] = frozenset(),
    limits: RankSizingLimits | None = None,
    is_overloaded: bool = True,
) -> ReplicaId | None:
    """The replica to restart to its planned setting now, or None: there is none, or one restarts already, or
    what it must hold would find no place on the others meanwhile or afterwards.

    `snapshot.replicas` are those that serve. Of several the one with whose setting the highest utilisation is
    lowest. A cluster that carries its load, now or as `is_overloaded` knows of the epochs before, is not made
    to fall behind by more than `max_backlog_s`, unless an adapter has no replica.
    """
    limits = limits or RankSizingLimits()
    fleet = _Fleet(snapshot, limits)
    if restarting:
        return None
    before = {spec.replica_id: spec.max_lora_rank for spec in fleet.specs}
    best: tuple[float, ReplicaId] | None = None
    for spec in fleet.resizable:
        wanted = max_lora_ranks.get(spec.replica_id, spec.max_lora_rank)
        if wanted == spec.max_lora_rank or not _may_restart(fleet, spec, wanted, is_overloaded):
            continue
        key = (fleet.utilisation({**before, spec.replica_id: wanted}), spec.replica_id)
        if best is None or key < best:
            best = key
    return None if best is None else best[1]


def restart_cost_tokens(snapshot: Snapshot, replica: ReplicaId, limits: RankSizingLimits) -> float:
    """What others have to serve of this replica while it restarts."""
    fleet = _Fleet(snapshot, limits)
    now = {spec.replica_id: spec.max_lora_rank for spec in fleet.specs}
    (spec,) = (spec for spec in fleet.specs if spec.replica_id == replica)
    return _cost_tokens(fleet, spec, fleet.utilisation(now))


def spared_tokens(snapshot: Snapshot, limits: RankSizingLimits, before: Mapping[ReplicaId, int]) -> float:
    """What the settings as they are spare the cluster in an epoch, beside those with `before`; less than 0 if
    they are the worse ones."""
    fleet = _Fleet(snapshot, limits)
    settings = {spec.replica_id: spec.max_lora_rank for spec in fleet.specs}
    now, then = fleet.utilisation(settings), fleet.utilisation({**settings, **before})
    return (_gain_tokens(fleet, then, now) - _gain_tokens(fleet, now, then)) / limits.horizon_epochs


def holds_all(adapters: Iterable[AdapterVersion], specs: Iterable[ReplicaSpec]) -> bool:
    """Whether these replicas have room for these adapters: True only if packing them, the highest rank first,
    finds a place for each."""
    return _holds(_sorted_adapters(adapters), tuple(specs))


def can_spare(adapters: Iterable[AdapterVersion], spec: ReplicaSpec, others: Sequence[ReplicaSpec]) -> bool:
    """Whether the others can hold every adapter that any replica, this one included, admits."""
    admitted = [one for one in adapters if spec.admits(one) or any(each.admits(one) for each in others)]
    return _holds(_sorted_adapters(admitted), others)


def _may_restart(fleet: "_Fleet", spec: ReplicaSpec, wanted: int, is_overloaded: bool) -> bool:
    others = [one for one in fleet.specs if one.replica_id != spec.replica_id]
    if not others or not can_spare(fleet.adapters, spec, others):
        return False
    if not fleet.holds_all(fleet.specs):
        return True
    if not fleet.holds_all([*others, replace(spec, max_lora_rank=wanted)]):
        return False
    now = {one.replica_id: one.max_lora_rank for one in fleet.specs}
    without = {one.replica_id: one.max_lora_rank for one in others}
    away_s = fleet.limits.drain_s + fleet.limits.restart_s
    backlog_s = (fleet.utilisation(without) - 1) * away_s
    return backlog_s <= fleet.limits.max_backlog_s or (is_overloaded and fleet.utilisation(now) > 1.0)


def _gain_tokens(fleet: "_Fleet", before: float, after: float) -> float:
    if before <= 0 or before == after:
        return 0.0
    needed = max(1.0, after) if before > 1 else after
    part = 1.0 if before == float("inf") else max(0.0, 1 - needed / before)
    return part * fleet.total_tokens_per_s * fleet.snapshot.epoch_s * fleet.limits.horizon_epochs


def _cost_tokens(fleet: "_Fleet", spec: ReplicaSpec, utilisation: float) -> float:
    total_bytes = sum(adapter.size_bytes for adapter in fleet.adapters)
    loaded_bytes = min(spec.pool_bytes, total_bytes) / len(fleet.specs)
    away_s = fleet.limits.drain_s + fleet.limits.restart_s + loaded_bytes / fleet.limits.load_bytes_per_s
    return min(1.0, utilisation) * fleet.capacity(spec, spec.max_lora_rank) * away_s


def _sorted_adapters(adapters: Iterable[AdapterVersion]) -> list[AdapterVersion]:
    return sorted(adapters, key=lambda one: (-one.rank, -one.size_bytes, one.version_id))


def _holds(adapters: Sequence[AdapterVersion], specs: Sequence[ReplicaSpec]) -> bool:
    """Next fit, adapters by falling rank over replicas by falling setting: all of a rank's replicas come
    before those set lower, so that the first of these ends the search."""
    rooms = iter(sorted(specs, key=lambda one: (-one.max_lora_rank, one.replica_id)))
    spec, free_adapters, free_bytes = next(rooms, None), 0, 0
    if spec is not None:
        free_adapters, free_bytes = spec.pool_adapters, spec.pool_bytes
    for adapter in adapters:
        while spec is not None and (free_adapters < 1 or free_bytes < adapter.size_bytes):
            spec = next(rooms, None)
            if spec is not None:
                free_adapters, free_bytes = spec.pool_adapters, spec.pool_bytes
        if spec is None or spec.max_lora_rank < adapter.rank:
            return False
        free_adapters -= 1
        free_bytes -= adapter.size_bytes
    return True


class _Fleet:
    """The snapshot's numbers by rank, gathered once."""

    def __init__(
        self, snapshot: Snapshot, limits: RankSizingLimits, held: frozenset[ReplicaId] = frozenset()
    ) -> None:
        self.snapshot = snapshot
        self.limits = limits
        self.specs = sorted(snapshot.replicas, key=lambda spec: spec.replica_id)
        self.sized = [
            spec
            for spec in self.specs
            if kernel_of(snapshot.profiles.get(spec.profile)) is RankKernel.PADDED_CONFIG
        ]
        self.resizable = [spec for spec in self.sized if spec.replica_id not in held]
        self.adapters = _sorted_adapters(snapshot.adapters)
        ranks = {adapter.rank for adapter in self.adapters} | ({limits.kept} if limits.kept else set())
        self.ranks = sorted(ranks, reverse=True)
        demand = dict.fromkeys(self.ranks, 0.0)
        for adapter in self.adapters:
            demand[adapter.rank] += snapshot.demand_tokens_per_s.get(adapter.version_id, 0.0)
        self.total_tokens_per_s = sum(demand.values())
        self.from_rank: list[tuple[int, float]] = []
        """Each rank, the highest first, and the demand of it and of all above it."""
        reached = 0.0
        for rank in self.ranks:
            reached += demand[rank]
            self.from_rank.append((rank, reached))
        self._capacities: dict[tuple[str, int], float] = {}

    def capacity(self, spec: ReplicaSpec, setting: int) -> float:
        """What the replica sustains of any rank up to this setting."""
        if kernel_of(self.snapshot.profiles.get(spec.profile)) is not RankKernel.PADDED_CONFIG:
            setting = spec.max_lora_rank
        key = (spec.profile, setting)
        if key not in self._capacities:
            asked = replace(spec, max_lora_rank=setting)
            self._capacities[key] = tokens_per_s(self.snapshot.profiles, asked, setting, setting)
        return self._capacities[key]

    def utilisation(self, settings: Mapping[ReplicaId, int]) -> float:
        """The highest, with these settings and without replicas that are not among them."""
        found = sorted(
            ((settings[spec.replica_id], spec) for spec in self.specs if spec.replica_id in settings),
            key=lambda pair: -pair[0],
        )
        highest, capacity, taken = 0.0, 0.0, 0
        for rank, demand in self.from_rank:
            while taken < len(found) and found[taken][0] >= rank:
                capacity += self.capacity(found[taken][1], found[taken][0])
                taken += 1
            if capacity == 0:
                return float("inf")
            highest = max(highest, demand / capacity)
        return highest

    def holds_all(self, specs: Sequence[ReplicaSpec]) -> bool:
        """Whether these replicas, set as they are, can hold every adapter."""
        return _holds(self.adapters, specs)

    def best(self) -> dict[ReplicaId, int] | None:
        """The settings with the lowest highest utilisation, those that are right already left alone; None if
        no settings hold every adapter."""
        found = self._settings_for(float("inf"))
        if found is None:
            return None
        low, high = 0.0, self.utilisation(found)
        for _ in range(BISECTIONS if high > 0 else 0):
            middle = (low + high) / 2
            tried = self._settings_for(middle)
            if tried is None:
                low = middle
            else:
                found, high = tried, min(middle, self.utilisation(tried))
        return self._relabelled(found)

    def _settings_for(self, target: float) -> dict[ReplicaId, int] | None:
        """For each rank, the highest first, the fewest replicas that serve and hold it and all above it at
        this utilisation; None if there are not enough."""
        fixed = [spec for spec in self.specs if spec not in self.resizable]
        left = sorted(self.resizable, key=self._order)
        taken: list[ReplicaSpec] = []
        settings = {spec.replica_id: spec.max_lora_rank for spec in fixed}
        place = 0
        for rank, demand in self.from_rank:
            while place < len(self.adapters) and self.adapters[place].rank >= rank:
                place += 1
            able = [spec for spec in fixed if spec.max_lora_rank >= rank]
            while not self._suffices([*able, *taken], settings, demand / target, self.adapters[:place]):
                if not left:
                    return None
                spec = left.pop(0)
                setting = self._setting(spec, rank)
                if setting is None:
                    return None
                settings[spec.replica_id] = setting
                taken.append(replace(spec, max_lora_rank=setting))
        lowest = self.ranks[-1] if self.ranks else 0
        for spec in left:
            # Nothing registered: nothing to choose by.
            setting = self._setting(spec, lowest) if self.ranks else spec.max_lora_rank
            settings[spec.replica_id] = spec.max_lora_rank if setting is None else setting
        return settings

    def _suffices(
        self,
        specs: Sequence[ReplicaSpec],
        settings: Mapping[ReplicaId, int],
        capacity: float,
        adapters: Sequence[AdapterVersion],
    ) -> bool:
        if len(specs) < min(self.limits.min_holders, len(self.specs)):
            return False
        total = sum(self.capacity(spec, settings[spec.replica_id]) for spec in specs)
        return total > 0 and total >= capacity * (1 - 1e-9) and _holds(adapters, specs)

    def _setting(self, spec: ReplicaSpec, rank: int) -> int | None:
        """The allowed setting from this rank up at which the replica sustains most, the lowest of these."""
        steps = [step for step in RANK_STEPS if rank <= step <= self.limits.highest]
        if not steps:
            return None
        return max(steps, key=lambda step: (self.capacity(spec, step), -step))

    def _order(self, spec: ReplicaSpec) -> tuple[float, ReplicaId]:
        """Those first that lose least by being set high."""
        if not self.ranks:
            return 0.0, spec.replica_id
        low, high = self._setting(spec, self.ranks[-1]), self._setting(spec, self.ranks[0])
        if low is None or high is None:
            return 0.0, spec.replica_id
        return self.capacity(spec, low) / self.capacity(spec, high), spec.replica_id

    def _relabelled(self, settings: dict[ReplicaId, int]) -> dict[ReplicaId, int]:
        """The same settings over replicas that are alike, as many as can be where they are already."""
        alike: dict[tuple[str, int, int], list[ReplicaSpec]] = {}
        for spec in self.resizable:
            alike.setdefault((spec.profile, spec.pool_adapters, spec.pool_bytes), []).append(spec)
        found = dict(settings)
        for specs in alike.values():
            wanted = sorted((settings[spec.replica_id] for spec in specs), reverse=True)
            moved = []
            for spec in specs:
                if spec.max_lora_rank in wanted:
                    wanted.remove(spec.max_lora_rank)
                    found[spec.replica_id] = spec.max_lora_rank
                else:
                    moved.append(spec)
            moved.sort(key=lambda spec: (-spec.max_lora_rank, spec.replica_id))
            found.update({spec.replica_id: setting for spec, setting in zip(moved, wanted, strict=True)})
        return found

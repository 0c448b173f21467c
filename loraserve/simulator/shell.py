"""The controller's shell in simulated time: carries the state machine's commands out on the sites.

The state machine is the live controller's own; its events come from here as they come from Ray there.
"""

from collections.abc import Callable, Mapping
from functools import partial

from loraserve.simulator.agenda import Agenda
from loraserve.simulator.dispatch import Dispatch
from loraserve.simulator.restarts import Orphans, Restarts, resizer_of
from loraserve.simulator.scenario import Failure, Scenario
from loraserve.simulator.site import Site
from loraserve.simulator.transfers import Transfers
from placement.cluster import messages
from placement.cluster.state import ClusterState
from placement.latency import PS_PER_S
from placement.policies import policy
from placement.types import AdapterVersion, Placement, ReplicaId, Snapshot, VersionId

FIRST_POLL_PS = PS_PER_S // 100
LAST_POLL_PS = PS_PER_S
"""How soon a copy that requests still use is looked at again: 10 ms, then twice as long each time."""


class Shell:
    """One controller over all sites. `begin` once; failures and epochs are told by the run."""

    def __init__(
        self, scenario: Scenario, sites: Mapping[ReplicaId, Site], dispatch: Dispatch, agenda: Agenda
    ) -> None:
        self._scenario = scenario
        self._sites = sites
        self._dispatch = dispatch
        self._agenda = agenda
        self._specs = {setup.spec.replica_id: setup.spec for setup in scenario.replicas}
        self._adapters = {adapter.version_id: adapter for adapter in scenario.adapters}
        self._table_ps = round(scenario.table_delay_s * PS_PER_S)
        self._network_ps = round(scenario.network_delay_s * PS_PER_S)
        self.transfers = Transfers(
            origin=scenario.origin, peer=scenario.peer, agenda=agenda, arrived=self._arrived
        )
        # What is fetched on demand need not be loaded to be in the table.
        plan = self._first_plan() if scenario.warm or scenario.on_demand else None
        self.is_over: Callable[[int], bool] = lambda now_ps: False
        """Whether every request has ended."""
        self._planned = plan.holders if plan is not None else {}
        self.state = ClusterState(
            replica_ids=self._specs,
            policy=policy(scenario.policy),
            seed=scenario.seed,
            max_restarts=scenario.max_restarts,
            adapters=scenario.adapters,
            plan=plan,
            profiles=scenario.profiles,
            epoch_s=scenario.epoch_s,
            resizer=resizer_of(scenario),
        )
        self._restarts = Restarts(
            scenario,
            dispatch=dispatch,
            transfers=self.transfers,
            agenda=agenda,
            tell=self.dispatch,
            lost=self._refetch,
        )

    def _first_plan(self) -> Placement:
        scenario = self._scenario
        return policy(scenario.policy).plan(
            Snapshot(
                adapters=scenario.adapters,
                replicas=tuple(self._specs.values()),
                seed=scenario.seed,
                profiles=scenario.profiles,
                epoch_s=scenario.epoch_s,
            )
        )

    def begin(self) -> None:
        """Bring every replica up, with its part of the first plan if there is one."""
        resident: dict[ReplicaId, list[VersionId]] = {replica: [] for replica in self._sites}
        for version, holders in self._planned.items():
            for holder in holders:
                resident[holder.replica_id].append(version)
        for replica, site in self._sites.items():
            model = site.start(0)
            for version in sorted(resident[replica]) if self._scenario.warm else ():
                adapter = self._adapters[version]
                model.hold(version, adapter.rank, adapter.size_bytes, 0)
                site.held.add(version)
            self._note_evicted(site)
            self.dispatch(self._ready(site, frozenset(resident[replica])), 0)
        # As with `up`, which returns only when the routers have the first table.
        self._dispatch.set_table(self.state.table, 0)

    def dispatch(self, event: messages.Event, now_ps: int) -> None:
        """Tell the state machine, and do what it asks for, in order."""
        for command in self.state.handle(event):
            match command:
                case messages.PublishTable(table=table):
                    self._agenda.put(now_ps + self._table_ps, partial(self._dispatch.set_table, table))
                case messages.LoadAdapter(replica_id=replica, adapter=adapter):
                    self._load(self._sites[replica], adapter, now_ps)
                case messages.UnloadAdapter(replica_id=replica, version_id=version):
                    self._unload(self._sites[replica], version, now_ps)
                case messages.StartReplica(replica_id=replica):
                    site = self._sites[replica]
                    self._agenda.put(max(now_ps, site.down_until_ps), partial(self._start, site))
                case messages.DrainReplica(replica_id=replica, deadline_s=deadline_s):
                    self._restarts.drain(self._sites[replica], deadline_s, now_ps)
                case messages.StopReplica(replica_id=replica):
                    self._restarts.stop(self._sites[replica], now_ps)
                case _:
                    pass  # Nothing here is durable.

    def _ready(self, site: Site, resident: frozenset[VersionId]) -> messages.ReplicaReady:
        return messages.ReplicaReady(site.spec, site.replica_id, resident=resident)

    # -- replicas that die ---------------------------------------------------------------------

    def fail(self, failure: Failure, now_ps: int) -> None:
        """A replica dies; one that is down already does not."""
        site = self._sites[failure.replica_id]
        if site.model is None:
            return
        lost = site.die(now_ps)
        site.down_until_ps = now_ps + round(failure.down_s * PS_PER_S)
        orphans = self.transfers.lose(site, now_ps)
        self._dispatch.lose(site.replica_id, lost, now_ps)
        self._refetch(orphans, now_ps)
        detected_ps = now_ps + round(self._scenario.detection_s * PS_PER_S)
        event = messages.ReplicaLost(site.replica_id, "it died")
        self._agenda.put(detected_ps, partial(self.dispatch, event))

    def _refetch(self, orphans: Orphans, now_ps: int) -> None:
        """Get from others what was on its way from a replica that is gone."""
        for other, adapter in orphans:
            other.fetching.discard(adapter.version_id)
            self._fetch(other, adapter, now_ps)

    def _start(self, site: Site, now_ps: int) -> None:
        if self.is_over(now_ps):
            # What it would load now nobody asks for any more.
            return
        setting = self.state.replicas[site.replica_id].max_lora_rank
        if setting is not None:
            site.set_max_lora_rank(setting)
        site.start(now_ps)
        self._dispatch.come(site.replica_id, now_ps)
        self.dispatch(self._ready(site, frozenset()), now_ps)

    # -- copies --------------------------------------------------------------------------------

    def _load(self, site: Site, adapter: AdapterVersion, now_ps: int) -> None:
        site.dropping.discard(adapter.version_id)
        if self._scenario.on_demand:
            event = messages.AdapterLoaded(site.replica_id, adapter.version_id)
            self._agenda.put(now_ps, self._if_alive(site, partial(self.dispatch, event)))
        elif site.model is not None:
            self._fetch(site, adapter, now_ps)

    def _fetch(self, site: Site, adapter: AdapterVersion, now_ps: int) -> None:
        if adapter.version_id not in site.fetching:
            site.fetching.add(adapter.version_id)
            self.transfers.begin(site, adapter, self._sources(site, adapter), now_ps)

    def _sources(self, site: Site, adapter: AdapterVersion) -> list[Site]:
        """Those that the table names as holders, and that have the bytes."""
        entry = self.state.table.entries.get(adapter.name)
        holders = () if entry is None else entry.holders
        sites = (self._sites[holder.replica_id] for holder in holders)
        return [one for one in sites if one is not site and adapter.version_id in one.held]

    def _arrived(self, site: Site, adapter: AdapterVersion, now_ps: int) -> None:
        version = adapter.version_id
        site.fetching.discard(version)
        model = site.settle(now_ps)
        if model is None:
            return
        model.hold(version, adapter.rank, adapter.size_bytes, now_ps)
        site.held.add(version)
        self._note_evicted(site)
        if not self._scenario.on_demand:
            self.dispatch(messages.AdapterLoaded(site.replica_id, version), now_ps)

    def sent(self, site: Site, version: VersionId, arrival_ps: int) -> None:
        """A request is on its way to a site that fetches on demand."""
        if version not in site.held or site.has_small_pool:
            # The model takes a request in when time moves on from its arrival.
            self._agenda.put(arrival_ps + 1, self._if_alive(site, partial(self._serve_wanted, site)))

    def _serve_wanted(self, site: Site, now_ps: int) -> None:
        model = site.settle(now_ps)
        assert model is not None
        self._note_evicted(site)
        for version in model.wanted:
            site.held.discard(version)
            self._fetch(site, self._adapters[version], now_ps)
        model.wanted.clear()

    @staticmethod
    def _note_evicted(site: Site) -> None:
        if site.model is not None and site.model.evicted:
            site.held.difference_update(site.model.evicted)
            site.model.evicted.clear()

    def _unload(self, site: Site, version: VersionId, now_ps: int) -> None:
        """Refuse the version from now on; what is on its way already is still served."""
        if site.model is not None and version not in site.dropping:
            site.dropping.add(version)
            site.held.discard(version)
            first = partial(self._try_unload, site, version, FIRST_POLL_PS)
            self._agenda.put(now_ps + self._network_ps + 1, self._if_alive(site, first))

    def _try_unload(self, site: Site, version: VersionId, pause_ps: int, now_ps: int) -> None:
        if version not in site.dropping:
            return
        model = site.settle(now_ps)
        assert model is not None
        if version not in site.fetching and model.release(version, now_ps):
            site.dropping.discard(version)
            self.dispatch(messages.AdapterUnloaded(site.replica_id, version), now_ps)
            return
        again = partial(self._try_unload, site, version, min(2 * pause_ps, LAST_POLL_PS))
        self._agenda.put(now_ps + pause_ps, self._if_alive(site, again))

    @staticmethod
    def _if_alive(site: Site, act: Callable[[int], None]) -> Callable[[int], None]:
        """The act, unless the site's life has ended until then: a later one knows nothing of it."""
        life = site.life

        def act_if_alive(now_ps: int) -> None:
            if site.life == life and site.model is not None:
                act(now_ps)

        return act_if_alive

"""Replicas that the simulated controller drains, ends and starts again, as with another `max_lora_rank`.

A drain begins when the table without the replica has reached the routers and what they have sent before has
arrived; what is left at its deadline goes on elsewhere.
"""

from collections.abc import Callable
from functools import partial

from loraserve.simulator.agenda import Agenda
from loraserve.simulator.dispatch import Dispatch
from loraserve.simulator.scenario import Scenario
from loraserve.simulator.site import Site
from loraserve.simulator.transfers import Transfers
from placement.cluster import messages
from placement.cluster.resize import Resizer
from placement.latency import PS_PER_S
from placement.plans.rank_sizing import RankSizingLimits
from placement.types import AdapterVersion

POLL_PS = PS_PER_S // 20
"""How often a replica that drains is looked at."""

DEADLINE_S = 30.0
"""What running work gets on a replica that is to restart, as a live one's `drain_timeout_s`."""

Orphans = list[tuple[Site, AdapterVersion]]


def resizer_of(scenario: Scenario) -> Resizer:
    """Who decides on restarts; nobody does while settings are fixed. The first plan's setting is the
    highest."""
    if scenario.max_lora_ranks == "fixed":
        return Resizer()
    highest = max(setup.spec.max_lora_rank for setup in scenario.replicas)
    limits = RankSizingLimits(
        restart_s=scenario.restart_s, load_bytes_per_s=scenario.origin.bytes_per_s, highest=highest
    )
    return Resizer(limits, deadline_s=DEADLINE_S)


class Restarts:
    """Carries out drains and ends; `tell` gives the state machine its news, `lost` what copies others were to
    get from a replica that is ended. `num_restarts` counts."""

    def __init__(
        self,
        scenario: Scenario,
        *,
        dispatch: Dispatch,
        transfers: Transfers,
        agenda: Agenda,
        tell: Callable[[messages.Event, int], None],
        lost: Callable[[Orphans, int], None],
    ) -> None:
        self.num_restarts = 0
        self._dispatch = dispatch
        self._transfers = transfers
        self._agenda = agenda
        self._tell = tell
        self._lost = lost
        self._restart_ps = round(scenario.restart_s * PS_PER_S)
        settled_s = scenario.table_delay_s + scenario.network_delay_s
        self._settled_ps = round(settled_s * PS_PER_S) + 1

    def drain(self, site: Site, deadline_s: float, now_ps: int) -> None:
        """Have the replica finish its work, and say when it has."""
        first_ps = now_ps + self._settled_ps
        until_ps = first_ps + round(deadline_s * PS_PER_S)
        self._agenda.put(first_ps, partial(self._look, site, site.life, until_ps))

    def stop(self, site: Site, now_ps: int) -> None:
        """End the replica; what it has goes on elsewhere. The next start takes as long as a restart does."""
        if site.model is None:
            return
        left = site.die(now_ps)
        site.down_until_ps = now_ps + self._restart_ps
        orphans = self._transfers.lose(site, now_ps)
        self._dispatch.lose(site.replica_id, left, now_ps)
        self._lost(orphans, now_ps)
        self.num_restarts += 1

    def _look(self, site: Site, life: int, until_ps: int, now_ps: int) -> None:
        if site.life != life or site.model is None:
            return
        model = site.settle(now_ps)
        assert model is not None
        if model.running + model.waiting + model.coming == 0 or now_ps >= until_ps:
            self._tell(messages.ReplicaDrained(site.replica_id), now_ps)
        else:
            self._agenda.put(now_ps + POLL_PS, partial(self._look, site, life, until_ps))

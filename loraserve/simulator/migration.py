"""dLoRA's reactive co-migration in simulated time: what the live controller decides, carried out on the
sites.

Every `migration_period_s` the controller looks at all replicas. Requests whose target holds their adapter
move at once: they are given up where they are and sent on with what they have drawn. Adapters that have to
come first are added to the plan, until the next one; their requests move when the copies are there, if they
still have to.
"""

from collections.abc import Mapping
from functools import partial

from loraserve.engines.replica_model.sequence import Phase, Sequence
from loraserve.simulator.agenda import Agenda
from loraserve.simulator.dispatch import Dispatch
from loraserve.simulator.scenario import Scenario
from loraserve.simulator.shell import Shell
from loraserve.simulator.site import Site
from placement.cluster.messages import PlanGiven
from placement.latency import PS_PER_S, StepCounts
from placement.migration.choice import migrate
from placement.migration.problem import MigratingRequest, MigrationLimits, MigrationProblem
from placement.migration.view import Occupation, migrating_replicas, with_copies
from placement.types import ReplicaId, VersionId

# By nodes and not by time, so that a run is the same on every machine.
LIMITS = MigrationLimits(time_limit_s=None, node_limit=100)
POLL_PS = PS_PER_S // 10
Loads = tuple[tuple[ReplicaId, VersionId], ...]
MAX_MOVES = 8
"""A request that was sent on so often stays where it is."""


class Migrations:
    """Looks at the replicas again and again until the run is over; `num_moved` counts requests."""

    def __init__(
        self,
        scenario: Scenario,
        *,
        sites: Mapping[ReplicaId, Site],
        dispatch: Dispatch,
        shell: Shell,
        agenda: Agenda,
    ) -> None:
        self.num_moved = 0
        self.period_ps = round(scenario.migration_period_s * PS_PER_S)
        self._scenario = scenario
        self._sites = sites
        self._dispatch = dispatch
        self._shell = shell
        self._agenda = agenda
        self._network_ps = round(scenario.network_delay_s * PS_PER_S)

    def look(self, now_ps: int) -> None:
        """Move what makes the busiest replica less busy, if one is overloaded."""
        problem, sequences = self._problem(now_ps)
        found = migrate(problem, LIMITS)
        for move in found.moves:
            target = self._sites[move.target]
            sequence = sequences[move.request_id]
            is_there = move.version_id is None or target.accepts(move.version_id)
            if is_there and self._dispatch.num_attempts(sequence.request) < MAX_MOVES:
                self._move(sequence, self._sites[move.source], target, now_ps)
        if found.loads:
            state = self._shell.state
            plan = with_copies(state.plan, found.loads, state.snapshot())
            self._shell.dispatch(PlanGiven(plan, frozen=False, is_reactive=True), now_ps)
            self._wait(found.loads, now_ps + self.period_ps, now_ps + POLL_PS)

    def _problem(self, now_ps: int) -> tuple[MigrationProblem, dict[str, Sequence]]:
        """All that is in the replicas, and each request's sequence by its id."""
        sequences: dict[str, Sequence] = {}
        occupations: dict[ReplicaId, Occupation] = {}
        requests: list[MigratingRequest] = []
        for replica, site in self._sites.items():
            model = site.settle(now_ps)
            if model is None:
                continue
            running, waiting, _, usage = model.load()
            occupations[replica] = Occupation(
                running=running, waiting=waiting, kv_usage=usage, kv_blocks=model.limits.kv_blocks
            )
            for sequence in site.sequences():
                request = self._request(site, sequence, running)
                requests.append(request)
                sequences[request.request_id] = sequence
        state = self._shell.state
        replicas = migrating_replicas(
            state.replicas.values(), state.table, self._scenario.adapters, occupations
        )
        known = {one.replica_id for one in replicas}
        ours = tuple(one for one in requests if one.replica_id in known)
        return MigrationProblem(replicas=replicas, requests=ours), sequences

    def _wait(self, loads: Loads, until_ps: int, now_ps: int) -> None:
        """Look once more when these copies are there, unless it is time to anyway before."""
        if now_ps < until_ps:
            self._agenda.put(now_ps, partial(self._look_if_there, loads, until_ps))

    def _look_if_there(self, loads: Loads, until_ps: int, now_ps: int) -> None:
        if all(self._sites[replica].accepts(version) for replica, version in loads):
            self.look(now_ps)
        else:
            self._wait(loads, until_ps, now_ps + POLL_PS)

    def _move(self, sequence: Sequence, source: Site, target: Site, now_ps: int) -> None:
        if source.give_up(sequence, now_ps):
            self.num_moved += 1
            self._dispatch.note_drawn(sequence)
            self._agenda.put(
                now_ps + self._network_ps, partial(self._dispatch.send_to, sequence.request, target)
            )

    def _request(self, site: Site, sequence: Sequence, running: int) -> MigratingRequest:
        model = site.model
        assert model is not None
        drawn = model.drawn(sequence)
        tokens = sequence.prompt_tokens + drawn
        counts = StepCounts(rows=max(1, running), adapters=1, context_tokens=running * tokens)
        step_ps = site.cost.step_ps(counts)
        return MigratingRequest(
            request_id=f"{sequence.request:09}",
            version_id=sequence.version,
            replica_id=site.replica_id,
            kv_blocks=-(-tokens // model.limits.block_tokens),
            expected_s=(sequence.output_tokens - drawn) * step_ps / PS_PER_S,
            tokens=drawn,
            rank=sequence.rank,
            is_running=sequence.phase is not Phase.QUEUED,
        )

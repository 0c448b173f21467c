"""The simulation itself: arrivals in order, everything else by the agenda, and the result."""

import gc
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraserve.simulator.agenda import FAR_PS, Act, Agenda
from loraserve.simulator.check import check_result
from loraserve.simulator.dispatch import Dispatch
from loraserve.simulator.epochs import Epochs
from loraserve.simulator.give_up import GiveUp, LateCount
from loraserve.simulator.ledger import Ledger
from loraserve.simulator.migration import Migrations
from loraserve.simulator.result import SimulationResult
from loraserve.simulator.scenario import Failure, Scenario
from loraserve.simulator.shell import Shell
from loraserve.simulator.site import Site, Timing
from placement.latency import PS_PER_S
from placement.routing.chooser import make_routing_policy

CHUNK = 1 << 14
"""So many arrivals at a time are taken from their column; progress is told after each."""

Progress = Callable[[int, int], None]


def simulate(
    scenario: Scenario, *, on_progress: Progress | None = None, give_up: GiveUp | None = None
) -> SimulationResult:
    """Run the scenario to its end; `on_progress` is told how many requests of how many have come.

    The same scenario gives the same result, but for `wall_s`. With `give_up` GaveUpError ends a run that is
    certain to miss its target; one that is not gives the same result as without. AssertionError if something
    is not conserved, which is a mistake in the simulator.
    """
    with _no_cycle_collection():
        return Simulation(scenario).run(on_progress, give_up)


@contextmanager
def _no_cycle_collection() -> Iterator[None]:
    """Without Python's search for cycles: a simulation makes none while it runs, and to look through a
    thousand replicas again and again takes a seventh of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Simulation:
    """One run and all its parts; `run` once."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.agenda = Agenda()
        self.ledger = Ledger(scenario.trace)
        self.sites = _sites(scenario, self.ledger)
        by_id = {site.replica_id: site for site in self.sites}
        self.dispatch = Dispatch(scenario, by_id, self.ledger, self.agenda)
        self.shell = Shell(scenario, by_id, self.dispatch, self.agenda)
        self.shell.is_over = self._is_over
        if scenario.on_demand:
            self.dispatch.on_sent = self.shell.sent
        self.migrations = Migrations(
            scenario, sites=by_id, dispatch=self.dispatch, shell=self.shell, agenda=self.agenda
        )
        self.epochs = Epochs(scenario, self.shell, self.dispatch, self.sites, self.ledger)
        self._num_ticking = 0
        """The acts on the agenda that come again and again until the run is over."""

    def run(self, on_progress: Progress | None = None, give_up: GiveUp | None = None) -> SimulationResult:
        """The whole run; GaveUpError if it is given up before its end."""
        begun_s = time.perf_counter()
        self.shell.begin()
        self._tick(self.epochs.period_ps, self.epochs.elapse, 0)
        if self.scenario.migration != "off":
            self._tick(self.migrations.period_ps, self.migrations.look, 0)
        for failure in self.scenario.failures:
            self.agenda.put(round(failure.at_s * PS_PER_S), partial(self._fail, failure))
        late = LateCount(give_up, self.ledger, self.scenario.network_delay_s) if give_up is not None else None
        self._arrive(on_progress, late)
        self.agenda.run_until(FAR_PS - 1)
        for site in self.sites:
            site.finish()
        self.epochs.close(max(self.ledger.end_ps))
        self._check()
        result = self._result(time.perf_counter() - begun_s)
        check_result(result)
        return result

    def _arrive(self, on_progress: Progress | None, late: LateCount | None) -> None:
        agenda, route, num = self.agenda, self.dispatch.route, len(self.ledger)
        size = CHUNK if late is None else min(CHUNK, late.interval)
        for first in range(0, num, size):
            chunk = self.ledger.arrival_ps[first : first + size].tolist()
            for row, now_ps in enumerate(chunk, first):
                if agenda.due_ps <= now_ps:
                    agenda.run_until(now_ps)
                route(row, now_ps)
            if late is not None:
                late.look(self.sites, first + len(chunk), chunk[-1])
            if on_progress is not None:
                on_progress(first + len(chunk), num)

    def _tick(self, period_ps: int, act: Act, now_ps: int) -> None:
        self._num_ticking += 1
        self.agenda.put(now_ps + period_ps, partial(self._on_tick, period_ps, act))

    def _on_tick(self, period_ps: int, act: Act, now_ps: int) -> None:
        self._num_ticking -= 1
        if not self._is_over(now_ps):
            act(now_ps)
            self._tick(period_ps, act, now_ps)

    def _fail(self, failure: Failure, now_ps: int) -> None:
        if not self._is_over(now_ps):
            self.shell.fail(failure, now_ps)

    def _is_over(self, now_ps: int) -> bool:
        """Whether every request has ended, so that nothing that happens from now on is of interest."""
        if now_ps <= self.ledger.arrival_ps[-1]:
            return False
        for site in self.sites:
            site.look(now_ps)
        if self.ledger.num_ended == len(self.ledger):
            return True
        # Else a request that nothing moves any more would let epochs elapse for ever.
        models = [site.model for site in self.sites if site.model is not None]
        return len(self.agenda) == self._num_ticking and all(model.next_ps() is None for model in models)

    def _check(self) -> None:
        """AssertionError unless everything is at rest and accounted for."""
        assert self.ledger.num_ended == len(self.ledger), "a request never ended"
        for site in self.sites:
            assert not any(site.own), f"{site.replica_id}: routers have requests in flight at the end"
            if site.model is not None:
                left = site.model.running + site.model.waiting + site.model.coming
                assert left == 0, f"{site.replica_id}: {left} requests are left"
                site.model.check_invariants()
        self.shell.transfers.check_invariants()

    def _result(self, wall_s: float) -> SimulationResult:
        scenario, ledger, trace = self.scenario, self.ledger, self.scenario.trace
        logs = [(log, site.index) for site in self.sites for log in site.logs]
        return SimulationResult(
            arrival_ps=ledger.arrival_ps,
            first_ps=_numpy(ledger.first_ps, np.int64),
            end_ps=_numpy(ledger.end_ps, np.int64),
            prompt_tokens=trace.prompt_tokens,
            output_tokens=trace.output_tokens,
            drawn_tokens=_numpy(ledger.drawn, np.int32),
            adapter=trace.adapter,
            adapters=trace.adapters,
            replica=_numpy(ledger.replica, np.int32),
            replica_ids=tuple(site.replica_id for site in self.sites),
            router=(np.arange(len(ledger)) % scenario.num_routers).astype(np.int16),
            attempts=_numpy(ledger.attempts, np.int16),
            outcome=_numpy(ledger.outcome, np.int8),
            statuses=ledger.statuses,
            logs=tuple(log for log, _ in logs),
            log_replica=tuple(index for _, index in logs),
            epochs=tuple(self.epochs.records),
            policy=scenario.policy,
            routing=scenario.routing,
            seed=scenario.seed,
            wall_s=wall_s,
            num_events=len(ledger) + self.agenda.num_done,
            bytes_moved=self.shell.transfers.bytes_moved,
            cold_misses=self.dispatch.cold_misses,
            scenario=scenario.describe(),
        )


def _sites(scenario: Scenario, ledger: Ledger) -> list[Site]:
    timing = Timing(
        report_interval_ps=round(scenario.report_interval_s * PS_PER_S),
        report_delay_ps=round(scenario.report_delay_s * PS_PER_S),
        network_delay_ps=round(scenario.network_delay_s * PS_PER_S),
        num_routers=scenario.num_routers,
        on_demand=scenario.on_demand,
        by_rank=make_routing_policy(scenario.routing).wants_own,
    )
    phases = Random(scenario.seed)
    return [
        Site(index, setup, timing, ledger, phase_ps=phases.randrange(timing.report_interval_ps))
        for index, setup in enumerate(sorted(scenario.replicas, key=lambda setup: setup.spec.replica_id))
    ]


def _numpy(column: "array[int]", dtype: Any) -> NDArray[Any]:
    return np.frombuffer(column, dtype=dtype)

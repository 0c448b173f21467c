"""A simulated cluster as a whole: nothing is lost, looking changes nothing, and failures are survived."""

import gc
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.engines.replica_model.sequence import ReplicaLimits
from loraserve.simulator.agenda import Act
from loraserve.simulator.ledger import FAILED, OK, REFUSED
from loraserve.simulator.links import LinkSpeed
from loraserve.simulator.run import Simulation, simulate
from loraserve.simulator.scenario import Failure, Scenario
from placement.latency import PS_PER_S
from placement.types import ReplicaId
from tests.support.simulated import (
    BYTES_PER_RANK,
    NO_DELAYS,
    RANKS,
    digest,
    poisson_trace,
    replicas_of,
    run_checked,
    scenario_of,
    trace_of_columns,
)

SLOW_LINK = LinkSpeed(bytes_per_s=200e6, latency_s=0.01)


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Anything at once: several routers, stale reports, slow links, full replicas, failures."""
    num_replicas = draw(st.integers(1, 4))
    network_s = draw(st.sampled_from([0.0, 0.0005, 0.03]))
    on_demand = draw(st.booleans())
    pool = draw(st.sampled_from([0, 1, 3])) if on_demand else 0
    limits = ReplicaLimits(
        kv_blocks=draw(st.sampled_from([130, 1000])),
        max_num_seqs=draw(st.sampled_from([2, 16])),
        adapter_slots=draw(st.sampled_from([1, 8])),
        pool_adapters=pool,
    )
    failures = draw(
        st.lists(
            st.builds(
                Failure,
                at_s=st.floats(0, 20),
                replica_id=st.integers(0, num_replicas - 1).map(lambda index: ReplicaId(f"r{index}")),
                down_s=st.floats(0, 10),
            ),
            max_size=3,
        )
    )
    return scenario_of(
        poisson_trace(
            draw(st.integers(1, 120)),
            draw(st.sampled_from([2.0, 20.0])),
            num_adapters=draw(st.integers(0, 6)),
            seed=draw(st.integers(0, 99)),
        ),
        replicas_of(num_replicas, pool_adapters=draw(st.integers(1, 6)), limits=limits),
        policy=draw(st.sampled_from(["least-loaded", "slora-random"])),
        routing=draw(st.sampled_from(["least-outstanding", "weighted-share", "round-robin"])),
        num_routers=draw(st.sampled_from([1, 3])),
        network_delay_s=network_s,
        report_delay_s=network_s + draw(st.sampled_from([0.0, 0.01, 0.25])),
        max_waiting=draw(st.sampled_from([None, 3])),
        holder_wait_s=draw(st.sampled_from([0.0, 2.0])),
        epoch_s=draw(st.sampled_from([1.5, 60.0])),
        origin=SLOW_LINK,
        peer=draw(st.sampled_from([None, SLOW_LINK])),
        on_demand=on_demand,
        warm=draw(st.booleans()),
        failures=tuple(failures),
        detection_s=draw(st.sampled_from([0.0, 1.0])),
        max_restarts=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 3)),
    )


@given(scenario=scenarios())
@settings(max_examples=120, deadline=None)
def test_whatever_happens_every_request_ends_once_and_nothing_is_lost(scenario: Scenario) -> None:
    # `run` checks requests, tokens, bytes, blocks and slots, `run_checked` the cluster's own invariants.
    result = run_checked(scenario)
    assert len(result) == len(scenario.trace)


@given(scenario=scenarios(), looks=st.lists(st.tuples(st.integers(0, 40_000), st.booleans()), max_size=30))
@settings(max_examples=60, deadline=None)
def test_when_a_replica_is_looked_at_changes_nothing(
    scenario: Scenario, looks: list[tuple[int, bool]]
) -> None:
    """Replicas are moved on only when somebody asks; an onlooker who asks at any time sees no other run."""
    plain = simulate(scenario)
    watched = Simulation(scenario)

    def onlooker(deep: bool) -> Act:
        def look(now_ps: int) -> None:
            for site in watched.sites:
                site.look(now_ps)
                if deep:
                    site.settle(now_ps)

        return look

    for at_ms, deep in looks:
        watched.agenda.put(at_ms * PS_PER_S // 1000 + 1, onlooker(deep))
    seen = watched.run()
    assert digest(replace(seen, num_events=0)) == digest(replace(plain, num_events=0))


def test_the_same_scenario_gives_the_same_bytes_in_any_process() -> None:
    program = (
        "from tests.unit.simulator.test_simulated_cluster import eventful; "
        "from tests.support.simulated import digest; from loraserve.simulator.run import simulate; "
        "print(digest(simulate(eventful())))"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert digests == {digest(simulate(eventful())) + "\n"}


def test_a_run_makes_no_cycles_so_that_nobody_need_search_for_them() -> None:
    full = scenario_of(poisson_trace(2000, 60.0), replicas_of(2), max_waiting=2)
    for simulation in (Simulation(eventful()), Simulation(full)):
        gc.collect()
        gc.disable()
        try:
            simulation.run()
            assert gc.collect() == 0
        finally:
            gc.enable()


def eventful() -> Scenario:
    """Half a minute in which replicas die, come back and load what they lost, with three routers."""
    return scenario_of(
        poisson_trace(500, 15.0, num_adapters=9),
        replicas_of(3, pool_adapters=5),
        num_routers=3,
        origin=SLOW_LINK,
        peer=SLOW_LINK,
        epoch_s=5.0,
        warm=False,
        failures=(
            Failure(at_s=8.0, replica_id=ReplicaId("r1"), down_s=3.0),
            Failure(at_s=9.0, replica_id=ReplicaId("r2"), down_s=1.0),
        ),
    )


# -- failures ----------------------------------------------------------------------------------


def test_streams_of_a_replica_that_dies_go_on_elsewhere() -> None:
    failure = Failure(at_s=5.0, replica_id=ReplicaId("r0"), down_s=4.0)
    scenario = scenario_of(
        poisson_trace(300, 20.0), replicas_of(2), failures=(failure,), detection_s=1.0, origin=SLOW_LINK
    )
    result = run_checked(scenario)
    moved = result.attempts > 1
    assert moved.any()
    assert (result.outcome == OK).all()
    # They were at r0 when it died and ended on r1; none of them was answered in full before.
    assert (result.replica[moved] == 1).all()
    assert (result.end_ps[moved] > 5 * PS_PER_S).all()
    assert (result.first_ps[moved] < 5 * PS_PER_S).any(), "none had begun to answer"
    # Down for four seconds, then everything is loaded anew: 5 adapters over one link, shared.
    assert len(result.logs) == 3
    assert result.log_replica == (0, 0, 1)
    assert result.bytes_moved == BYTES_PER_RANK * sum(RANKS)
    back_ps = min(result.logs[1].run_ps)
    assert back_ps >= 9 * PS_PER_S
    after = (result.arrival_ps > 9 * PS_PER_S) & (result.adapter >= 0)
    assert (result.replica[after] == 0).any()


def test_an_adapter_whose_last_holder_died_waits_for_the_next_one() -> None:
    trace = trace_of_columns([0.0, 5.5, 6.0], 50, 20, 0, num_adapters=1)
    failure = Failure(at_s=5.0, replica_id=ReplicaId("r0"), down_s=0.5)
    options: dict[str, Any] = {
        "failures": (failure,),
        "detection_s": 1.0,
        "origin": LinkSpeed(bytes_per_s=8e6),
    }
    result = run_checked(scenario_of(trace, replicas_of(1), **options))
    # Detected at 6 s and up at once; 8 MB at 8 MB/s are there at 7 s, and the table a millisecond later.
    assert (result.outcome == OK).all()
    assert result.cold_misses == 2
    assert (result.first_ps[1:] > 7.001 * PS_PER_S).all()
    assert (result.first_ps[1:] < 7.1 * PS_PER_S).all()
    impatient = run_checked(scenario_of(trace, replicas_of(1), holder_wait_s=0.75, **options))
    assert impatient.outcome.tolist() == [OK, FAILED, FAILED]
    assert impatient.end_ps[1:].tolist() == [6_250_000_000_000, 6_750_000_000_000]
    assert "adapter 'a00'" in impatient.statuses[1]


def test_a_replica_that_dies_too_often_stays_away() -> None:
    failures = tuple(Failure(at_s=float(at), replica_id=ReplicaId("r0"), down_s=0.1) for at in (2, 4, 6))
    scenario = scenario_of(
        poisson_trace(300, 20.0), replicas_of(2), failures=failures, detection_s=0.1, max_restarts=2
    )
    result = run_checked(scenario)
    assert result.log_replica == (0, 0, 0, 1)
    assert (result.outcome == OK).all()
    assert (result.replica[result.arrival_ps > 6 * PS_PER_S] == 1).all()


def test_full_replicas_refuse_and_a_request_that_fits_nowhere_fails_with_a_line() -> None:
    trace = trace_of_columns(np.arange(200) / 100, [9000] + [100] * 199, 50, -1)
    limits = ReplicaLimits(kv_blocks=500, max_num_seqs=2)
    result = run_checked(scenario_of(trace, replicas_of(2, limits=limits), max_waiting=3))
    assert {OK, REFUSED, FAILED} == set(result.outcome.tolist())
    refused = result.outcome == REFUSED
    assert (result.end_ps[refused] == result.arrival_ps[refused]).all()
    assert list(result.statuses) == [0]
    assert "9000 prompt and 50 output tokens" in result.statuses[0]


# -- adapters ----------------------------------------------------------------------------------


def test_from_a_cold_start_everything_is_loaded_once_over_the_one_link() -> None:
    trace = trace_of_columns(np.zeros(5), 50, 20, np.arange(5), num_adapters=5)
    link = LinkSpeed(bytes_per_s=BYTES_PER_RANK * 248.0, latency_s=0.25)
    result = run_checked(scenario_of(trace, replicas_of(2), warm=False, origin=link))
    assert (result.outcome == OK).all()
    assert result.cold_misses == 5
    assert result.bytes_moved == 2 * BYTES_PER_RANK * sum(RANKS)
    assert result.epochs[-1].loads == 10
    # Ten transfers share the link: the smallest are there when each has got 8 MB of it.
    first_s = (result.first_ps - result.arrival_ps) / PS_PER_S
    assert first_s[0] == pytest.approx(10 * 8 / 248 + 0.25, abs=0.05)
    assert first_s[4] == pytest.approx(2.0 + 0.25, abs=0.05)


def test_on_demand_a_copy_is_fetched_for_the_first_request_and_evicted_for_another() -> None:
    trace = trace_of_columns([0.0, 1.0, 2.0, 3.0], 50, 2, [0, 0, 1, 0], num_adapters=2)
    limits = ReplicaLimits(kv_blocks=1000, pool_adapters=1)
    scenario = scenario_of(trace, replicas_of(1, limits=limits), on_demand=True, warm=False, origin=SLOW_LINK)
    result = run_checked(scenario)
    first_ms = (result.first_ps - result.arrival_ps) / 1e9
    fetch_ms = [10 + BYTES_PER_RANK * rank / SLOW_LINK.bytes_per_s * 1000 for rank in (8, 16)]
    plain_ms = first_ms[1]
    assert first_ms.tolist() == pytest.approx(
        [plain_ms + fetch_ms[0], plain_ms, plain_ms + fetch_ms[1], plain_ms + fetch_ms[0]], abs=0.05
    )
    assert result.cold_misses == 3
    assert result.bytes_moved == BYTES_PER_RANK * (8 + 16 + 8)


def test_on_demand_a_holder_is_a_nearer_source_than_the_origin() -> None:
    trace = trace_of_columns([0.0, 5.0], 50, 300, [0, 0], num_adapters=1)
    scenario = scenario_of(
        trace,
        replicas_of(2),
        on_demand=True,
        warm=False,
        routing="round-robin",
        origin=LinkSpeed(bytes_per_s=8e6),
        peer=LinkSpeed(bytes_per_s=80e6),
    )
    result = run_checked(scenario)
    first_s = (result.first_ps - result.arrival_ps) / PS_PER_S
    assert first_s.tolist() == pytest.approx([1.0, 0.1], abs=0.03)


# -- routing -----------------------------------------------------------------------------------


def test_reports_of_others_are_seen_late_and_own_requests_at_once() -> None:
    """Two routers; the second one sees where the first sent its request only when a report tells."""
    trace = trace_of_columns([0.0, 0.004, 0.5, 1.0, 1.004, 1.5], 10, 1000, -1)
    result = run_checked(scenario_of(trace, replicas_of(2), num_routers=2, report_delay_s=0.3, seed=1))
    assert result.router.tolist() == [0, 1, 0, 1, 0, 1]
    counts = np.bincount(result.replica, minlength=2)
    assert counts.tolist() == [3, 3]


def test_weighted_share_sends_in_proportion_whatever_the_load() -> None:
    result = run_checked(
        scenario_of(poisson_trace(3000, 20.0), replicas_of(4), routing="weighted-share", **NO_DELAYS)
    )
    assert np.bincount(result.replica) / 3000 == pytest.approx(np.full(4, 0.25), abs=0.03)


def test_the_demand_of_an_epoch_is_what_came_in_its_window() -> None:
    trace = trace_of_columns(
        [0.0, 4.0, 6.0, 9.0, 30.0], [10, 20, 30, 40, 1], 5, [0, 0, 1, -1, 0], num_adapters=2
    )
    simulation = Simulation(scenario_of(trace, replicas_of(1), window_s=8.0, epoch_s=10.0))
    first, second = (version.version_id for version in simulation.scenario.adapters)
    assert simulation.epochs.demand(10 * PS_PER_S) == pytest.approx({first: 25 / 8, second: 35 / 8})
    assert simulation.epochs.demand(4 * PS_PER_S) == pytest.approx({first: 15 / 4})
    result = simulation.run()
    assert [epoch.time_ps // PS_PER_S for epoch in result.epochs] == [10, 20, 30, 30]

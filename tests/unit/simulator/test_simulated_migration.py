"""Simulated replicas whose requests move with their adapters when one is overloaded between epochs."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from loraserve.simulator.run import Simulation
from loraserve.simulator.scenario import Failure, Scenario
from placement.cluster.invariants import check_cluster
from placement.types import ReplicaId
from tests.support.simulated import digest, replicas_of, scenario_of, trace_of_columns


def _scenario(*, policy: str = "slora-random", **options: Any) -> Scenario:
    """Two replicas, each with some of the adapters; nearly all requests are for one of them."""
    rng = np.random.default_rng(2)
    num = 1500
    arrival_s = np.sort(rng.uniform(0, 60, num))
    adapter = np.where(rng.random(num) < 0.9, 0, rng.integers(0, 4, num))
    trace = trace_of_columns(arrival_s, 200, 60, adapter, num_adapters=4)
    return scenario_of(
        trace, replicas_of(2), policy=policy, routing="weighted-share", epoch_s=1000.0, **options
    )


def _late_mean_s(simulation: Simulation) -> float:
    result = simulation.run()
    check_cluster(simulation.shell.state)
    assert (result.outcome == 0).all()
    return float((result.end_ps - result.arrival_ps).mean() / 1e12)


def test_what_waits_at_an_overloaded_replica_moves_with_its_adapter() -> None:
    alone = _late_mean_s(Simulation(_scenario()))
    simulation = Simulation(_scenario(migration="dlora", migration_period_s=5.0))
    moved = _late_mean_s(simulation)
    assert simulation.migrations.num_moved > 10
    assert moved < 0.7 * alone


def test_a_run_with_moves_is_the_same_again_and_calm_replicas_move_nothing() -> None:
    scenario = _scenario(migration="dlora", migration_period_s=5.0)
    assert digest(Simulation(scenario).run()) == digest(Simulation(scenario).run())
    calm = Simulation(_scenario(policy="least-loaded", migration="dlora"))
    calm.run()
    assert calm.migrations.num_moved == 0


def test_moves_and_deaths_lose_no_request() -> None:
    deaths = tuple(
        Failure(at_s=at_s, replica_id=ReplicaId(f"r{place}"), down_s=2.0)
        for at_s, place in ((10.0005, 0), (20.01, 1), (45.0, 0))
    )
    scenario = _scenario(migration="dlora", migration_period_s=5.0, failures=deaths)
    simulation = Simulation(replace(scenario, num_routers=2, holder_wait_s=60.0))
    _late_mean_s(simulation)
    assert simulation.migrations.num_moved > 0


@pytest.mark.parametrize("migration", ["off", "dlora"])
def test_a_run_ends_with_its_last_request_and_a_request_that_is_lost_does_not_keep_it_going(
    migration: str,
) -> None:
    scenario = replace(_scenario(migration=migration, migration_period_s=5.0), epoch_s=7.0)
    result = Simulation(scenario).run()
    end_ps = int(result.end_ps.max())
    assert result.epochs[-1].time_ps == end_ps
    assert len(result.epochs) == 1 + (end_ps - 1) // 7_000_000_000_000
    broken = Simulation(scenario)
    broken.ledger.num_ended = -1
    with pytest.raises(AssertionError, match="a request never ended"):
        broken.run()

"""Runs that are given up: never one that would have held, and an overloaded one early."""

import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.engines.replica_model.sequence import ReplicaLimits
from loraserve.simulator.figures import Judging, metrics_of
from loraserve.simulator.give_up import GaveUpError, GiveUp
from loraserve.simulator.ledger import OK
from loraserve.simulator.links import LinkSpeed
from loraserve.simulator.result import SimulationResult
from loraserve.simulator.run import simulate
from loraserve.simulator.scenario import Failure, Scenario
from placement.types import ReplicaId
from tests.support.simulated import digest, poisson_trace, replicas_of, run_checked, scenario_of

LINK = LinkSpeed(bytes_per_s=200e6, latency_s=0.01)


def ttft_p95_ms(result: SimulationResult, warmup_s: float) -> float | None:
    """The figure that a run is judged by."""
    return metrics_of(result, Judging(warmup_s=warmup_s)).summary.overall.ttft_ms.p95


def run_or_end(scenario: Scenario, give_up: GiveUp) -> SimulationResult | GaveUpError:
    """The result, or the early end."""
    try:
        return simulate(scenario, give_up=give_up)
    except GaveUpError as error:
        return error


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Light to overloaded, with replicas that die, refuse, fetch on demand or move requests."""
    num_replicas = draw(st.integers(1, 3))
    dying = st.builds(
        Failure,
        at_s=st.floats(0, 8),
        replica_id=st.integers(0, num_replicas - 1).map(lambda index: ReplicaId(f"r{index}")),
        down_s=st.floats(0, 5),
    )
    limits = ReplicaLimits(
        kv_blocks=draw(st.sampled_from([130, 1000])),
        max_num_seqs=draw(st.sampled_from([2, 16])),
        adapter_slots=draw(st.sampled_from([1, 8])),
    )
    on_demand = draw(st.booleans())
    return scenario_of(
        poisson_trace(
            draw(st.integers(1, 150)),
            draw(st.sampled_from([2.0, 20.0, 100.0])),
            num_adapters=draw(st.integers(0, 5)),
            seed=draw(st.integers(0, 99)),
        ),
        replicas_of(num_replicas, limits=limits),
        routing=draw(st.sampled_from(["least-outstanding", "marginal-cost", "toppings"])),
        num_routers=draw(st.sampled_from([1, 3])),
        network_delay_s=draw(st.sampled_from([0.0, 0.03])),
        report_delay_s=0.03,
        max_waiting=draw(st.sampled_from([None, 3])),
        holder_wait_s=draw(st.sampled_from([0.0, 2.0])),
        epoch_s=1.5,
        origin=LINK,
        on_demand=on_demand,
        migration="off" if on_demand else draw(st.sampled_from(["off", "dlora"])),
        failures=tuple(draw(st.lists(dying, max_size=2))),
    )


@settings(max_examples=60, deadline=None)
@given(scenarios(), st.sampled_from([0.0, 0.5, 2.0]), st.sampled_from([0.2, 0.7, 0.999, 1.0, 1.001, 2.0]))
def test_only_a_run_that_misses_its_target_is_given_up_and_any_other_is_the_same(
    scenario: Scenario, warmup_s: float, factor: float
) -> None:
    whole = run_checked(scenario)
    p95_ms = ttft_p95_ms(whole, warmup_s)
    # Targets at and about what the run has, where a count that is one too high would show.
    target_ms = factor * (p95_ms if p95_ms is not None and p95_ms < 1e6 else 500.0)
    found = run_or_end(scenario, GiveUp(ttft_ms=target_ms, warmup_s=warmup_s))
    if isinstance(found, SimulationResult):
        assert digest(found) == digest(whole)
        return
    assert p95_ms is not None
    assert p95_ms > target_ms
    late = (whole.outcome != OK) | ((whole.first_ps - whole.arrival_ps) / 1e9 > target_ms)
    counted = whole.arrival_ps >= round(warmup_s * 1e12)
    assert found.num_late <= int((counted & late).sum())
    assert found.num_judged == int(counted.sum())


def overloaded(rate: float) -> Scenario:
    """Two replicas of 16 sequences, which do about 40 requests a second of these."""
    replicas = replicas_of(2, limits=ReplicaLimits(kv_blocks=1000, max_num_seqs=16))
    return scenario_of(poisson_trace(2000, rate), replicas, max_waiting=None)


def test_an_overloaded_run_ends_when_as_many_are_late_as_the_percentile_allows() -> None:
    with pytest.raises(GaveUpError) as given_up:
        simulate(overloaded(200.0), give_up=GiveUp(ttft_ms=1000, warmup_s=1.0))
    error = given_up.value
    assert error.num_requests == 2000
    assert error.num_judged > 1700
    assert error.num_late >= 0.05 * error.num_judged
    # It takes 200 requests and the target's own second before any that counts can be late.
    assert 400 < error.num_come < 700
    assert str(error).startswith(f"given up after {error.num_come} of 2000 requests: {error.num_late} of the")


def test_a_stream_that_began_in_time_is_not_late_though_it_goes_on() -> None:
    """Of few long answers nobody has heard the end when the target has passed."""
    trace = replace(poisson_trace(60, 30.0), output_tokens=poisson_trace(60, 30.0).output_tokens * 0 + 1500)
    scenario = scenario_of(trace, replicas_of(4))
    result = simulate(scenario, give_up=GiveUp(ttft_ms=500))
    assert (result.end_ps - result.arrival_ps).min() > 10e12
    assert digest(result) == digest(simulate(scenario))


def test_with_nobody_to_judge_nothing_is_given_up() -> None:
    assert len(simulate(overloaded(500.0), give_up=GiveUp(ttft_ms=1, warmup_s=1e6))) == 2000


def test_an_end_tells_its_counts_across_processes_and_a_target_is_above_zero() -> None:
    error = pickle.loads(pickle.dumps(GaveUpError(60, 900, 400, 1000)))
    assert (error.num_late, error.num_judged, error.num_come, error.num_requests) == (60, 900, 400, 1000)
    with pytest.raises(ValueError, match="ttft_ms: 0"):
        GiveUp(ttft_ms=0)

"""What scripts/bench/policies runs, and the ratios that it makes of the runs."""

import math
from dataclasses import replace

import policies_cases as cases
import policies_ratios as ratios
import policies_runs as runs
import pytest
from policies_cases import Case, Outcome, Setting

from loraserve.errors import BadInputError

SHORT = Setting(duration_s=40.0, warmup_s=10.0, epoch_s=10.0)
EVERYWHERE = cases.available([cases.EVERYWHERE])[0]


def case(rate_per_s: float, seed: int = 0, workload: str = "skew") -> Case:
    return Case(
        contender=EVERYWHERE,
        workload=cases.WORKLOADS[workload],
        rate_per_s=rate_per_s,
        seed=seed,
        setting=SHORT,
    )


def outcome(name: str, seed: int, ttft_p95_ms: float, rate_per_s: float = 10.0) -> Outcome:
    return Outcome(
        fleet="padded_batch",
        workload="skew",
        contender=name,
        policy=name,
        routing="",
        rate_per_s=rate_per_s,
        seed=seed,
        requests=100,
        failed=0,
        ttft_p50_ms=ttft_p95_ms / 2,
        ttft_p95_ms=ttft_p95_ms,
        ttft_p99_ms=ttft_p95_ms * 2,
        tbt_p95_ms=50.0,
        attainment=1.0,
        in_slo=ttft_p95_ms <= 2000.0,
        utilisation=0.5,
        bytes_moved={"optimal": 100, "loraserve": 400}.get(name, 0),
        resident_bytes={"optimal": 30.0, "least-loaded": 40.0}.get(name, 10.0),
        cold_misses=0,
    )


def test_a_run_leaves_the_warm_up_out_and_counts_what_replicas_hold() -> None:
    done = cases.run_case(case(8.0))
    assert done.in_slo
    assert done.failed == 0
    assert 0 < done.requests < 8 * 40
    # 25 adapters, five of each rank, on each of four replicas.
    assert done.resident_bytes == 4 * 5 * (8 + 16 + 32 + 64 + 128) * 2 * 2**20
    assert done.bytes_moved == 0


def test_all_contenders_get_the_same_requests() -> None:
    first, other = cases.scenario(case(8.0)), cases.scenario(case(8.0))
    assert first.trace is other.trace
    assert cases.scenario(case(8.0, seed=1)).trace is not first.trace


def test_the_highest_rate_is_bracketed_and_every_probe_says_why() -> None:
    fluid = cases.fluid_rate_per_s(SHORT, cases.WORKLOADS["uniform"])
    found = runs.search(case(fluid, workload="uniform"))
    assert 0 < found.held_per_s < found.failed_per_s <= found.held_per_s * (1 + runs.TOLERANCE)
    verdicts = {probe.rate_per_s: probe.in_slo for probe in found.probes}
    assert verdicts[found.held_per_s]
    assert not verdicts[found.failed_per_s]


def test_processes_give_what_one_process_gives() -> None:
    grid = [case(8.0), case(12.0)]
    with runs.runner(1, lambda _line: None) as alone, runs.runner(2, lambda _line: None) as side_by_side:
        assert alone.all("", cases.run_case, grid) == side_by_side.all("", cases.run_case, grid)


def test_what_nobody_registered_is_refused_with_what_there_is() -> None:
    with pytest.raises(BadInputError, match=r"'fastest'; expected of .*least-loaded"):
        cases.available(["fastest"])
    assert cases.available(["slora-random/round-robin"])[0].routing == "round-robin"


def test_paired_seeds_tell_a_small_difference_from_noise() -> None:
    # The same seeds differ much from one another, and little between the two.
    assert ratios.paired([102, 206, 404], [100, 200, 400]).low > 1.0
    noisy = ratios.paired([120, 170, 460], [100, 200, 400])
    assert noisy.low < 1.0 < noisy.high
    assert ratios.paired([5.0], [4.0]).low == 0.0
    assert ratios.paired([math.inf, 2.0, 2.0], [math.inf, 2.0, 2.0]).ratio == 1.0


def test_optimal_is_held_against_the_best_other_at_each_rate() -> None:
    levels = {"optimal": 100.0, "loraserve": 300.0, "least-loaded": 90.0}
    made = [outcome(name, seed, level + seed) for name, level in levels.items() for seed in range(3)]
    made += [replace(one, rate_per_s=20.0, ttft_p95_ms=50.0) for one in made if one.contender == "optimal"]
    made += [replace(one, rate_per_s=20.0) for one in made[3:9]]
    low, high = ratios.against_best(made)
    assert (low["rate_per_s"], low["best_other"], low["worse"]) == (10.0, "least-loaded", True)
    assert (high["rate_per_s"], high["worse"]) == (20.0, False)
    assert ratios.bytes_ratios(made) == {"moved_over_loraserve": 0.25, "resident_over_everywhere": 0.75}
    assert ratios.ttft_ratio(made[:9])["ratio"] == pytest.approx(3.0, rel=0.02)


def test_plans_from_scratch_are_no_rival_but_what_keeping_is_held_against() -> None:
    levels = {"optimal": 105.0, cases.FROM_SCRATCH: 100.0, "least-loaded": 120.0}
    made = [outcome(name, seed, level) for name, level in levels.items() for seed in range(3)]
    made = [replace(one, bytes_moved=one.bytes_moved or 1000) for one in made]
    (row,) = ratios.over_scratch(made)
    assert row["ratio"] == pytest.approx(1.05)
    assert row["moved_over_scratch"] == pytest.approx(0.1)
    assert ratios.against_best(made)[0]["best_other"] == "least-loaded"
    assert ratios.over_scratch(made[:3]) == []


def test_rates_are_compared_seed_by_seed() -> None:
    over = ratios.rate_ratios({"optimal": {0: 12.0, 1: 24.0}, "loraserve": {0: 10.0, 1: 20.0}})
    assert over["loraserve"]["ratio"] == pytest.approx(1.2)
    assert over["loraserve"]["low"] == pytest.approx(1.2)

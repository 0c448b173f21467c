"""What an experiment says of its cluster reaches every run, and a run's figures leave the warm-up out."""

from pathlib import Path
from typing import Any

import pytest

from loraserve.experiments.jobs import Job, job_key, jobs_of_experiment
from loraserve.experiments.measure import measure
from loraserve.experiments.scenarios import fluid_per_s, scenario_at
from loraserve.experiments.spec import ClusterSection, parse_experiment
from loraserve.simulator.ledger import OK
from loraserve.simulator.run import simulate
from placement.latency import PS_PER_S
from tests.support.experiments import small_tree

CLUSTER = {"duration_s": 12.0, "warmup_s": 2.0, "epoch_s": 3.0}
OTHERS = {
    "epoch_s": 4.0,
    "window_s": 2.0,
    "routers": 3,
    "speed": 2.0,
    "pool_mib": 500.0,
    "on_demand": True,
    "from_origin_only": True,
    "max_waiting": 9,
    "report_interval_s": 0.3,
    "max_lora_ranks": "planned",
    "restart_s": 5.0,
    "migration": "dlora",
    "fail": ["replica-1@3s for 2s"],
}


def job_of(cluster: dict[str, Any] | None = None, **changes: Any) -> Job:
    tree = small_tree(**{"find": {}, "cluster": CLUSTER | (cluster or {}), **changes})
    return jobs_of_experiment(parse_experiment(tree), Path())[0]


def shape(job: Job) -> str:
    scenario = scenario_at(job, 4.0, 2)
    shown = {name: getattr(scenario, name) for name in scenario.__dataclass_fields__ if name != "trace"}
    return repr(shown)


def test_all_of_the_cluster_is_tried_here() -> None:
    assert set(OTHERS) | {"duration_s", "warmup_s"} == set(ClusterSection.__struct_fields__)


@pytest.mark.parametrize("key", OTHERS)
def test_whatever_is_said_of_the_cluster_changes_its_runs_and_its_key(key: str) -> None:
    plain, other = job_of(), job_of({key: OTHERS[key]})
    assert shape(other) != shape(plain)
    assert job_key(other) != job_key(plain)


@pytest.mark.parametrize(
    "change",
    [
        {"find": {"highest_rate": True}},
        {"profiles": ["a100-llama2-7b-mbgmv"]},
        {"map_rate": "0.6x"},
        {"slo": {"tbt_ms": 100.0}},
        {"slo": {"token_ms": 100.0}},
    ],
)
def test_a_key_changes_with_what_is_searched_and_judged(change: dict[str, Any]) -> None:
    assert job_key(job_of(**change)) != job_key(job_of())


def test_where_plans_choose_ranks_nobody_pays_for_the_highest_from_the_start() -> None:
    fixed, planned = (
        fluid_per_s(job_of({"max_lora_ranks": said}, kernels=["padded_config"]), 2)
        for said in ("fixed", "planned")
    )
    assert planned > 1.05 * fixed


def test_requests_that_fail_keep_to_no_target_per_token() -> None:
    (point,) = measure(job_of({"max_waiting": 1}, rates=["3x"], slo={"token_ms": 1e6})).points
    assert 0 < point.failed < point.requests
    assert point.token_attainment == pytest.approx(1 - point.failed / point.requests)


def test_what_moved_in_the_warm_up_is_left_out() -> None:
    job = job_of({"warmup_s": 7.0, "fail": ["replica-1@1s for 1s"]}, rates=[4.0])
    (point,) = measure(job).points
    epochs = simulate(scenario_at(job, 4.0, 2)).epochs
    early, late = (
        sum(one.bytes_moved for one in epochs if (one.time_ps > 7 * PS_PER_S) == is_late)
        for is_late in (False, True)
    )
    assert early > 0
    assert point.bytes_moved == late


def test_who_is_late_in_the_warm_up_ends_no_search() -> None:
    cluster = {"duration_s": 30.0, "warmup_s": 15.0, "fail": ["replica-0@0.2s for 5s"]}
    find = {"fewest_replicas_at": [3.0], "most_replicas": 1}
    job = job_of(cluster, find=find, rates=[], slo={"ttft_ms": 2000.0})
    result = simulate(scenario_at(job, 3.0, 1))
    late = (result.outcome != OK) | (result.first_ps - result.arrival_ps > 2 * PS_PER_S)
    assert late.mean() > 0.05
    (fewest,) = measure(job).fewest
    assert [probe.held for probe in fewest.probes] == [True]


def test_a_search_begins_between_the_rates_that_were_run_anyway() -> None:
    job = job_of(rates=["0.3x", "2.5x", "3x"], find={"highest_rate": True, "tolerance": 1.0})
    found = measure(job)
    assert [point.in_slo for point in found.points] == [True, False, False]
    assert found.highest is not None
    first = found.highest.probes[0].rate_per_s
    assert first == pytest.approx((0.3 * 2.5) ** 0.5 * found.fluid_per_s)

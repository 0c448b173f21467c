"""What is told of a simulation is what its records say, and its pictures show where the time went."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from loraserve.profiling.files import find_simulatable
from loraserve.simulator.figures import Judging, figures_of, metrics_of, records_of
from loraserve.simulator.from_profile import ClusterOptions, parse_failures, scenario_of
from loraserve.simulator.run import simulate
from loraserve.simulator.workload import SimulatedWorkload
from tests.support.made_results import result_of
from tests.support.made_runs import MadeRun, MadeStretch, records_of_made, steps_of
from traces.columns import TraceAdapter
from traces.metrics import Slo, summarise
from traces.records import Outcome
from traces.summary_json import summary_to_json

MS = 1_000_000_000


def made() -> MadeRun:
    """Two replicas: 10 steps of 10 ms from 0, then 100 ms of rest and 5 of 20 ms; 4 steps of 50 ms."""
    run = MadeRun(
        replicas=[
            steps_of([(10, 10 * MS, 0, 0), (5, 20 * MS, 0, 100 * MS)]),
            steps_of([(4, 50 * MS, MS, 0)]),
        ],
        adapters=(TraceAdapter(name="a", rank=8), TraceAdapter(name="b", rank=16)),
    )

    def add(*stretches: Sequence[int], adapter: int, outcome: Outcome = Outcome.OK) -> None:
        run.add(
            [MadeStretch(replica=replica, first=first, last=last) for replica, first, last in stretches],
            outcome=outcome,
            adapter=adapter,
            waited_ps=5 * MS,
        )

    add((0, 1, 9), adapter=0)
    add((0, 4, 5), (1, 2, 3), (0, 10, 12), adapter=1)
    add((1, 0, 1), adapter=-1, outcome=Outcome.FAILED)
    add(adapter=1, outcome=Outcome.REFUSED)
    return run


def test_records_have_every_token_where_it_was_drawn() -> None:
    expected = records_of_made(made())
    for one, other in zip(records_of(result_of(made())), expected, strict=True):
        assert one.message_times_s == pytest.approx(other.message_times_s)
        assert (one.outcome, one.adapter, one.rank) == (other.outcome, other.adapter, other.rank)
        assert one.status == ("broke off at 2" if one.index == 2 else "")


def test_figures_are_those_of_the_records() -> None:
    result, slo = result_of(made()), Slo(ttft_ms=100, tbt_ms=60)
    summary = metrics_of(result, Judging(slo=slo)).summary
    expected = summarise(records_of(result), slo=slo, live=False)
    assert summary.overall.attainment == expected.overall.attainment == 0.25
    assert summary.overall.itl_ms.count == expected.overall.itl_ms.count
    assert summary.overall.itl_ms.mean == summary.per_rank["base"].itl_ms.mean == float("inf")
    assert summary.per_rank["16"].itl_ms.p95 == pytest.approx(expected.per_rank["16"].itl_ms.p95)


def test_utilisation_is_the_share_of_the_window_in_steps() -> None:
    figures = figures_of(result_of(made()), Judging())
    # From 5 ms, the first arrival, to 260 ms, the last token: 95 and 60 ms, and 201 ms of 206.
    window_ms = 260 - 5
    assert figures.utilisation == pytest.approx((95 + 60 + 206 - 5) / (2 * window_ms))


def test_pictures_over_time_account_for_every_step_and_request() -> None:
    result = result_of(made())
    pictures = figures_of(result, Judging()).pictures
    width_s = np.diff(pictures.edges_s)
    assert (pictures.busy * width_s).sum(axis=1) == pytest.approx([0.16, 0.206])
    assert (pictures.due * width_s).sum() == pytest.approx(4)
    assert (pictures.completed * width_s).sum() == pytest.approx(2)
    # The first run of each log has rank 8, the second 16; between them the replica rested.
    assert np.nanmin(pictures.rank[0]) == pytest.approx(8)
    assert np.nanmax(pictures.rank[0]) == pytest.approx(16)
    assert np.isnan(pictures.rank[0]).any()
    assert pictures.busy.max() <= 1 + 1e-9


def test_curves_end_at_the_share_that_was_answered() -> None:
    pictures = figures_of(result_of(made()), Judging()).pictures
    assert pictures.ttft["8"].share[-1] == 1
    assert pictures.ttft["16"].share[-1] == 0.5
    assert pictures.ttft["base"].share.size == 0
    assert pictures.tbt["16"].share[-1] == 1
    assert pictures.tbt["base"].share[-1] == 0.5
    assert np.all(np.diff(pictures.tbt["16"].share) >= 0)


def test_nothing_is_left_of_a_run_that_is_all_warm_up() -> None:
    figures = figures_of(result_of(made()), Judging(warmup_s=10))
    assert (figures.summary.overall.requests, figures.summary.warmup_requests) == (0, 4)
    assert figures.utilisation == 0


def test_a_simulation_with_a_failure_is_judged_as_its_records_are() -> None:
    trace = SimulatedWorkload(source="demo", adapters=6, requests=400, rate_per_s=14.0, base_share=0.1).draw(
        1
    )
    cluster = ClusterOptions(
        num_replicas=2,
        num_routers=2,
        epoch_s=10.0,
        failures=parse_failures(["replica-0@4s for 3s"]),
    )
    result = simulate(scenario_of(find_simulatable("a100-llama2-7b-bgmv"), trace, cluster))
    assert (result.attempts > 1).any()
    judging = Judging(slo=Slo(ttft_ms=150.013, tbt_ms=40.013), warmup_s=2.0, per_adapter=True)
    summary = metrics_of(result, judging).summary
    expected = summarise(records_of(result, warmup_s=2.0), slo=judging.slo, live=False)
    assert list(summary.per_rank) == list(expected.per_rank)
    assert list(summary.per_adapter) == list(expected.per_adapter)
    tree, other = flat(summary_to_json(summary)), flat(summary_to_json(expected))
    assert tree.keys() == other.keys()
    different = {key: (tree[key], other[key]) for key in tree if tree[key] != pytest.approx(other[key])}
    assert different == {}


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: value for name in tree for key, value in flat(tree[name], f"{path}/{name}").items()}

"""At which rate a job's workload comes, and what of it counts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraserve.errors import BadInputError
from loraserve.experiments.drawn import own_rate
from loraserve.experiments.jobs import Job, jobs_of_experiment
from loraserve.experiments.measure import measure
from loraserve.experiments.scenarios import scenario_at
from loraserve.experiments.spec import OWN, parse_experiment
from loraserve.simulator.run import simulate
from placement.latency import PS_PER_S
from tests.support.experiments import small_tree

TRACE = {"name": "u", "source": "preset:loraserve-uniform", "adapters": 5}


def job_of(trace: dict[str, Any] | None = None, **changes: Any) -> Job:
    tree = small_tree(**{"find": {}, "traces": [TRACE | (trace or {})], **changes})
    return jobs_of_experiment(parse_experiment(tree), Path())[0]


def test_a_trace_as_it_is_is_not_drawn_anew_at_its_rate() -> None:
    job = job_of(rates=[OWN])
    alone = job.workload.draw(job.seed)
    assert np.array_equal(scenario_at(job, None, 2).trace.arrival_s, alone.arrival_s)
    (point,) = measure(job).points
    result = simulate(scenario_at(job, None, 2))
    counted = result.arrival_ps >= 2 * PS_PER_S
    ttft_ms = (result.first_ps - result.arrival_ps)[counted] / 1e9
    assert point.ttft_p95_ms == pytest.approx(np.percentile(ttft_ms, 95))
    assert point.rate_per_s == own_rate(job.workload, job.seed)


@pytest.mark.parametrize("asked", [OWN, 6.0])
def test_a_search_at_a_rate_tries_the_workload_at_that_rate(asked: Any) -> None:
    find = {"fewest_replicas_at": [asked], "most_replicas": 2}
    job = job_of(find=find, rates=[], slo={"ttft_ms": 1e9, "tbt_ms": 1e9})
    (fewest,) = measure(job).fewest
    rate = None if asked == OWN else asked
    probe = fewest.probes[-1]
    result = simulate(scenario_at(job, rate, probe.replicas))
    counted = result.arrival_ps >= 2 * PS_PER_S
    ttft_ms = (result.first_ps - result.arrival_ps)[counted] / 1e9
    assert probe.ttft_p95_ms == pytest.approx(np.percentile(ttft_ms, 95))


def test_a_preset_can_be_sped_up() -> None:
    (plain,), (faster,) = (measure(job_of(trace, rates=[OWN])).points for trace in ({}, {"speedup": 2.0}))
    assert faster.rate_per_s == pytest.approx(2 * plain.rate_per_s)
    assert measure(job_of({"speedup": 2.0})).fluid_per_s == measure(job_of()).fluid_per_s


def test_a_warm_up_that_leaves_nothing_is_refused() -> None:
    cluster = {"duration_s": 0.0, "warmup_s": 13.0}
    with pytest.raises(BadInputError, match=r"cluster\.warmup_s: 13 leaves nothing; .* comes at 6/s"):
        measure(job_of({"duration_s": 12.0}, cluster=cluster, rates=[6.0]))

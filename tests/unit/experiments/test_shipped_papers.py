"""The experiments that ship: each can be made into jobs, and a small piece of each runs."""

from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from loraserve.experiments.jobs import Job, jobs_of_experiment
from loraserve.experiments.measure import measure
from loraserve.experiments.report.aggregate import FIGURES
from loraserve.experiments.spec import (
    ClaimSection,
    Experiment,
    experiment_tree,
    parse_experiment,
    read_experiment,
    shipped_experiments,
)
from traces.synthesis import is_preset

TRACES = Path(__file__).parents[4] / "shared" / "traces"
REQUESTS = 40


@pytest.fixture(params=sorted(shipped_experiments()))
def shipped(request: pytest.FixtureRequest) -> Experiment:
    experiment = read_experiment(shipped_experiments()[request.param])
    for trace in experiment.traces:
        if not is_preset(trace.source) and not (TRACES / trace.source).is_file():
            pytest.skip(f"the real trace {trace.source} is not on this machine (looked in ../shared/traces)")
    return experiment


def test_every_job_can_be_made(shipped: Experiment) -> None:
    jobs = jobs_of_experiment(shipped, TRACES)
    assert {job.trace for job in jobs} == {trace.name for trace in shipped.traces}
    assert {job.contender.name for job in jobs} == set(shipped.policies)
    assert len({job.label + job.profile.name for job in jobs}) == len(jobs)


def test_every_workload_can_be_drawn(shipped: Experiment) -> None:
    for job in _small_jobs(shipped):
        columns = job.workload.draw(0)
        assert len(columns) == REQUESTS
        assert columns.adapters
        assert columns.prompt_tokens.min() > 0
        assert columns.output_tokens.min() > 0


def test_a_piece_of_it_runs_and_loses_no_request(shipped: Experiment) -> None:
    (point,) = measure(_small_jobs(shipped)[-1]).points
    assert (point.requests, point.failed) == (REQUESTS, 0)
    assert point.ttft_p95_ms is not None
    assert point.wait_per_token_ms is not None
    assert (point.token_attainment is None) == (shipped.slo.token_ms == 0)


def test_a_published_line_has_a_source_and_goes_forward(shipped: Experiment) -> None:
    for line in shipped.published:
        places = [place for place, _ in line.points]
        assert line.source
        assert places == sorted(set(places))
    assert all(claim.source for claim in shipped.claims if claim.paper is not None)


def test_the_report_knows_every_figure_that_a_claim_may_name() -> None:
    named = set(get_args(get_type_hints(ClaimSection)["figure"]))
    assert named - FIGURES.keys() == {"highest_rate", "fewest_replicas"}


def _small_jobs(experiment: Experiment) -> tuple[Job, ...]:
    """A job for each of its traces, of a few requests with the policy that it is about."""
    tree: dict[str, Any] = experiment_tree(experiment)
    for trace in tree["traces"]:
        is_repeated = trace["requests"] or trace["only_adapters"]
        trace["requests" if is_repeated else "limit"] = REQUESTS
    tree |= {
        "policies": tree["policies"][:1],
        "replicas": tree["replicas"][:1],
        "rates": [4.0],
        "seeds": [0],
        "kernels": tree["kernels"][:1],
        "profiles": tree["profiles"][:1],
        "find": {},
        "map_rate": None,
        "claims": [],
    }
    tree["cluster"] |= {"warmup_s": 0.0}
    return jobs_of_experiment(parse_experiment(tree), TRACES)

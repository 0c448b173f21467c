"""Figures from runs of steps are the figures of the same run written out token by token."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.made_runs import MadeRun, MadeStretch, records_of_made, steps_of
from traces.columns import BASE, TraceAdapter
from traces.metrics import GroupSummary, Slo, Summary, summarise
from traces.quantiles import Distribution
from traces.records import Outcome
from traces.runs.gap_quantiles import GapHistogram, select
from traces.runs.run_metrics import summarise_runs
from traces.runs.step_runs import Gaps, ReplicaSteps

ADAPTERS = (
    TraceAdapter(name="a", rank=8),
    TraceAdapter(name="b", rank=64),
    TraceAdapter(name="c", rank=8),
    TraceAdapter(name="d"),
)
RATES = ("request_throughput", "request_goodput", "output_throughput", "total_token_throughput")


def steps() -> st.SearchStrategy[ReplicaSteps]:
    run = st.tuples(
        st.integers(1, 6),
        st.integers(1, 5_000_000_000),
        st.just(0) | st.integers(0, 40) | st.integers(0, 2_000_000_000),
        st.just(0) | st.just(0) | st.integers(0, 9_000_000_000),
    )
    return st.lists(run, min_size=1, max_size=8).map(steps_of)


@st.composite
def made_runs(draw: st.DrawFn) -> MadeRun:
    replicas = draw(st.lists(steps(), min_size=1, max_size=3))
    made = MadeRun(replicas=replicas, adapters=ADAPTERS)
    for _ in range(draw(st.integers(0, 8))):
        stretches: list[MadeStretch] = []
        for _ in range(draw(st.integers(0, 3))):
            replica = draw(st.integers(0, len(replicas) - 1))
            first = draw(st.integers(0, replicas[replica].num_steps - 1))
            last = draw(st.integers(first, replicas[replica].num_steps - 1))
            stretch = MadeStretch(replica=replica, first=first, last=last)
            if not stretches or made.end_ps(replica, first) > made.end_ps(
                stretches[-1].replica, stretches[-1].last
            ):
                stretches.append(stretch)
        outcome = draw(st.sampled_from([Outcome.OK] * 4 + list(Outcome)))
        made.add(
            stretches,
            outcome=outcome,
            adapter=draw(st.integers(BASE, len(ADAPTERS) - 1)),
            waited_ps=draw(st.integers(0, 3_000_000_000)),
        )
    return made


def summaries(made: MadeRun, slo: Slo, warmup_s: float = 0.0) -> tuple[Summary, Summary]:
    columns = made.columns()
    got = summarise_runs(columns, made.steps(), slo=slo, warmup_s=warmup_s, per_adapter=True).summary
    return got, summarise(records_of_made(made, warmup_s), slo=slo, live=False)


def assert_same(got: Summary, expected: Summary) -> None:
    assert (got.warmup_requests, got.void, got.pacing) == (expected.warmup_requests, False, None)
    assert got.duration_s == pytest.approx(expected.duration_s, rel=1e-9, abs=1e-11)
    groups = [(got.overall, expected.overall)]
    for mine, other in ((got.per_rank, expected.per_rank), (got.per_adapter, expected.per_adapter)):
        assert list(mine) == list(other)
        groups += [(mine[name], other[name]) for name in mine]
    for one, same in groups:
        assert_same_group(counted(one, got.duration_s), counted(same, expected.duration_s))


def counted(group: GroupSummary, duration_s: float) -> GroupSummary:
    """The group with counts for rates: a window of a picosecond makes rates of nothing but rounding."""
    rates = {name: getattr(group, name) * duration_s for name in RATES}
    return replace(group, **rates)


def assert_same_group(got: GroupSummary, expected: GroupSummary) -> None:
    for field in fields(GroupSummary):
        mine, other = getattr(got, field.name), getattr(expected, field.name)
        assert mine == other or close(mine, other), (field.name, mine, other)


def close(mine: Any, other: Any) -> bool:
    if isinstance(mine, Distribution):
        return all(close(getattr(mine, f.name), getattr(other, f.name)) for f in fields(Distribution))
    if mine is None or other is None or isinstance(mine, dict):
        return bool(mine == other)
    # Records count in seconds from zero, so a picosecond is what they can tell apart.
    return bool(mine == pytest.approx(other, rel=1e-9, abs=1e-8))


# Limits between two whole picoseconds, where records and columns cannot round to different sides.
limits_ms = st.integers(1, 8_000_000_000).map(lambda ps: (ps + 0.513) / 1e9)


@given(made_runs(), limits_ms, limits_ms, st.sampled_from([0.0, 0.004]))
@settings(max_examples=300, deadline=None)
def test_figures_of_runs_are_those_of_their_records(
    made: MadeRun, ttft_ms: float, tbt_ms: float, warmup_s: float
) -> None:
    assert_same(*summaries(made, Slo(ttft_ms=ttft_ms, tbt_ms=tbt_ms), warmup_s))


row = st.tuples(
    st.integers(0, 50) | st.integers(0, 2**55),
    st.integers(0, 3) | st.integers(0, 2**40),
    st.integers(1, 30),
    st.integers(1, 4),
)


@given(st.lists(row, min_size=1, max_size=12), st.data(), st.integers(1, 40))
def test_a_place_among_weighed_gaps_is_that_of_the_sorted_sample(
    rows: list[tuple[int, int, int, int]], data: st.DataObject, max_spread: int
) -> None:
    sample = sorted(
        start + growth * place
        for start, growth, count, weight in rows
        for place in range(count)
        for _ in range(weight)
    )
    places = sorted(data.draw(st.lists(st.integers(0, len(sample) - 1), min_size=1, max_size=4)))
    start_ps, growth_ps, count, weight = np.array(rows, dtype=np.int64).T.copy()
    expected = [sample[place] for place in places]
    assert select(start_ps, growth_ps, count, weight, places, max_spread=max_spread) == expected
    gaps = Gaps(start_ps=start_ps, growth_ps=growth_ps, count=count)
    for across in (0, 10_000):
        weighed = GapHistogram([gaps], max_across=across).weigh([weight])
        assert weighed.count == len(sample)
        assert [weighed.at(places)[place] for place in places] == expected
        edges_ps, counts = weighed.curve()
        assert [sum(value <= edge for value in sample) for edge in edges_ps] == counts.tolist()


def test_a_run_of_nothing_has_no_figures() -> None:
    assert_same(*summaries(MadeRun(replicas=[], adapters=()), Slo()))
    assert_same(*summaries(MadeRun(replicas=[steps_of([(3, 1000, 0, 0)])], adapters=()), Slo()))

"""The workload of a simulation: how ranks go with popularity, and what is put where a trace says nothing."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.errors import BadInputError
from loraserve.simulator.workload import SimulatedWorkload
from traces.columns import TraceColumns

DEMO = SimulatedWorkload(source="demo")
OWN = replace(DEMO, ranks="8,16,32")
ASSIGNED = replace(DEMO, requests=400, adapters=12, ranks="8,16,32,64", assign="zipf", parameter=1.1)
NAMED = replace(DEMO, adapters=3, ranks="names:x-rank-8-0/y-rank-64-0/z-rank-32-0")
PRESET = SimulatedWorkload(source="preset:slora,requests=300,adapters=15", ranks="8,16,32")

workloads = st.sampled_from([OWN, ASSIGNED, NAMED, PRESET])
seeds = st.integers(0, 2**63 - 1)


def ranks_of(columns: TraceColumns) -> list[int]:
    ranks = [adapter.rank for adapter in columns.adapters if adapter.rank is not None]
    assert len(ranks) == len(columns.adapters)
    return ranks


def counts_of(columns: TraceColumns) -> list[int]:
    return [int((columns.adapter == place).sum()) for place in range(len(columns.adapters))]


def requests_of(columns: TraceColumns) -> Iterator[bytes]:
    for column in (columns.arrival_s, columns.prompt_tokens, columns.output_tokens, columns.adapter):
        yield column.tobytes()


@given(workload=st.sampled_from([OWN, ASSIGNED, NAMED]), seed=seeds, sign=st.sampled_from([1, -1]))
def test_ranks_rise_or_fall_with_the_number_of_requests(
    workload: SimulatedWorkload, seed: int, sign: int
) -> None:
    columns = replace(workload, correlation=float(sign)).draw(seed)
    signed = [sign * rank for rank in ranks_of(columns)]
    by_popularity = sorted(zip(counts_of(columns), signed, strict=True))
    for fewer, more in pairwise(by_popularity):
        assert fewer[0] == more[0] or fewer[1] <= more[1]


@given(workload=workloads, seed=seeds, correlation=st.floats(-1, 1))
def test_a_correlation_changes_whose_rank_is_whose_and_nothing_else(
    workload: SimulatedWorkload, seed: int, correlation: float
) -> None:
    plain, asked = workload.draw(seed), replace(workload, correlation=correlation).draw(seed)
    again = replace(workload, correlation=correlation).draw(seed)
    assert list(requests_of(asked)) == list(requests_of(plain))
    assert sorted(ranks_of(asked)) == sorted(ranks_of(plain))
    assert asked.adapters == again.adapters


@given(seed=seeds)
def test_the_middle_of_correlations_is_what_there_is_without_one(seed: int) -> None:
    for workload in (OWN, ASSIGNED, PRESET):
        assert replace(workload, correlation=0.0).draw(seed).adapters == workload.draw(seed).adapters
    assert [one.name for one in NAMED.draw(seed).adapters] == ["x-rank-8-0", "y-rank-64-0", "z-rank-32-0"]


def test_more_correlation_brings_ranks_and_popularity_closer() -> None:
    def mean(correlation: float) -> float:
        found = []
        for seed in range(60):
            columns = replace(ASSIGNED, correlation=correlation).draw(seed)
            order = np.argsort(np.argsort(counts_of(columns), kind="stable"))
            found.append(np.corrcoef(order, ranks_of(columns))[0, 1])
        return float(np.mean(found))

    means = [mean(correlation) for correlation in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    assert means == sorted(means)
    assert means[0] < -0.9 < -0.2 < means[2] < 0.2 < 0.9 < means[4]


def test_without_a_correlation_workloads_are_those_of_former_releases() -> None:
    assert ranks_of(OWN.draw(0)) == [16, 32, 8, 8, 16]
    assert ranks_of(ASSIGNED.draw(3)) == [8, 64, 8, 16, 32, 8, 64, 16, 64, 32, 16, 32]


def test_a_preset_takes_the_correlation_as_its_own() -> None:
    by_text = replace(PRESET, source=f"{PRESET.source},correlation=1").draw(5)
    assert replace(PRESET, correlation=1.0).draw(5).adapters == by_text.adapters
    assert ranks_of(by_text) != ranks_of(PRESET.draw(5))


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        (replace(OWN, correlation=1.5), "correlation of rank and popularity is 1.5; it must be from -1 to 1"),
        (replace(OWN, correlation=float("nan")), "correlation of rank and popularity is nan"),
        (replace(DEMO, correlation=1.0), "--correlation wants --ranks"),
        (
            SimulatedWorkload(source="preset:slora,correlation=1", correlation=0.5),
            "--correlation: preset:slora,correlation=1 says it too",
        ),
        (
            SimulatedWorkload(source="preset:loraserve-skew", correlation=0.5),
            "popularity by rank takes no correlation",
        ),
    ],
)
def test_a_correlation_that_cannot_be_is_refused_in_one_line(
    workload: SimulatedWorkload, message: str
) -> None:
    with pytest.raises(BadInputError, match=message) as refused:
        workload.draw(0)
    assert "\n" not in str(refused.value)

"""The workload of a simulation: how ranks go with popularity, and what is put where a trace says nothing."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.errors import BadInputError
from loraserve.simulator.scenario import versions_of
from loraserve.simulator.workload import SimulatedWorkload
from traces.columns import TraceColumns

DEMO = SimulatedWorkload(source="demo")
OWN = replace(DEMO, ranks="8,16,32")
ASSIGNED = replace(DEMO, requests=400, adapters=12, ranks="8,16,32,64", assign="zipf", parameter=1.1)
NAMED = replace(DEMO, adapters=3, ranks="names:x-rank-8-0/y-rank-64-0/z-rank-32-0")
REAL = Path(__file__).parents[4] / "shared" / "traces"
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


def check_order(columns: TraceColumns, sign: int) -> None:
    """Who has more requests has as high a rank or a higher one, or as low or lower for a sign of -1."""
    signed = [sign * rank for rank in ranks_of(columns)]
    for fewer, more in pairwise(sorted(zip(counts_of(columns), signed, strict=True))):
        assert fewer[0] == more[0] or fewer[1] <= more[1]


@given(workload=st.sampled_from([OWN, ASSIGNED, NAMED]), seed=seeds, sign=st.sampled_from([1, -1]))
def test_ranks_rise_or_fall_with_the_number_of_requests(
    workload: SimulatedWorkload, seed: int, sign: int
) -> None:
    columns = replace(workload, correlation=float(sign)).draw(seed)
    check_order(columns, sign)


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


# -- lengths -----------------------------------------------------------------------------------

BLOCKS = '{"timestamp": %d, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n'
INVOCATIONS = "app,func,end_timestamp,duration\n" + "".join(f"a,f{n % 3},{n + 2},1\n" for n in range(200))


def test_a_trace_without_lengths_takes_those_of_azure_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(INVOCATIONS)
    workload = SimulatedWorkload(source=str(path))
    columns, again, other = workload.draw(1), workload.draw(1), workload.draw(2)
    assert workload.is_drawn
    assert columns.source == f"{path}, lengths of azure"
    assert columns.prompt_tokens.min() >= 1
    assert len(set(columns.prompt_tokens.tolist())) > 50
    assert list(requests_of(columns)) == list(requests_of(again))
    assert columns.adapter.tolist() == other.adapter.tolist()
    assert columns.prompt_tokens.tolist() != other.prompt_tokens.tolist()


def test_lengths_that_are_asked_for_take_the_place_of_the_trace_s_and_of_its_blocks(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(BLOCKS % (1000 * second) for second in range(9)))
    own = SimulatedWorkload(source=str(path)).draw(0)
    assert (own.source, own.hash_ids is not None) == (str(path), True)
    fixed = SimulatedWorkload(source=str(path), lengths="fixed:70,30").draw(0)
    assert (set(fixed.prompt_tokens.tolist()), set(fixed.output_tokens.tolist())) == ({70}, {30})
    assert (fixed.hash_ids, fixed.hash_offsets) == (None, None)
    assert np.array_equal(fixed.arrival_s, own.arrival_s)


def test_lengths_may_come_from_another_trace_with_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text(BLOCKS % 0 + "no row\n" + BLOCKS % 9)
    columns = replace(DEMO, lengths=f"resample:{path}").draw(0)
    assert set(zip(columns.prompt_tokens.tolist(), columns.output_tokens.tolist(), strict=True)) == {(600, 5)}
    assert columns.source == "bundled:demo, lengths of resample"


def test_a_preset_takes_lengths_as_its_own() -> None:
    assert set(replace(PRESET, lengths="fixed:9,8").draw(0).output_tokens.tolist()) == {8}


def test_a_law_of_lengths_that_is_not_one_is_refused() -> None:
    with pytest.raises(BadInputError, match="lengths: 'azur' is unknown; there are: azure"):
        replace(DEMO, lengths="azur").draw(0)


# -- time --------------------------------------------------------------------------------------


def test_requests_without_an_adapter_can_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    rows = ["a-rank-8-0,10,5,0.0", ",10,5,1.0", "b-rank-16-0,10,5,2.0", ",10,5,3.0"]
    lines = [f"{place},{row}" for place, row in enumerate(rows)]
    path.write_text("\n".join(["req_id,adapter,prompt_len,output_len,req_time", *lines]) + "\n")
    drawn = SimulatedWorkload(source=str(path), only_adapters=True, requests=4).draw(0)
    assert len(SimulatedWorkload(source=str(path)).draw(0)) == 4
    assert drawn.adapter.tolist() == [0, 1, 0, 1]
    path.write_text("\n".join(["req_id,adapter,prompt_len,output_len,req_time", lines[1]]) + "\n")
    with pytest.raises(BadInputError, match="no request names an adapter"):
        SimulatedWorkload(source=str(path), only_adapters=True).draw(0)
    with pytest.raises(BadInputError, match="only_adapters is for files"):
        SimulatedWorkload(source="preset:loraserve-uniform", only_adapters=True).draw(0)


def test_a_duration_is_cut_in_the_trace_s_own_time_before_it_is_sped_up() -> None:
    whole, cut = DEMO.draw(0), replace(DEMO, duration_s=20.0, speedup=4.0).draw(0)
    assert 0 < len(cut) == int((whole.arrival_s < 20.0).sum()) < len(whole)
    assert np.array_equal(cut.arrival_s, whole.arrival_s[: len(cut)] / 4.0)


# -- real traces -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "num_requests", "num_adapters"),
    [
        ("genai_dev_days00-11.csv.gz", {"speedup": 1000.0}, 10_337, 181),
        ("arena_1500.csv.gz", {"rate_per_s": 20.0}, 1_500, 27),
        ("maf_arrivals_128.txt", {}, 434, None),
        ("maf2019_invocations_sample.csv", {"speedup": 20.0}, 4_525, 4),
        ("maf2021_sample_200.csv", {"speedup": 5.0}, 199, 31),
        ("AzureLLMInferenceTrace_conv.csv.gz", {"adapters": 50, "assign": "zipf"}, 19_366, 50),
    ],
)
def test_real_traces_are_workloads_with_ranks_with_and_against_popularity(
    name: str, options: dict[str, Any], num_requests: int, num_adapters: int | None
) -> None:
    if not (REAL / name).exists():
        pytest.skip(f"the real trace {name} is not on this machine (looked in ../shared/traces)")
    for sign in (1, -1):
        columns = SimulatedWorkload(
            source=str(REAL / name), ranks="8,16,32,64", correlation=sign, **options
        ).draw(0)
        assert len(columns) == num_requests
        assert num_adapters in (None, len(columns.adapters))
        assert len(versions_of(columns, bytes_per_rank=1.0)) == len(columns.adapters)
        assert min(columns.prompt_tokens.min(), columns.output_tokens.min()) >= 1
        check_order(columns, sign)
        assert ranks_of(columns)[int(np.argmax(counts_of(columns)))] == (64 if sign > 0 else 8)

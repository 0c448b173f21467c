"""The figures of a trace: those printed beside the real ones, and those of small ones by hand."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces import Trace, TraceError, TraceRequest
from traces.columns import TraceColumns, columns_of
from traces.fill import UNKNOWN
from traces.read import read_columns
from traces.stats import TraceStats, trace_stats, zipf_exponent
from traces.stats_plot import stats_png

REAL = Path(__file__).parents[4] / "shared" / "traces"


def of_real(name: str) -> TraceStats:
    path = REAL / name
    if not path.exists():
        pytest.skip(f"the real trace {name} is not on this machine (looked in ../shared/traces)")
    return trace_stats(read_columns(path, fill=UNKNOWN))


def test_the_azure_trace_has_its_printed_figures() -> None:
    found = of_real("AzureLLMInferenceTrace_conv.csv.gz")
    assert (found.requests, round(found.duration_s), found.peak_per_s) == (19_366, 3502, 16)
    assert found.rate_per_s == pytest.approx(5.5, abs=0.05)
    assert found.prompt_tokens is not None
    assert found.output_tokens is not None
    assert (found.prompt_tokens.p50, found.prompt_tokens.p95) == (1020, 4083)
    assert (found.output_tokens.p50, found.output_tokens.p95) == (129, 451)
    assert (found.adapters, found.drift, found.repeated_block_share) == (None, None, None)


def test_the_mooncake_trace_has_its_printed_figures() -> None:
    found = of_real("mooncake_synthetic_trace.jsonl.gz")
    assert (found.requests, round(found.duration_s), found.block_tokens) == (3993, 1022, 512)
    assert found.repeated_block_share == pytest.approx(0.64, abs=0.005)


def test_the_arena_trace_has_its_printed_figures() -> None:
    found = of_real("arena_1500.csv.gz")
    assert (found.requests, found.duration_s) == (1500, 600.0)
    assert found.adapters is not None
    assert (found.adapters.used, found.adapters.ranks) == (27, {"8": 1500})
    assert found.adapters.top1_share == pytest.approx(0.20, abs=0.005)
    assert found.adapters.top10_share == pytest.approx(0.80, abs=0.005)
    assert found.adapters.zipf == pytest.approx(1.04, abs=0.005)


def test_the_genai_trace_has_its_printed_figures() -> None:
    found = of_real("genai_dev_days00-11.csv.gz")
    assert found.adapters is not None
    assert found.drift is not None
    assert (found.adapters.named, found.adapters.requests) == (181, 1561)
    assert found.prompt_tokens is None
    assert found.duration_s == pytest.approx(12 * 86_400, rel=0.001)
    assert (found.drift.window_s, found.drift.top) == (86_400, 20)
    assert found.drift.overlap == pytest.approx(0.14, abs=0.005)


def workload(rows: list[tuple[float, str | None]]) -> TraceColumns:
    return columns_of(
        Trace.of(
            (
                TraceRequest(index=0, arrival_s=at, prompt_tokens=4, output_tokens=2, adapter=name)
                for at, name in rows
            ),
            source="made",
            format="made",
        )
    )


def test_a_small_trace_by_hand() -> None:
    found = trace_stats(workload([(0.0, "a"), (0.5, "b"), (0.9, None), (1.0, "a"), (4.0, "a")]))
    assert (found.requests, found.duration_s, found.rate_per_s, found.peak_per_s) == (5, 4.0, 1.0, 3)
    gaps = np.array([0.5, 0.4, 0.1, 3.0])
    assert found.gap_cv == pytest.approx(gaps.std() / gaps.mean())
    assert found.adapters is not None
    assert (found.adapters.requests, found.adapters.top1_share, found.adapters.top10_share) == (4, 0.75, 1.0)
    assert found.adapters.ranks == {"unknown": 4}


def test_drift_is_seen_and_its_absence_too() -> None:
    names = [f"adapter-{at}" for at in range(40)]
    still = workload([(float(at), names[at % 20]) for at in range(200)])
    moved = workload([(float(at), names[at % 20 + (20 if at >= 100 else 0)]) for at in range(200)])
    overlaps = [trace_stats(one, window_s=100.0).drift for one in (still, moved)]
    assert [one.overlap for one in overlaps if one is not None] == [1.0, 0.0]
    lonely = trace_stats(workload([(0.0, "a"), (1.0, None)]), window_s=50.0).drift
    assert lonely is not None
    assert (lonely.windows, lonely.overlap) == (1, None)


@pytest.mark.parametrize("window_s", [0.0, 1e-9, -1.0, float("nan"), float("inf")])
def test_a_window_that_is_none_is_refused(window_s: float) -> None:
    with pytest.raises(TraceError, match=r"a window of .* is not possible"):
        trace_stats(workload([(0.0, "a"), (1.0, "a")]), window_s=window_s)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.5])
def test_the_exponent_of_zipfs_law_is_found_again(exponent: float) -> None:
    counts = np.round(1e9 * np.arange(1, 101) ** -exponent).astype(np.int64)
    assert zipf_exponent(counts) == pytest.approx(exponent, abs=1e-3)
    assert zipf_exponent(np.array([5])) is None
    assert zipf_exponent(np.array([5, 0])) is None


@given(st.lists(st.tuples(st.floats(0, 1e6), st.none() | st.sampled_from("abcdef")), min_size=1, max_size=40))
def test_any_trace_has_figures_that_are_possible(rows: list[tuple[float, str | None]]) -> None:
    found = trace_stats(workload(rows))
    assert 1 <= found.peak_per_s <= found.requests == len(rows)
    assert found.gap_cv is None or found.gap_cv >= 0
    if found.adapters is not None and found.drift is not None:
        assert found.adapters.used == found.adapters.named
        assert 0 < found.adapters.top1_share <= found.adapters.top10_share <= 1
        assert found.drift.overlap is None or 0 <= found.drift.overlap <= 1


def test_the_picture_of_a_trace_is_a_png_and_always_the_same() -> None:
    columns = workload([(0.0, "a"), (0.5, "b"), (3.0, None)])
    assert stats_png(columns) == stats_png(columns)
    assert stats_png(columns).startswith(b"\x89PNG")
    assert stats_png(workload([(0.0, None)])).startswith(b"\x89PNG")

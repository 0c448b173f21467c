"""Arrivals: every law gives the asked number inside the run, and the figures that its name promises."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from traces.columns import TraceColumns
from traces.synthesis import at_rate, scale_rate, tile
from traces.synthesis.arrivals import (
    ARRIVALS,
    Arrivals,
    Bursty,
    Curve,
    Day,
    Even,
    FromTrace,
    Gamma,
    Markov,
    Poisson,
    RateOfTrace,
    Weibull,
)
from traces.synthesis.portable import Floats, exp, log, log_gammas, normals, stream
from traces.types import TraceError

COUNT, DURATION_S = 20_000, 1_000.0


def columns(arrival_s: list[float], **others: object) -> TraceColumns:
    count = len(arrival_s)
    plain = {
        "arrival_s": np.array(arrival_s, dtype=np.float64),
        "prompt_tokens": np.arange(1, count + 1, dtype=np.int32),
        "output_tokens": np.arange(1, count + 1, dtype=np.int32),
        "adapter": np.full(count, -1, dtype=np.int32),
        "adapters": (),
        "source": "made",
        "format": "made",
    }
    return TraceColumns(**(plain | others))  # type: ignore[arg-type]


SKEWED = columns([0.0, 1.0, 1.5, 2.0, 8.0])


def load(path: str) -> TraceColumns:
    return SKEWED


def times(law: Arrivals, count: int = COUNT, duration_s: float = DURATION_S, seed: int = 1) -> Floats:
    return law.times(count, duration_s, stream(seed, 0), load)


def gap_cv(times_s: Floats) -> float:
    gaps_s = np.diff(times_s)
    return float(np.std(gaps_s) / np.mean(gaps_s))


LAWS: list[Arrivals] = [
    Even(),
    Poisson(),
    Gamma(cv=0.3),
    Gamma(cv=20.0),
    Weibull(cv=3.0),
    Bursty(),
    Markov(),
    Markov(rates=(0.0, 1.0, 7.0), stays_s=(5.0, 1.0, 2.0)),
    Day(period_s=0.0),
    Curve(rates=(0.0, 2.0, 0.0, 1.0), period_s=3.0),
    FromTrace(path="x"),
    RateOfTrace(path="x", bins=4),
]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(LAWS), st.integers(1, 300), st.sampled_from([0.01, 7.0, 1e5]), st.integers(0, 2**40))
def test_every_law_gives_the_asked_number_of_rising_times_inside_the_run(
    law: Arrivals, count: int, duration_s: float, seed: int
) -> None:
    if isinstance(law, Curve):
        # It has no arrival in its first 0.75 s.
        duration_s = max(duration_s, 7.0)
    drawn = times(law, count, duration_s, seed)
    assert len(drawn) == count
    assert np.all(np.diff(drawn) >= 0)
    assert 0 <= drawn[0] <= drawn[-1] <= duration_s
    assert np.array_equal(drawn, times(law, count, duration_s, seed))


def test_the_laws_of_text_are_all_tested() -> None:
    assert {type(law) for law in LAWS} == set(ARRIVALS.values())


def test_even_gaps_are_even() -> None:
    assert times(Even(), 4, 8.0).tolist() == [0.0, 2.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("law", "law_cv", "tolerance"),
    [
        (Poisson(), 1.0, 0.03),
        (Gamma(cv=0.5), 0.5, 0.02),
        (Gamma(cv=1.0), 1.0, 0.03),
        (Gamma(cv=4.0), 4.0, 0.3),
        (Weibull(cv=0.5), 0.5, 0.02),
        (Weibull(cv=1.0), 1.0, 0.03),
        (Weibull(cv=3.0), 3.0, 0.3),
    ],
)
def test_gaps_vary_as_much_as_asked(law: Arrivals, law_cv: float, tolerance: float) -> None:
    assert gap_cv(times(law)) == pytest.approx(law_cv, abs=tolerance)


def test_poisson_arrivals_are_uniform_and_weibull_gaps_are_weibull() -> None:
    assert stats.kstest(times(Poisson()) / DURATION_S, "uniform").pvalue > 0.01
    law = Weibull(cv=2.0)
    gaps_s = np.diff(times(law)) * COUNT / DURATION_S
    expected = stats.weibull_min(law.shape, scale=1 / math.gamma(1 + 1 / law.shape))
    assert stats.kstest(gaps_s, expected.cdf).statistic < 0.02


def test_bursts_hold_their_share() -> None:
    """In 900 s there are 15 to 45 bursts of 9 to 45 s: seconds without any burst hold only the rest."""
    for seed in range(5):
        drawn = times(Bursty(), 27_000, 900.0, seed)
        per_second = np.bincount(np.minimum(drawn, 899.9).astype(int), minlength=900)
        background = np.percentile(per_second, 5)
        # Of 30 requests a second 6 to 10.5 lie outside the bursts.
        assert 2 <= background <= 20
        assert gap_cv(drawn) > 1.2
    only = np.sort(times(Bursty(low=1.0, high=1.0), 1_000, 60.0))
    assert only[-1] - only[0] < 0.7 * 60


def test_markov_states_hold_their_share_of_time_and_requests() -> None:
    law = Markov(rates=(1.0, 9.0), stays_s=(3.0, 1.0))
    drawn = times(law, 200_000, 4_000.0)
    # 1 x 3/4 + 9 x 1/4 = 3 relative; the index of dispersion tells it from Poisson (1).
    per_second = np.bincount(drawn.astype(int), minlength=4_000)
    assert np.mean(per_second < 50 / 3 * 1.8) == pytest.approx(0.6, abs=0.1)
    assert np.var(per_second) / np.mean(per_second) > 10


def test_a_day_has_its_trough_at_the_ends_and_its_peak_in_the_middle() -> None:
    counts, _ = np.histogram(times(Day(peak_to_trough=4.0, period_s=0.0)), bins=10, range=(0, DURATION_S))
    # The mean rate is 2.5 of a trough of 1.
    assert counts[0] / COUNT * 10 == pytest.approx(1.07 / 2.5, abs=0.05)
    assert counts[5] / COUNT * 10 == pytest.approx(3.93 / 2.5, abs=0.1)


def test_a_curve_repeats_and_has_none_where_its_rate_is_zero() -> None:
    drawn = times(Curve(rates=(0.0, 1.0, 3.0), period_s=3.0), 40_000, 300.0)
    counts = np.bincount((drawn % 3.0).astype(int), minlength=3)
    assert counts[0] == 0
    assert counts[2] / counts[1] == pytest.approx(3.0, rel=0.05)


def test_a_trace_keeps_its_pattern_at_another_rate() -> None:
    drawn = times(FromTrace(path="x"), 5, 100.0)
    assert drawn == pytest.approx([0.0, 10.0, 15.0, 20.0, 80.0])
    counts, _ = np.histogram(times(RateOfTrace(path="x", bins=4)), bins=4, range=(0, DURATION_S))
    assert counts / COUNT == pytest.approx([3 / 5, 1 / 5, 0.0, 1 / 5], abs=0.02)


@given(st.integers(1, 40))
def test_tiling_repeats_a_trace_with_its_mean_gap_between(num_requests: int) -> None:
    hashed = columns(
        [0.0, 1.0, 4.0], hash_offsets=np.array([0, 2, 2, 3]), hash_ids=np.array([7, 8, 9], dtype=np.int64)
    )
    tiled = tile(hashed, num_requests)
    assert len(tiled) == num_requests
    # The mean gap is 2 s, so a repetition begins every 6 s.
    assert tiled.arrival_s.tolist() == [[0.0, 1.0, 4.0][i % 3] + 6.0 * (i // 3) for i in range(num_requests)]
    assert tiled.prompt_tokens.tolist() == [i % 3 + 1 for i in range(num_requests)]
    assert tiled.hash_offsets is not None
    assert tiled.hash_ids is not None
    ids = np.split(tiled.hash_ids, tiled.hash_offsets[1:-1])
    assert [part.tolist() for part in ids] == [[[7, 8], [], [9]][i % 3] for i in range(num_requests)]


def test_scaling_changes_the_rate_alone() -> None:
    assert scale_rate(SKEWED, 4.0).arrival_s.tolist() == [0.0, 0.25, 0.375, 0.5, 2.0]
    assert at_rate(SKEWED, 2.0).duration_s == 2.0
    at_once = columns([0.0, 0.0])
    with pytest.raises(TraceError, match="at once"):
        at_rate(at_once, 1.0)
    with pytest.raises(TraceError, match="at once"):
        tile(at_once, 3)
    with pytest.raises(TraceError, match="above 0"):
        scale_rate(SKEWED, 0.0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Gamma(cv=math.nan), "cv of gamma arrivals is nan; it must be from 0.01 to 20"),
        (lambda: Weibull(cv=0.0), "cv of weibull arrivals is 0"),
        (lambda: Bursty(low=0.9), "high of bursty arrivals is 0.8; it must be from 0.9 to 1"),
        (lambda: Markov(rates=(1.0,), stays_s=(1.0,)), "two or more states"),
        (lambda: Markov(rates=(0.0, 0.0)), "all rates of markov arrivals are 0"),
        (lambda: times(Markov(rates=(0.0, 1.0), stays_s=(1e9, 1e-2)), 10, 1.0), "hardly ever leave"),
        (lambda: times(Markov(stays_s=(1e-9, 1.0))), "too short; it must be above"),
        (lambda: Day(peak_to_trough=0.5), "peak_to_trough of day arrivals is 0.5"),
        (lambda: Curve(rates=()), "a curve has 1 to 1,000,000 rates"),
        (lambda: times(Curve(rates=(0.0, 1.0), period_s=1e6)), "no rate above 0 within the run"),
        (lambda: FromTrace(path="x").times(2, 1.0, stream(0, 0), lambda path: columns([0.0])), "at once"),
    ],
)
def test_impossible_arrivals_are_refused(make: object, says: str) -> None:
    with pytest.raises(TraceError, match=says):
        make()  # type: ignore[operator]


def test_our_functions_agree_with_the_library_s() -> None:
    x = np.linspace(-700.0, 700.0, 10_001)
    assert np.max(np.abs(exp(x) / np.exp(x) - 1)) < 1e-15
    assert exp(np.array([-1e9, 0.0])).tolist() == [0.0, 1.0]
    y = np.exp(x)
    assert np.allclose(log(y), x, rtol=1e-15, atol=1e-15)


def test_our_variates_follow_their_distributions() -> None:
    assert stats.kstest(normals(stream(3, 0), 50_000), "norm").pvalue > 0.01
    for shape in (0.3, 1.0, 5.0):
        gammas = np.exp(log_gammas(stream(4, 0), shape, 50_000))
        assert stats.kstest(gammas, "gamma", args=(shape,)).pvalue > 0.01

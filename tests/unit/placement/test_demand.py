"""Demand forecasters: what holds for every one of them, and what each one is for."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.demand import FORECASTERS, ForecastOptions, forecaster
from placement.demand.errors import ForecastErrors
from placement.demand.newcomers import with_newcomers
from placement.types import AdapterName, AdapterVersion, VersionId

A, B, C = VersionId("a@1"), VersionId("b@1"), VersionId("c@1")
NAMES = sorted(FORECASTERS)
# A season of eight epochs, so that random windows see several.
OPTIONS = ForecastOptions(season_s=480.0)

rates = st.floats(0.0, 1e6)
windows = st.dictionaries(st.sampled_from([A, B, C]), rates, max_size=3)
histories = st.lists(windows, min_size=1, max_size=25)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(histories)
def test_forecasts_are_finite_and_never_negative(name: str, history: list[dict[VersionId, float]]) -> None:
    one = forecaster(name, OPTIONS)
    assert one.forecast() == {}
    for window in history:
        one.observe(window)
        assert all(0 <= rate < math.inf for rate in one.forecast().values())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(histories)
def test_the_order_of_a_window_makes_no_difference(name: str, history: list[dict[VersionId, float]]) -> None:
    one, other = forecaster(name, OPTIONS), forecaster(name, OPTIONS)
    for window in history:
        one.observe(window)
        other.observe(dict(reversed(window.items())))
    assert one.forecast() == other.forecast()
    assert one.export() == other.export()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(histories, st.integers(0, 25))
def test_a_state_that_was_kept_as_json_goes_on_as_if_uninterrupted(
    name: str, history: list[dict[VersionId, float]], at: int
) -> None:
    whole, before = forecaster(name, OPTIONS), forecaster(name, OPTIONS)
    for window in history:
        whole.observe(window)
    for window in history[:at]:
        before.observe(window)
    after = forecaster(name, OPTIONS)
    after.restore(json.loads(json.dumps(before.export())))
    for window in history[at:]:
        after.observe(window)
    assert after.forecast() == whole.forecast()
    assert after.export() == whole.export()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(st.floats(1.0, 1e6), st.integers(1, 40))
def test_a_constant_is_forecast_as_itself(name: str, rate: float, num_windows: int) -> None:
    one = forecaster(name, OPTIONS)
    for _ in range(num_windows):
        one.observe({A: rate})
    assert one.forecast() == {A: pytest.approx(rate, rel=1e-6)}


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_that_has_fallen_silent_is_forgotten_in_bounded_time(name: str) -> None:
    one = forecaster(name, OPTIONS)
    one.observe({A: 1e6, B: 5.0})
    silent = 0
    while A in one.forecast():
        silent += 1
        assert silent < 100
        one.observe({B: 5.0})
    # What was known of it has gone with it, and what came of it no longer matters.
    assert one.export()["versions"] == [B]


@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_adapters_a_window_that_never_return_take_bounded_memory(name: str) -> None:
    one = forecaster(name, OPTIONS)
    sizes = []
    for window in range(200):
        one.observe({VersionId(f"{window}/{place}"): 1.0 for place in range(20)})
        sizes.append(len(one.export()["versions"]))
    assert max(sizes[100:]) == max(sizes[:100])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf])
def test_what_is_no_rate_is_refused_and_changes_nothing(name: str, rate: float) -> None:
    one = forecaster(name, OPTIONS)
    one.observe({A: 1.0})
    before = one.export()
    with pytest.raises(ValueError, match=r"b@1.*expected a number from 0"):
        one.observe({A: 2.0, B: rate})
    assert one.export() == before


@pytest.mark.parametrize("name", NAMES)
def test_the_state_of_something_else_is_refused(name: str) -> None:
    one = forecaster(name, OPTIONS)
    other = forecaster("ema" if name != "ema" else "last", OPTIONS)
    own = one.export()
    broken = [{**own, "silent": [1]}, {**own, "columns": {}}, {**own, "errors": [1.0], "windows": None}]
    for state in (other.export(), {}, *broken):
        with pytest.raises(ValueError, match=r"expected|not the state"):
            one.restore(state)


# -- what each one does ------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=9))
def test_loraserve_is_the_line_through_the_last_five_windows_clipped(history: list[float]) -> None:
    one = forecaster("loraserve")
    for rate in history:
        one.observe({A: rate})
    known = history[-5:]
    at = np.arange(len(known))
    line = np.polyval(np.polyfit(at, known, 1), len(known)) if len(known) > 1 else known[0]
    if any(known):
        assert one.forecast()[A] == pytest.approx(max(min(known), line, 1.0), rel=1e-6, abs=1e-3)


def test_the_clip_of_loraserve_worked_by_hand() -> None:
    """A line through 100, 80, 60, 40, 20 goes on with 0: the least of the history stands, 20. Through
    0, 0, 0, 0, 10: slope 2 about a mean of 2, so 2 + 2 * 3 = 8. Through 0.5, 0.4, 0.3: one token."""
    one = forecaster("loraserve")
    for rate in (100.0, 80.0, 60.0, 40.0, 20.0):
        one.observe({A: rate})
    assert one.forecast() == {A: pytest.approx(20.0)}
    late = forecaster("loraserve")
    for rate in (0.0, 0.0, 0.0, 0.0, 10.0):
        late.observe({A: rate, B: 1.0})
    assert late.forecast()[A] == pytest.approx(8.0)
    few = forecaster("loraserve")
    for rate in (0.5, 0.4, 0.3):
        few.observe({A: rate})
    assert few.forecast() == {A: 1.0}


@settings(max_examples=30)
@given(st.floats(0, 1e4), st.floats(0.1, 100))
def test_a_ramp_is_extrapolated_by_loraserve_exactly_and_by_trend_nearly(begin: float, slope: float) -> None:
    line, trend, ema = forecaster("loraserve"), forecaster("trend"), forecaster("ema")
    rate = begin
    for at in range(80):
        rate = begin + slope * at + 1.0
        for one in (line, trend, ema):
            one.observe({A: rate})
    assert line.forecast()[A] == pytest.approx(rate + slope)
    # A damped trend lags by a part of a step, an average by more than one.
    assert rate < trend.forecast()[A] < rate + slope
    assert ema.forecast()[A] == pytest.approx(rate - slope)


def test_overlapping_windows_are_extrapolated_to_the_middle_of_the_next_epoch() -> None:
    """Windows of 30 s every 10 s: the middle of the last one lies 20 s before that of the next epoch."""
    one = forecaster("loraserve", ForecastOptions(epoch_s=10, window_s=30, history_s=50))
    for rate in (10.0, 20.0, 30.0, 40.0, 50.0):
        one.observe({A: rate})
    assert one.forecast() == {A: pytest.approx(70.0)}


def test_adaptive_follows_a_workload_that_slides_and_averages_one_that_only_scatters() -> None:
    """Of 20 adapters: as close as the best of a slow average and a trend, on what each of them is for."""
    rng = np.random.default_rng(7)
    versions = [VersionId(f"{place}@1") for place in range(20)]
    for slope, better, worse in ((0.0, "ema", "trend"), (30.0, "trend", "ema")):
        missed = dict.fromkeys(("adaptive", "ema", "trend"), 0.0)
        ones = {name: forecaster(name) for name in missed}
        for at in range(60):
            came = {one: float(rng.poisson(400 + slope * at)) for one in versions}
            for name, one in ones.items():
                if at >= 20:
                    missed[name] += sum(abs(rate - one.forecast()[key]) for key, rate in came.items())
                one.observe(came)
        assert missed["adaptive"] < 1.02 * missed[better]
        assert missed["adaptive"] < 0.98 * missed[worse]


def test_a_season_is_known_after_it_has_passed_once() -> None:
    """Two hot epochs in eight: from the third season on they are expected, to within a tenth."""
    one, trend = forecaster("seasonal", OPTIONS), forecaster("trend", OPTIONS)
    missed = {"seasonal": 0.0, "trend": 0.0}
    for at in range(48):
        rate = 800.0 if at % 8 in (3, 4) else 100.0
        if at >= 16:
            missed["seasonal"] += abs(one.forecast()[A] - rate)
            missed["trend"] += abs(trend.forecast()[A] - rate)
        one.observe({A: rate})
        trend.observe({A: rate})
    assert missed["seasonal"] < 0.1 * missed["trend"]


def test_the_quantile_covers_what_it_says_and_more_the_burstier_an_adapter_is() -> None:
    """A is 20 requests a second of 60 tokens, B one in five seconds of 6000: the same mean."""
    rng = np.random.default_rng(5)
    one = forecaster("quantile")
    covered, added = [], np.zeros(2)
    for _ in range(400):
        came = {A: rng.poisson(1200) * 60 / 60.0, B: rng.poisson(12) * 6000 / 60.0}
        forecast = one.forecast()
        if forecast:
            covered.append([came[A] <= forecast[A], came[B] <= forecast[B]])
            added += (forecast[A] - 1200, forecast[B] - 1200)
        one.observe(came)
    assert np.mean(covered) == pytest.approx(0.9, abs=0.05)
    # The standard deviations are 35 and 346: of B so much more is to be provided for.
    assert 0 < 3 * added[0] < added[1]


# -- newcomers and errors ----------------------------------------------------------------------


def _adapter(name: str, rank: int) -> AdapterVersion:
    version = VersionId(f"{name}@1")
    return AdapterVersion(version_id=version, name=AdapterName(name), sha256="1", rank=rank, size_bytes=1)


def test_a_newcomer_is_worth_the_mean_of_its_rank_the_silent_ones_included() -> None:
    adapters = [_adapter("a", 8), _adapter("b", 8), _adapter("c", 16), _adapter("n", 8), _adapter("o", 64)]
    forecast = {A: 30.0, C: 60.0}
    new = {VersionId("n@1"), VersionId("o@1")}
    # Rank 8: a has 30, b none; nobody else has rank 64, so all three count.
    assert with_newcomers(forecast, adapters, new) == {
        A: 30.0,
        C: 60.0,
        VersionId("n@1"): 15.0,
        VersionId("o@1"): 30.0,
    }


def test_a_newcomer_keeps_what_was_already_forecast_of_it_and_an_unregistered_one_goes() -> None:
    adapters = [_adapter("a", 8), _adapter("b", 8)]
    assert with_newcomers({A: 10.0, B: 50.0, C: 5.0}, adapters, {B}) == {A: 10.0, B: 50.0}
    assert with_newcomers({}, adapters, {A, B}) == {}


def test_errors_worked_by_hand() -> None:
    errors = ForecastErrors()
    errors.add({A: 10.0, B: 4.0}, {A: 8.0, C: 6.0})
    errors.add({A: 5.0}, {A: 5.0})
    figures = errors.figures()
    # Pairs: A +2, B +4, C -6, A 0; 19 tokens per second came.
    assert (figures.epochs, figures.pairs) == (2, 4)
    assert figures.wape == pytest.approx(12 / 19)
    assert figures.mae_tokens_per_s == pytest.approx(3.0)
    assert figures.bias == pytest.approx(0.0)
    assert figures.under_share == pytest.approx(6 / 19)
    assert figures.coverage == pytest.approx(3 / 4)
    assert figures.total_wape == pytest.approx(0.0)
    assert ForecastErrors().figures().wape is None

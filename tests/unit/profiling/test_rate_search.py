"""The search for the highest rate that holds."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.profiling.search import RateSearch, SearchLimits

RATES = st.floats(1e-3, 1e5)


def find_highest(
    probe: Callable[[float], bool], limits: SearchLimits, start: float
) -> tuple[float | None, int]:
    """The highest rate found for which `probe` is true, None if there is none; and how often it was asked."""
    search = RateSearch(limits, start)
    probes = 0
    while (rate := search.next_rate) is not None:
        search.tell(held=probe(rate))
        probes += 1
    return search.held, probes


@given(truth=RATES, start=RATES, tolerance=st.floats(0.001, 0.5))
def test_it_finds_the_threshold_to_its_tolerance_from_any_start(
    truth: float, start: float, tolerance: float
) -> None:
    limits = SearchLimits(lowest=1e-4, highest=1e6, tolerance=tolerance, max_probes=100)
    found, probes = find_highest(lambda rate: rate <= truth, limits, start)
    assert found is not None
    assert found <= truth <= found * (1 + tolerance) * (1 + 1e-9)
    # Doublings to the bracket, then halvings of its logarithm.
    doublings = abs(math.log2(truth / start)) + 2
    halvings = math.log2(math.log(2) / math.log1p(tolerance))
    assert probes <= doublings + max(0.0, halvings) + 1


@given(
    answers=st.lists(st.booleans(), min_size=60, max_size=60),
    start=RATES,
    lowest=st.floats(1e-3, 1.0),
    ratio=st.floats(1.0, 1e6),
    max_probes=st.integers(1, 50),
)
def test_whatever_the_probes_say_it_ends_within_its_bounds(
    answers: list[bool], start: float, lowest: float, ratio: float, max_probes: int
) -> None:
    limits = SearchLimits(lowest=lowest, highest=lowest * ratio, max_probes=max_probes)
    search = RateSearch(limits, start)
    tried: list[tuple[float, bool]] = []
    while (rate := search.next_rate) is not None:
        assert limits.lowest <= rate <= limits.highest
        assert search.failed is None or rate < search.failed
        assert search.held is None or rate > search.held
        tried.append((rate, answers[len(tried)]))
        search.tell(held=tried[-1][1])
    assert 1 <= len(tried) <= max_probes
    assert search.held == max((rate for rate, held in tried if held), default=None)
    assert search.failed == min((rate for rate, held in tried if not held), default=None)
    with pytest.raises(ValueError, match="over"):
        search.tell(held=True)


@given(start=RATES)
def test_a_limit_that_holds_or_fails_ends_the_search(start: float) -> None:
    limits = SearchLimits(lowest=1.0, highest=100.0)
    assert find_highest(lambda rate: True, limits, start)[0] == 100.0
    assert find_highest(lambda rate: False, limits, start)[0] is None


@pytest.mark.parametrize(
    "wrong", [{"lowest": 0.0}, {"lowest": 2.0}, {"highest": math.inf}, {"tolerance": 0.0}, {"max_probes": 0}]
)
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    values: dict[str, float] = {"lowest": 1.0, "highest": 1.5, **wrong}
    with pytest.raises(ValueError):
        SearchLimits(**values)  # type: ignore[arg-type]

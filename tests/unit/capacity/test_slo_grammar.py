"""The SLO's small language: what it says comes back, and what it cannot say is refused in one line."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.capacity.slo import FIGURES, LATENCY_FIGURES, Clause, Target
from loraserve.errors import BadInputError

TIMES_MS = st.integers(1, 10_000_000).map(lambda tenths: tenths / 10)
LATENCIES = st.builds(
    Clause, figure=st.sampled_from(LATENCY_FIGURES), sign=st.sampled_from(["<", "<="]), limit=TIMES_MS
)
ATTAINMENTS = st.builds(
    Clause,
    figure=st.just("attainment"),
    sign=st.sampled_from([">", ">="]),
    limit=st.integers(0, 999).map(lambda thousandths: thousandths / 1000),
)
GOODPUTS = st.builds(
    Clause,
    figure=st.just("goodput"),
    sign=st.sampled_from([">", ">="]),
    limit=st.integers(0, 10**6).map(lambda tenths: tenths / 10),
)
TARGETS = st.lists(
    st.one_of(LATENCIES, ATTAINMENTS, GOODPUTS), min_size=1, max_size=6, unique_by=lambda one: one.figure
).map(lambda clauses: Target(clauses=tuple(clauses)))
FIGURE_VALUES = st.fixed_dictionaries(
    {name: st.one_of(st.just(math.inf), st.floats(0, 1e7)) for name in FIGURES}
)


@given(TARGETS)
def test_a_target_comes_back_from_its_text(target: Target) -> None:
    assert Target.parse(target.text) == target
    spaced = target.text.replace(",", " , ").replace("<", " < ").replace(" < =", " <= ")
    assert Target.parse(spaced.replace(">", " > ").replace(" > =", " >= ")) == target


@given(TARGETS, FIGURE_VALUES)
def test_figures_hold_a_target_if_every_comparison_does(target: Target, values: dict[str, float]) -> None:
    compare = {
        "<": lambda value, limit: value < limit,
        "<=": lambda value, limit: value <= limit,
        ">": lambda value, limit: value > limit,
        ">=": lambda value, limit: value >= limit,
    }
    expected = all(compare[one.sign](values[one.figure], one.limit) for one in target.clauses)
    assert target.holds(values) is expected
    if target.used(values) > 1 + 1e-9:
        assert not expected
    if expected:
        assert target.used(values) <= 1


@given(TARGETS, st.floats(0.1, 10.0), FIGURE_VALUES)
def test_a_looser_target_is_held_by_whatever_holds(
    target: Target, factor: float, values: dict[str, float]
) -> None:
    for kind in target.latency_kinds:
        scaled = target.scaled(kind, factor)
        tight, loose = (target, scaled) if factor >= 1 else (scaled, target)
        assert loose.holds(values) or not tight.holds(values)
        untouched = [one for one in target.clauses if not one.figure.startswith(f"{kind}_")]
        assert [one for one in scaled.clauses if one in untouched] == untouched


def test_units_and_both_ways_to_write_a_share() -> None:
    target = Target.parse("ttft_p95<2s, tbt_p99<=80.5ms,attainment>=99%,goodput>1.5/s")
    assert [one.limit for one in target.clauses] == [2000.0, 80.5, 0.99, 1.5]
    assert target.text == "ttft_p95<2s,tbt_p99<=80.5ms,attainment>=0.99,goodput>1.5"
    assert target.judged_by.ttft_ms == 2000.0
    assert target.judged_by.tbt_ms == 80.5


def test_nothing_to_measure_keeps_latencies_and_nothing_else() -> None:
    assert Target.parse("tbt_p95<1ms").holds({"tbt_p95": None})
    assert not Target.parse("attainment>0").holds({"attainment": None})


def test_a_run_is_hopeless_by_the_tightest_bound_that_its_ttft_can_break() -> None:
    assert Target.parse("ttft_p95<2s,ttft_p99<1s").hopeless_ttft_ms == 1000.0
    assert Target.parse("ttft_p50<2s").hopeless_ttft_ms is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "expected such as ttft_p95<2s"),
        ("ttft_p95<2s,", "''; expected such as"),
        ("ttft<2s", "'ttft' is no figure; expected of ttft|tbt|tpot|e2e with _p50|_p95|_p99, attainment"),
        ("ttft_p90<2s", "'ttft_p90' is no figure"),
        ("ttft_p95<2", "unit none; expected s or ms"),
        ("ttft_p95<2min", "unit min; expected s or ms"),
        ("ttft_p95>2s", "expected < or <= after ttft_p95"),
        ("attainment<0.9", "expected > or >= after attainment"),
        ("attainment>1.2", "expected a share from 0 to 1"),
        ("attainment>1", "can never be met; expected attainment>=1"),
        ("goodput>3ms", "unit ms; expected none or /s"),
        ("ttft_p95<0s", "expected a time above 0"),
        ("ttft_p95<-1s", "expected such as"),
        ("ttft_p95<1e3ms", "expected such as"),
        ("ttft_p95<2s,ttft_p95<1s", "ttft_p95 stands there twice"),
        ("ttft_p95==2s", "expected such as"),
    ],
)
def test_what_the_grammar_lacks_is_refused_in_one_line(text: str, line: str) -> None:
    with pytest.raises(BadInputError) as raised:
        Target.parse(text)
    assert line in str(raised.value)
    assert str(raised.value).startswith("--slo: ")
    assert "\n" not in str(raised.value)


@given(st.text(max_size=40))
def test_any_text_is_a_target_or_bad_input(text: str) -> None:
    try:
        target = Target.parse(text)
    except BadInputError:
        return
    assert Target.parse(target.text) == target

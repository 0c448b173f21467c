"""A breaker lets through, leaves alone, and tries again; random events keep its promises."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.fabric.breaker import Breaker, BreakerCommand, BreakerEvent, BreakerRules, BreakerState

RULES = BreakerRules(failures=3, first_s=1, max_s=8)


def allows(breaker: Breaker, now_s: float) -> bool:
    return breaker.handle(BreakerEvent.ASKED, now_s) == (BreakerCommand.ALLOW,)


def open_until(breaker: Breaker, now_s: float) -> float:
    """Have the trial fail, and say until when nobody gets through."""
    assert breaker.handle(BreakerEvent.FAILED, now_s) == (BreakerCommand.OPENED,)
    return breaker.open_until_s


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not() -> None:
    breaker = Breaker(RULES)
    for event in (BreakerEvent.FAILED, BreakerEvent.FAILED, BreakerEvent.SUCCEEDED):
        assert breaker.handle(event, 0) == ()
    assert breaker.is_idle
    assert breaker.handle(BreakerEvent.FAILED, 0) == breaker.handle(BreakerEvent.FAILED, 0) == ()
    assert allows(breaker, 0)
    assert breaker.handle(BreakerEvent.FAILED, 0) == (BreakerCommand.OPENED,)
    assert not allows(breaker, 0.9)


def test_one_missing_library_opens_it() -> None:
    breaker = Breaker(RULES)
    assert breaker.handle(BreakerEvent.MISSING, 0) == (BreakerCommand.OPENED,)
    assert not allows(breaker, 0.9)
    assert allows(breaker, 1)


def test_one_trial_gets_through_and_its_success_closes_it() -> None:
    breaker = Breaker(RULES)
    breaker.handle(BreakerEvent.MISSING, 0)
    assert allows(breaker, 1)
    assert not allows(breaker, 1)
    assert breaker.handle(BreakerEvent.SUCCEEDED, 2) == (BreakerCommand.CLOSED,)
    assert allows(breaker, 2)
    assert allows(breaker, 2)


def test_the_back_off_doubles_to_its_ceiling_and_a_success_resets_it() -> None:
    breaker = Breaker(RULES)
    breaker.handle(BreakerEvent.MISSING, 0)
    waits = []
    for _ in range(5):
        now_s = breaker.open_until_s
        assert allows(breaker, now_s)
        waits.append(open_until(breaker, now_s) - now_s)
    assert waits == [2, 4, 8, 8, 8]
    assert allows(breaker, breaker.open_until_s)
    breaker.handle(BreakerEvent.SUCCEEDED, 100)
    breaker.handle(BreakerEvent.MISSING, 100)
    assert breaker.open_until_s == 101


def test_a_trial_that_was_abandoned_or_never_told_its_end_makes_room_for_another() -> None:
    breaker = Breaker(RULES)
    breaker.handle(BreakerEvent.MISSING, 0)
    assert allows(breaker, 1)
    assert breaker.handle(BreakerEvent.ABANDONED, 1) == ()
    assert allows(breaker, 1)
    assert not allows(breaker, 8.9)
    assert allows(breaker, 9)


def test_late_failures_of_earlier_attempts_do_not_lengthen_the_wait() -> None:
    breaker = Breaker(RULES)
    breaker.handle(BreakerEvent.MISSING, 0)
    assert breaker.handle(BreakerEvent.FAILED, 0.5) == ()
    assert allows(breaker, 1)


@pytest.mark.parametrize("rules", [{"failures": 0}, {"first_s": 0.0}, {"first_s": 2.0, "max_s": 1.0}])
def test_rules_that_cannot_be_are_refused(rules: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected failures of at least 1"):
        BreakerRules(**rules)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.sampled_from(BreakerEvent), st.integers(0, 5)), max_size=60))
def test_whatever_happens_its_promises_hold(events: list[tuple[BreakerEvent, int]]) -> None:
    breaker, now_s, in_a_row = Breaker(RULES), 0, 0
    for event, passed_s in events:
        now_s += passed_s
        before, until_s = breaker.state, breaker.open_until_s
        said = breaker.handle(event, now_s)
        if event is BreakerEvent.ASKED:
            allowed = said == (BreakerCommand.ALLOW,)
            assert allowed or said == (BreakerCommand.REFUSE,)
            assert allowed or before is not BreakerState.CLOSED, "closed lets everybody through"
            assert not (allowed and before is BreakerState.OPEN and now_s < until_s), (
                "open lets nobody through"
            )
        elif event is BreakerEvent.SUCCEEDED:
            assert breaker.state is BreakerState.CLOSED
            assert breaker.is_idle
        in_a_row = {BreakerEvent.SUCCEEDED: 0, BreakerEvent.FAILED: in_a_row + 1}.get(event, in_a_row)
        if BreakerCommand.OPENED in said:
            assert breaker.state is BreakerState.OPEN
            assert (
                event is BreakerEvent.MISSING
                or in_a_row >= RULES.failures
                or before is BreakerState.HALF_OPEN
            )
            assert RULES.first_s <= breaker.open_until_s - now_s <= RULES.max_s
        assert (BreakerCommand.CLOSED in said) == (
            breaker.state is BreakerState.CLOSED and before is not BreakerState.CLOSED
        )
    now_s += 8
    assert allows(breaker, now_s), "after the longest back-off somebody gets through"

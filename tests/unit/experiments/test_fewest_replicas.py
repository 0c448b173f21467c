"""The search for the fewest replicas finds it, in few steps, and trusts a failure more than a success."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.experiments.fewest import ReplicaSearch


@given(st.integers(1, 300), st.integers(-3, 400), st.integers(1, 400))
def test_the_fewest_that_hold_are_found(most: int, start: int, fewest: int) -> None:
    search = ReplicaSearch(most=most, start=start)
    tried = []
    while (replicas := search.next_replicas) is not None:
        assert 1 <= replicas <= most
        assert replicas not in tried
        tried.append(replicas)
        search.tell(held=replicas >= fewest)
    assert search.fewest == (fewest if fewest <= most else None)
    assert len(tried) <= 2 * most.bit_length() + 2


def test_a_good_start_takes_two_steps() -> None:
    search = ReplicaSearch(most=64, start=5)
    tried = []
    while (replicas := search.next_replicas) is not None:
        tried.append(replicas)
        search.tell(held=replicas >= 5)
    assert tried == [5, 4]


@given(st.integers(1, 40), st.integers(1, 40), st.sets(st.integers(1, 40)))
def test_nothing_at_or_below_a_failure_is_ever_the_answer(most: int, start: int, held: set[int]) -> None:
    search = ReplicaSearch(most=most, start=start)
    failed = 0
    while (replicas := search.next_replicas) is not None:
        assert replicas > failed
        if replicas not in held:
            failed = replicas
        search.tell(held=replicas in held)
    assert search.fewest is None or search.fewest > failed


def test_telling_when_nothing_was_asked_is_an_error() -> None:
    search = ReplicaSearch(most=1)
    search.tell(held=True)
    with pytest.raises(ValueError, match="over"):
        search.tell(held=True)
    with pytest.raises(ValueError, match="at least 1"):
        ReplicaSearch(most=0)

"""Runs of neighbours on a ring."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from placement.pooling.ring_runs import along, begins, run

runs = st.integers(1, 12).flatmap(
    lambda number: st.tuples(
        st.just(number),
        st.lists(
            st.tuples(st.integers(0, number - 1), st.integers(1, number), st.integers(1, 9)), max_size=20
        ),
    )
)


@given(drawn=runs)
def test_sums_along_the_ring_are_those_of_the_members_that_runs_cover(
    drawn: tuple[int, list[tuple[int, int, int]]],
) -> None:
    number, each = drawn
    members = tuple(range(number))
    expected = np.zeros(number)
    for start, copies, size in each:
        covered = run(members, start, copies)
        assert len(covered) == copies
        assert list(covered) == sorted(set(covered))
        expected[list(covered)] += size
    columns = np.array(each, dtype=np.int64).reshape(-1, 3)
    found = along(columns[:, 0], columns[:, 1], columns[:, 2].astype(np.float64), number)
    assert np.array_equal(found, expected)


def test_a_hot_adapter_leaves_all_members_with_alike_to_do() -> None:
    number, usual = 40, 4
    work = [6.0, 3.0, 1.5, *[(number - 10.5) / 300] * 300]
    copies = [12, 6, usual, *[usual] * 300]
    starts = begins(work, copies, [1.0] * 303, np.zeros(number), [0.0] * number, [1e9] * number, usual)
    part = np.array(work) / np.array(copies)
    loads = along(np.array(starts), np.array(copies), part, number)
    assert loads.max() <= 1.35 * loads.mean()


def test_what_is_full_is_left_alone_for_what_is_not() -> None:
    filled = [1.0, 1.0, 0.0, 0.0]
    starts = begins([0.01] * 8, [1] * 8, [1.0] * 8, np.zeros(4), filled, [100.0] * 4, 1)
    assert set(starts) == {2, 3}

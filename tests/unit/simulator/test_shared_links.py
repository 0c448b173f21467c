"""A shared link against the fluid model, written down with fractions."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.simulator.links import LinkSpeed, SharedLink
from placement.latency import PS_PER_S


def fluid_ends(rate: int, transfers: list[tuple[int, int]]) -> list[Fraction]:
    """When each (begin in ps, bytes) ends if those under way share the rate evenly."""
    left = {place: Fraction(size) for place, (_, size) in enumerate(transfers)}
    begun: set[int] = set()
    ends = [Fraction(-1)] * len(transfers)
    now = Fraction(0)
    while left:
        done = {place for place in begun if left[place] == 0}
        for place in done:
            ends[place] = now
            del left[place]
        begun -= done
        joins = [
            Fraction(at) for place, (at, _) in enumerate(transfers) if place in left and place not in begun
        ]
        finish = now + min((left[one] for one in begun), default=Fraction(0)) * len(begun) * PS_PER_S / rate
        times = ([finish] if begun else []) + [max(now, at) for at in joins]
        if not times:
            break
        then = min(times)
        for one in begun:
            left[one] -= (then - now) * rate / PS_PER_S / len(begun)
        now = then
        begun |= {place for place in left if transfers[place][0] <= now}
    return ends


def ends_on(link: SharedLink, transfers: list[tuple[int, int]]) -> list[int]:
    ends = [-1] * len(transfers)

    def run_until(until_ps: float) -> None:
        while (at_ps := link.next_ps()) is not None and at_ps <= until_ps:
            for place in link.take_ended(at_ps):
                ends[place] = at_ps
            link.check_invariants()

    for place, (at_ps, size) in sorted(enumerate(transfers), key=lambda one: (one[1][0], one[0])):
        run_until(at_ps)
        link.begin(place, size, at_ps)
    run_until(math.inf)
    return ends


@given(
    rate=st.integers(1, 10**12),
    transfers=st.lists(
        st.tuples(st.integers(0, 3 * PS_PER_S), st.integers(1, 10**10)), min_size=1, max_size=8
    ),
)
@settings(max_examples=200, deadline=None)
def test_a_link_shares_its_rate_evenly_loses_no_byte_and_is_never_too_fast(
    rate: int, transfers: list[tuple[int, int]]
) -> None:
    link = SharedLink(rate)
    ends = ends_on(link, transfers)
    for end, exact in zip(ends, fluid_ends(rate, transfers), strict=True):
        # An end is rounded up to a picosecond, once for each change before it.
        assert exact <= end <= exact + 4 * len(transfers) ** 2
    assert link.bytes_done == link.bytes_begun == sum(size for _, size in transfers)
    busy_ps = max(ends) - min(at for at, _ in transfers)
    assert link.bytes_done * PS_PER_S <= rate * busy_ps, "more bytes than the link can carry"


def test_what_is_cancelled_leaves_its_part_to_the_others() -> None:
    link = SharedLink(1000)
    link.begin(1, 1000, 0)
    link.begin(2, 1000, 0)
    assert link.next_ps() == 2 * PS_PER_S
    link.cancel(1, PS_PER_S)
    assert link.next_ps() == PS_PER_S + PS_PER_S // 2
    assert link.take_ended(PS_PER_S + PS_PER_S // 2) == [2]
    link.check_invariants()
    assert (link.bytes_begun, link.bytes_done, link.bytes_cancelled) == (2000, 1000, 1000)


def test_a_link_does_not_go_back_in_time() -> None:
    link = SharedLink(1000)
    link.begin(1, 10, 5)
    with pytest.raises(ValueError, match="cannot go back"):
        link.begin(2, 10, 4)


@pytest.mark.parametrize("speed", [(0.5, 0.0), (float("nan"), 0.0), (1e9, -1.0), (1e9, float("inf"))])
def test_a_speed_that_no_link_has_is_refused(speed: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="expected from"):
        LinkSpeed(bytes_per_s=speed[0], latency_s=speed[1])

"""What is evicted frees enough, is never pinned or last, and costs little more than the best choice."""

from dataclasses import replace
from itertools import chain, combinations
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from placement.fabric.eviction import CachedVersion, choose_evicted, eviction_cost_s
from placement.types import VersionId

MIB = 1024**2


def cached(name: str, **changes: object) -> CachedVersion:
    usual: dict[str, object] = {
        "size_bytes": 10 * MIB,
        "rank": 16,
        "idle_s": 30.0,
        "fetch_bytes_per_s": 1e9,
    }
    return CachedVersion(version_id=VersionId(f"{name}@0"), **{**usual, **changes})  # type: ignore[arg-type]


USUAL = cached("usual")


def test_what_costs_more_to_get_back_or_is_wanted_sooner_stays() -> None:
    dearer = [
        cached("a", rank=128),
        cached("a", idle_s=1.0),
        cached("a", fetch_bytes_per_s=1e7),
        cached("a", demand_tokens_per_s=1000.0),
    ]
    for one in dearer:
        assert choose_evicted([one, USUAL], needed_bytes=1) == (USUAL.version_id,), one


def test_a_small_one_does_not_go_for_bytes_that_a_large_one_frees_at_less() -> None:
    small, large = cached("a", size_bytes=MIB), cached("b", size_bytes=100 * MIB)
    assert choose_evicted([small, large], needed_bytes=50 * MIB) == (large.version_id,)
    assert choose_evicted([small, large], needed_bytes=MIB) == (small.version_id,)


def test_nothing_needed_evicts_nothing_and_too_much_cannot_be_done() -> None:
    assert choose_evicted([USUAL], needed_bytes=0) == ()
    assert choose_evicted([USUAL], needed_bytes=10 * MIB + 1) is None
    assert choose_evicted([replace(USUAL, is_pinned=True)], needed_bytes=1) is None
    assert choose_evicted([replace(USUAL, is_last=True)], needed_bytes=1) is None


caches = st.lists(
    st.builds(
        CachedVersion,
        version_id=st.integers(0, 10**6).map(lambda number: VersionId(f"v{number}@0")),
        size_bytes=st.integers(0, 100),
        rank=st.integers(1, 128),
        idle_s=st.floats(0, 1000),
        fetch_bytes_per_s=st.floats(1, 1000),
        demand_tokens_per_s=st.none() | st.floats(0, 1000),
        is_pinned=st.booleans(),
        is_last=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda one: one.version_id,
)


@given(caches, st.integers(1, 400), st.randoms())
def test_enough_is_freed_at_no_more_than_twice_the_least_cost(
    entries: list[CachedVersion], needed_bytes: int, random: Random
) -> None:
    chosen = choose_evicted(entries, needed_bytes=needed_bytes)
    random.shuffle(entries)
    assert choose_evicted(entries, needed_bytes=needed_bytes) == chosen, "the order makes no difference"
    free = [one for one in entries if not one.is_pinned and not one.is_last]
    every = chain.from_iterable(combinations(free, count) for count in range(len(free) + 1))
    costs = [
        sum(map(eviction_cost_s, some))
        for some in every
        if sum(one.size_bytes for one in some) >= needed_bytes
    ]
    if chosen is None:
        assert not costs
        return
    by_id = {one.version_id: one for one in free}
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= by_id.keys(), "pinned and last ones stay"
    freed = sum(by_id[one].size_bytes for one in chosen)
    assert freed >= needed_bytes
    assert all(freed - by_id[one].size_bytes < needed_bytes for one in chosen), "none could have stayed"
    assert sum(eviction_cost_s(by_id[one]) for one in chosen) <= 2 * min(costs) * (1 + 1e-9)

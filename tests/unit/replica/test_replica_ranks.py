"""A replica's counts by rank: what is there, whatever becomes of it."""

from hypothesis import given
from hypothesis import strategies as st

from loraserve.clock import ManualClock
from loraserve.replica.meter import Meter, Progress
from placement.routing.chooser import RankLoad


def test_a_request_waits_until_its_first_token_and_runs_until_it_goes() -> None:
    meter = Meter(ManualClock())
    with meter.begin(16, (1, 2, 3)) as progress:
        assert meter.ranks.loads() == (RankLoad(16, 0, 1, 3),)
        progress.step(0)
        assert meter.ranks.loads() == (RankLoad(16, 0, 1, 3),)
        progress.step(1)
        progress.step(1)
        assert meter.ranks.loads() == (RankLoad(16, 1, 0, 0),)
    assert meter.ranks.loads() == ()


RANKS = (0, 8, 64)
histories = st.lists(
    st.tuples(st.sampled_from(RANKS), st.integers(1, 9), st.sampled_from((0, 1, 2))), max_size=30
)


@given(histories)
def test_the_counts_are_those_of_what_is_there(histories: list[tuple[int, int, int]]) -> None:
    """Each history is a rank, a prompt's length, and how far it came: waits, runs, has gone."""
    meter = Meter(ManualClock())
    kept: list[Progress] = []
    for rank, length, state in histories:
        progress = meter.begin(rank, tuple(range(length)))
        kept.append(progress)
        if state:
            progress.step(1)
        if state == 2:
            progress.__exit__()
    loads = {load.rank: load for load in meter.ranks.loads()}
    for rank in RANKS:
        mine = [(length, state) for one, length, state in histories if one == rank]
        waiting = [length for length, state in mine if state == 0]
        expected = (sum(state == 1 for _, state in mine), len(waiting), sum(waiting))
        assert tuple(loads[rank][1:] if rank in loads else (0, 0, 0)) == expected

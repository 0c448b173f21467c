"""Background work takes its share of a processor while requests run, and all it can when none do."""

import threading
from collections import defaultdict
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.pace import MAX_HELD_UP_S, MAX_REST_S, PIECE_S, Pace, Times


class Bench:
    """A pace, and time that passes only when its threads work or sleep."""

    def __init__(self, share: float, is_busy: Callable[[], bool] = lambda: True) -> None:
        self.now_s = 0.0
        self.slept_s: defaultdict[int, float] = defaultdict(float)
        self.in_sleep: list[Callable[[], None]] = []
        self._worked_s: defaultdict[int, float] = defaultdict(float)
        times = Times(
            now_s=lambda: self.now_s,
            worked_s=lambda: self._worked_s[threading.get_ident()],
            sleep=self._sleep,
        )
        self.pace = Pace(share, is_busy, times=times)
        self.pace.rest()

    def work(self, seconds: float) -> None:
        """A piece of work, and the rest after it."""
        self.work_only(seconds)
        self.pace.rest()

    def work_only(self, seconds: float) -> None:
        """A piece of work."""
        self._worked_s[threading.get_ident()] += seconds
        self.now_s += seconds

    @property
    def rested_s(self) -> float:
        """How long this thread has slept."""
        return self.slept_s[threading.get_ident()]

    def _sleep(self, seconds: float) -> None:
        assert seconds > 0
        before_s = self.now_s
        if self.in_sleep:
            self.in_sleep.pop()()
        self.now_s = max(self.now_s, before_s + seconds)
        self.slept_s[threading.get_ident()] += self.now_s - before_s


@given(
    share=st.floats(0.02, 0.9),
    pieces_s=st.lists(st.floats(PIECE_S / 10, 4 * PIECE_S), min_size=1, max_size=50),
)
def test_while_requests_run_pauses_make_the_share(share: float, pieces_s: list[float]) -> None:
    bench = Bench(share)
    for piece_s in pieces_s:
        bench.work(piece_s)
        assert bench.rested_s <= sum(pieces_s) / share + 1e-9
    # The last piece may be too small to be paid for yet.
    assert bench.rested_s >= (sum(pieces_s) - PIECE_S) / share - 1e-9


def test_nobody_rests_while_nothing_runs_or_with_all_of_a_processor() -> None:
    for bench in (Bench(0.05, lambda: False), Bench(1.0)):
        for _ in range(5):
            bench.work(2 * PIECE_S)
        assert bench.rested_s == 0


def test_what_was_done_while_nothing_ran_is_not_paid_for() -> None:
    busy = False
    bench = Bench(0.05, lambda: busy)
    bench.work(20 * PIECE_S)
    busy = True
    bench.work(PIECE_S / 2)
    assert bench.rested_s == 0


def test_a_rest_is_bounded_and_ends_with_the_requests() -> None:
    bench = Bench(0.001)
    bench.work(5 * PIECE_S)
    assert bench.rested_s == pytest.approx(MAX_REST_S)
    ends_at_s = bench.now_s + 0.1
    bench.pace.is_busy = lambda: bench.now_s < ends_at_s
    bench.work(5 * PIECE_S)
    assert bench.now_s == pytest.approx(ends_at_s, abs=0.03)


def test_one_work_is_held_up_for_a_bounded_time() -> None:
    bench = Bench(0.05)
    rest = bench.pace.for_one()
    began_s = bench.now_s
    for _ in range(100):
        bench.work_only(20 * PIECE_S)
        rest()
    worked_s = 100 * 20 * PIECE_S
    assert MAX_HELD_UP_S < bench.now_s - began_s < MAX_HELD_UP_S + worked_s + MAX_REST_S


def test_threads_rest_one_after_the_other() -> None:
    bench = Bench(0.1)

    def other() -> None:
        bench.pace.rest()
        bench.work(2 * PIECE_S)

    def meanwhile() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    bench.in_sleep.append(meanwhile)
    bench.work(2 * PIECE_S)
    assert max(bench.slept_s.values()) == pytest.approx(bench.now_s - 2 * PIECE_S)
    # Both pieces are paid for, although the second was done while the first one's thread slept.
    assert bench.now_s == pytest.approx(2 * PIECE_S + 2 * 2 * PIECE_S / 0.1)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="expected more than 0 and at most 1"):
        Pace(share)

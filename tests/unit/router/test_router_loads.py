"""Load reports: newer ones only, and none that is too old."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.clock import ManualClock
from loraserve.router.loads import STALE_AFTER_S, VIEW_PERIOD_S, LoadBook
from loraserve.rpc.backoff import Backoff
from loraserve.rpc.table_codec import LoadReport
from placement.types import ReplicaId

R0 = ReplicaId("r0")


def report(sequence: int, *, incarnation: str = "a", running: int = 0, waiting: int = 0) -> LoadReport:
    return LoadReport(
        replica_id=R0,
        incarnation=incarnation,
        sequence=sequence,
        running=running,
        waiting=waiting,
        outstanding_tokens=0,
        kv_cache_usage=0.5,
    )


def running(book: LoadBook) -> int | None:
    load = book.view().loads[R0]
    return None if load is None else load.running


def test_a_report_that_is_not_newer_is_dropped() -> None:
    book = LoadBook(clock=ManualClock(), in_flight={})
    assert book.record(report(5, running=5))
    assert not book.record(report(5, running=9))
    assert not book.record(report(4, running=9))
    assert running(book) == 5
    assert book.record(report(6, running=6))
    assert running(book) == 6


def test_a_new_process_starts_counting_anew_and_the_old_one_is_not_heard_again() -> None:
    book = LoadBook(clock=ManualClock(), in_flight={})
    book.record(report(100, incarnation="a", running=1))
    assert book.record(report(1, incarnation="b", running=2))
    assert not book.record(report(101, incarnation="a", running=3))
    assert running(book) == 2


histories = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 5)), max_size=40)


@given(histories)
def test_whatever_came_before_only_newer_reports_of_a_living_process_are_kept(
    history: list[tuple[str, int]],
) -> None:
    book = LoadBook(clock=ManualClock(), in_flight={})
    heard: list[str] = []
    kept = -1
    for number, (incarnation, sequence) in enumerate(history):
        ended = incarnation in heard and heard[-1] != incarnation
        newer = incarnation not in heard or sequence > kept
        taken = book.record(report(sequence, incarnation=incarnation, running=number))
        assert taken == (newer and not ended)
        if taken:
            kept = sequence
            if incarnation not in heard:
                heard.append(incarnation)
            assert running(book) == number


@given(st.lists(st.floats(0.0, 3.0), max_size=20), st.integers(0, 19), st.integers(0, 19))
def test_a_router_cut_off_and_back_knows_what_one_that_never_was_knows(
    gaps_s: list[float], cut_from: int, cut_for: int
) -> None:
    clock = ManualClock()
    always, cut, late = (LoadBook(clock=clock, in_flight={}) for _ in range(3))
    for number, gap_s in enumerate(gaps_s):
        clock.advance(gap_s)
        always.record(report(number, running=number))
        if not cut_from <= number < cut_from + cut_for:
            cut.record(report(number, running=number))
        view = cut.view()
        load = view.loads.get(R0)
        assert load is None or view.now_s - load.received_s <= STALE_AFTER_S
    clock.advance(VIEW_PERIOD_S)
    last = report(len(gaps_s), running=99)
    assert all(book.record(last) for book in (always, cut, late))
    assert always.view().loads == cut.view().loads == late.view().loads


def test_a_stale_report_counts_as_none_by_the_receivers_clock() -> None:
    clock = ManualClock()
    book = LoadBook(clock=clock, in_flight={})
    book.record(report(1, running=3))
    clock.advance(STALE_AFTER_S)
    assert running(book) == 3
    clock.advance(VIEW_PERIOD_S)
    assert running(book) is None
    book.record(report(2, running=4))
    assert running(book) == 4


def test_the_age_is_that_of_the_view() -> None:
    clock = ManualClock()
    book = LoadBook(clock=clock, in_flight={})
    book.record(report(1))
    book.view()
    clock.advance(0.5)
    view = book.view()
    load = view.loads[R0]
    assert load is not None
    assert view.now_s - load.received_s == pytest.approx(0.5)


def test_the_routers_own_requests_are_not_counted_twice() -> None:
    in_flight = {R0: 3}
    book = LoadBook(clock=ManualClock(), in_flight=in_flight)
    book.record(report(1, running=4, waiting=1))
    in_flight[R0] = 0
    load = book.view().loads[R0]
    assert load is not None
    assert load.others == 2


def test_a_report_shows_in_the_view_that_there_is_which_the_next_one_replaces() -> None:
    clock, r1 = ManualClock(), ReplicaId("r1")
    book = LoadBook(clock=clock, in_flight={})
    for name in (R0, r1):
        book.record(replace(report(1, running=1), replica_id=name))
    view, other = book.view(), book.view().loads[r1]
    clock.advance(VIEW_PERIOD_S / 2)
    book.record(report(2, running=7))
    assert book.view() is book.last_view is view
    assert (running(book), view.loads[r1]) == (7, other)
    clock.advance(VIEW_PERIOD_S / 2)
    assert (running(book), book.view().loads[r1]) == (7, other)
    assert book.view().now_s - view.now_s == VIEW_PERIOD_S


def test_leases_and_peers_are_in_the_view() -> None:
    leased = {R0: 2}
    book = LoadBook(clock=ManualClock(), in_flight={R0: 1}, leased=leased)
    book.record(replace(report(1, running=4), routers=3, starts_per_s=2.0, token_s=0.1, output_tokens=7.0))
    view = book.view()
    load = view.loads[R0]
    assert load is not None
    assert (load.routers, load.starts_per_s, load.token_s, load.output_tokens) == (3, 2.0, 0.1, 7.0)
    assert view.peers == 2
    assert view.sent_since(load) == 6
    leased[R0] = 0
    assert view.sent_since(load) == 0


def test_a_replica_that_left_is_forgotten() -> None:
    book = LoadBook(clock=ManualClock(), in_flight={})
    book.record(report(1))
    book.forget(R0)
    assert R0 not in book.view().loads
    assert book.record(report(1))


def test_backoff_grows_to_a_bound_with_jitter_and_resets() -> None:
    backoff = Backoff(Random(0), first_s=0.1, max_s=1.0)
    delays = [backoff.next_s() for _ in range(20)]
    assert 0.05 <= delays[0] <= 0.1
    assert all(0.5 <= delay <= 1.0 for delay in delays[5:])
    assert len(set(delays[5:])) > 1
    backoff.reset()
    assert backoff.next_s() <= 0.1

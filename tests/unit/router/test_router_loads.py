"""Load reports: newer ones only, and none that is too old."""

from random import Random

import pytest

from loraserve.clock import ManualClock
from loraserve.router.backoff import Backoff
from loraserve.router.loads import STALE_AFTER_S, VIEW_PERIOD_S, LoadBook
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
    load = book.view().loads[R0]
    assert load is not None
    assert load.age_s == pytest.approx(0.5)


def test_the_routers_own_requests_are_not_counted_twice() -> None:
    in_flight = {R0: 3}
    book = LoadBook(clock=ManualClock(), in_flight=in_flight)
    book.record(report(1, running=4, waiting=1))
    in_flight[R0] = 0
    load = book.view().loads[R0]
    assert load is not None
    assert load.others == 2


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

"""How adapters are served, added up by the controller from reports that may be lost, late or repeated."""

from pathlib import Path
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from loraserve.client import Client
from loraserve.clock import ManualClock
from loraserve.controller.served import BUCKET_S, WINDOW_S, ServiceBook
from loraserve.engines.description import ReplicaReport, ServiceTotals
from loraserve.request import SamplingParams
from loraserve.samples import SampleSet
from placement.types import ReplicaId, VersionId
from tests.support.local_cluster import local_cluster

R0, R1 = ReplicaId("replica-0"), ReplicaId("replica-1")
A, B = VersionId("a@1"), VersionId("b@1")
NOTHING = ServiceTotals()


def said(sequence: int, incarnation: str = "x", **service: tuple[int, int, int]) -> ReplicaReport:
    return ReplicaReport(
        running=0,
        waiting=0,
        kv_cache_usage=0.0,
        resident=(),
        resident_bytes=0,
        incarnation=incarnation,
        sequence=sequence,
        service={VersionId(f"{name}@1"): totals(*row) for name, row in service.items()},
    )


def totals(requests: int, in_slo: int, cold_misses: int) -> ServiceTotals:
    return ServiceTotals(requests=requests, in_slo=in_slo, cold_misses=cold_misses)


@given(
    served=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20),
    seed=st.integers(0, 1000),
)
def test_lost_and_repeated_reports_lose_nothing_that_a_later_one_says(
    served: list[tuple[int, int]], seed: int
) -> None:
    book, random = ServiceBook(ManualClock()), Random(seed)
    requests, cold, reports = 0, 0, []
    for sequence, (more, missed) in enumerate(served, start=1):
        requests, cold = requests + more, cold + missed
        reports.append(said(sequence, a=(requests, requests // 2, cold)))
    heard = [one for one in reports[:-1] if random.random() < 0.7]
    for report in [*heard, *random.sample(heard, len(heard)), reports[-1], *reports[:-1]]:
        book.heard(R0, report)
    assert book.total(A) == totals(requests, requests // 2, cold)
    if heard and heard[0].sequence == 1:
        assert book.recent(A) == book.total(A)


def test_lives_and_replicas_add_up_and_what_was_before_this_controller_is_not_recent() -> None:
    book = ServiceBook(ManualClock())
    book.heard(R0, said(7, a=(10, 9, 1)))
    book.heard(R0, said(8, a=(12, 10, 1)))
    book.heard(R0, said(1, "y", a=(2, 2, 2)))
    book.heard(R1, said(1, "z", a=(1, 1, 0), b=(5, 5, 5)))
    assert book.total(A) == totals(15, 13, 3)
    assert book.recent(A) == totals(5, 4, 2)
    # A replica that has forgotten the version counts it anew.
    book.heard(R1, said(2, "z", b=(1, 0, 0)))
    assert book.total(B) == totals(6, 5, 5)
    book.keep_only([A])
    assert book.total(B) == NOTHING


def test_what_is_recent_is_forgotten() -> None:
    clock = ManualClock()
    book = ServiceBook(clock)
    for sequence in range(1, 100):
        book.heard(R0, said(sequence, a=(sequence, sequence, 0)))
        clock.advance(BUCKET_S)
    assert book.total(A).requests == 99
    assert WINDOW_S / BUCKET_S - 1 <= book.recent(A).requests <= WINDOW_S / BUCKET_S + 1
    clock.advance(WINDOW_S)
    assert book.recent(A) == NOTHING


async def test_requests_are_counted_alike_through_a_router_and_by_look_aside(
    tmp_path: Path, samples: SampleSet
) -> None:
    name = sorted(samples.adapters)[0]
    # Targets that a busy machine meets too.
    loose = {"slo": {"ttft_ms": 30_000.0, "tbt_ms": 30_000.0}}
    async with local_cluster(tmp_path, samples, sections=loose) as cluster:
        for look_aside in (False, True):
            async with Client(cluster.address, look_aside=look_aside) as client:
                for _ in range(3):
                    await client.complete("hello", adapter=name, sampling=SamplingParams(max_tokens=2))
        async with Client(cluster.address) as client:
            status = await client.status()
        assert (status.router.completed, status.router.picks) == (3, 3)
    found = {adapter.name: adapter for adapter in status.adapters}
    mine = found.pop(name)
    assert (mine.requests, mine.in_slo) == (6, 6)
    assert (mine.recent_requests, mine.recent_in_slo) == (6, 6)
    # The first one at each of the two replicas found its adapter in no slot.
    assert 1 <= mine.cold_misses == mine.recent_cold_misses <= 2
    assert all(one.requests == one.cold_misses == 0 for one in found.values())

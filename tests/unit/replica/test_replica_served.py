"""How a replica counts what it serves: inside its targets or not, and whether a copy was active."""

import asyncio
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.clock import ManualClock
from loraserve.engines.base import AdapterFiles
from loraserve.engines.description import ServiceTotals
from loraserve.errors import UnavailableError
from loraserve.replica.in_flight import Turn
from loraserve.replica.served import FORGET_S, ServiceCounts
from loraserve.request import FinishReason, GenerationRequest, GenerationStep
from loraserve.rpc.internal.v1 import internal_pb2
from placement.profile import Slo
from placement.types import VersionId
from tests.support.engine_kit import adapter
from tests.support.replica_bench import MakeBench, ReplicaBench, eventually, status_of_call

A, B = VersionId("a@0"), VersionId("b@0")
LOOSE = {"ttft_ms": 30_000.0, "tbt_ms": 30_000.0}
"""Targets that a busy machine meets too."""

USUAL = Slo(ttft_ms=1000.0, tbt_ms=100.0)
TOKEN = GenerationStep(token_ids=(1,), text="", prompt_tokens=1, output_tokens=1)
LAST = GenerationStep(
    token_ids=(1,), text="", prompt_tokens=1, output_tokens=1, finish_reason=FinishReason.STOP
)


def request(version: VersionId | None = A, *, resumed: int = 0) -> GenerationRequest:
    return GenerationRequest(
        request_id="q", prompt="hello", version_id=version, resumed_token_ids=(1,) * resumed
    )


def serve(
    counts: ServiceCounts,
    clock: ManualClock,
    ttft_ms: float,
    gaps_ms: list[float],
    *,
    waited_s: float = 0.0,
    **options: int,
) -> None:
    with counts.begin(request(**options), waited_s=waited_s) as served:  # type: ignore[arg-type]
        for gap_ms in [ttft_ms, *gaps_ms]:
            clock.advance(gap_ms / 1e3)
            served.step(TOKEN)
        served.step(LAST)


@given(
    ttft_ms=st.integers(0, 2000),
    waited_ms=st.integers(0, 500),
    gaps_ms=st.lists(st.sampled_from([5.0, 250.0]), max_size=60),
)
def test_a_request_is_inside_its_targets_by_its_first_token_and_by_its_gaps(
    ttft_ms: int, waited_ms: int, gaps_ms: list[float]
) -> None:
    clock = ManualClock()
    counts = ServiceCounts(clock, USUAL)
    serve(counts, clock, ttft_ms + 0.5, gaps_ms, waited_s=waited_ms / 1e3)
    # The last step comes with no time between.
    late = sum(gap > 100 for gap in gaps_ms)
    inside = ttft_ms + 0.5 + waited_ms <= 1000 and late * 20 <= len(gaps_ms) + 1
    assert counts.totals([]) == {A: ServiceTotals(requests=1, in_slo=int(inside))}


def test_a_version_may_have_targets_of_its_own() -> None:
    clock = ManualClock()
    counts = ServiceCounts(clock, USUAL)
    counts.set_slo(A, Slo(ttft_ms=50.0, tbt_ms=100.0))
    serve(counts, clock, 60.0, [])
    serve(counts, clock, 60.0, [], version=B)  # type: ignore[arg-type]
    counts.set_slo(A, None)
    serve(counts, clock, 60.0, [])
    assert counts.totals([]) == {
        A: ServiceTotals(requests=2, in_slo=1),
        B: ServiceTotals(requests=1, in_slo=1),
    }


@pytest.mark.parametrize(
    ("how", "ttft_ms", "expected"),
    [
        (UnavailableError("goes on elsewhere"), 5000.0, {}),
        (asyncio.CancelledError(), 10.0, {}),
        (asyncio.CancelledError(), 5000.0, {A: ServiceTotals(requests=1)}),
        (GeneratorExit(), 5000.0, {A: ServiceTotals(requests=1)}),
    ],
)
def test_one_without_a_first_token_counts_only_if_its_client_gave_up_too_late(
    how: BaseException, ttft_ms: float, expected: dict[VersionId, ServiceTotals]
) -> None:
    clock = ManualClock()
    counts = ServiceCounts(clock, USUAL)
    with suppress(UnavailableError, asyncio.CancelledError, GeneratorExit), counts.begin(request()):
        clock.advance(ttft_ms / 1e3)
        raise how
    assert counts.totals([]) == expected


def test_what_goes_on_here_was_counted_where_it_began() -> None:
    clock = ManualClock()
    counts = ServiceCounts(clock, USUAL)
    serve(counts, clock, 5.0, [5.0], resumed=3)
    serve(counts, clock, 5.0, [5.0], version=None)  # type: ignore[arg-type]
    assert counts.totals([]) == {}
    with counts.begin(request(resumed=3), is_cold=True):
        pass
    assert counts.totals([]) == {A: ServiceTotals(cold_misses=1)}


def test_what_was_turned_away_counts_and_what_is_gone_for_long_is_forgotten() -> None:
    clock = ManualClock()
    counts = ServiceCounts(clock, USUAL)
    counts.refused(A)
    counts.refused(B)
    clock.advance(FORGET_S + 1)
    assert counts.totals([A]) == {A: ServiceTotals(requests=1)}
    counts.refused(B)
    assert counts.totals([A])[B] == ServiceTotals(requests=1)


# -- over real gRPC ----------------------------------------------------------------------------


async def test_a_request_misses_when_its_adapter_has_no_slot_or_its_router_knew_no_holder(
    make_bench: MakeBench,
) -> None:
    bench = await make_bench(engine={"adapter_slots": 1}, slo=LOOSE)
    await bench.server.load_adapter(adapter("a"))
    await bench.server.load_adapter(adapter("b"))
    for name in ("a", "a", "b", "a"):
        await status_of_call(bench.execute(f"{name}@0", version=f"{name}@0", max_tokens=2))
    message = bench.message("late", version=A, max_tokens=2)
    message.has_missed, message.waited_s = True, 60.0
    await status_of_call(bench.router.call(message))
    await status_of_call(bench.execute("base", max_tokens=2))
    assert (await bench.server.report()).service == {
        A: ServiceTotals(requests=4, in_slo=3, cold_misses=3),
        B: ServiceTotals(requests=1, in_slo=1, cold_misses=1),
    }
    assert (await bench.server.report()).slots.active == 1


async def test_a_request_that_waits_for_a_slot_misses_once(make_bench: MakeBench) -> None:
    bench = await make_bench(engine={"adapter_slots": 1}, slo=LOOSE)
    await bench.server.load_adapter(adapter("a"))
    await bench.server.load_adapter(adapter("b"))
    first = await bench.running("first", version=A)
    second = bench.execute("second", version=B, max_tokens=2)
    await eventually(lambda: bench.server.service.totals([]).get(B) == ServiceTotals(cold_misses=1))
    first.cancel()
    await bench.engine.allow()
    await status_of_call(second)
    assert (await bench.server.report()).service[B] == ServiceTotals(requests=1, in_slo=1, cold_misses=1)


async def test_a_request_that_its_client_brings_itself_is_counted_from_when_it_was_picked(
    make_bench: MakeBench,
) -> None:
    bench = await make_bench(slo=LOOSE)
    await bench.server.load_adapter(adapter("a"))
    bench.server.leases.grant("one", A, 5.0, lambda _: None, waited_s=60.0, has_missed=True)
    bench.server.leases.grant("two", A, 5.0, lambda _: None)
    for lease in ("one", "two", "unknown yet"):
        steps = bench.server.generate(request(), Turn(lease_id=lease))
        assert [step async for step in steps]
    assert (await bench.server.report()).service == {A: ServiceTotals(requests=3, in_slo=2, cold_misses=1)}


async def test_a_refusal_that_a_router_tells_counts_as_outside(bench: ReplicaBench) -> None:
    await bench.server.load_adapter(adapter("a"))
    bench.router.link.tell_refusal(internal_pb2.Refusal(version_id=A, prompt_tokens=3, max_tokens=4))
    await eventually(lambda: bench.server.service.totals([]) == {A: ServiceTotals(requests=1)})


async def test_a_resident_version_that_is_loaded_again_takes_the_new_targets(bench: ReplicaBench) -> None:
    files = adapter("a")
    await bench.server.load_adapter(files)
    tight = AdapterFiles(
        version_id=files.version_id,
        directory=files.directory,
        rank=files.rank,
        size_bytes=files.size_bytes,
        slo=Slo(ttft_ms=1e-6, tbt_ms=1.0),
    )
    await bench.server.load_adapter(tight)
    await status_of_call(bench.execute("q", version=A, max_tokens=2))
    assert (await bench.server.report()).service[A].in_slo == 0

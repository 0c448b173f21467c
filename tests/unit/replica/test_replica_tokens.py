"""What a replica counts of the tokens it serves, over real gRPC and by itself."""

import asyncio
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.clock import ManualClock
from loraserve.errors import UnavailableError
from loraserve.replica.tokens import FORGET_S, TokenCounts
from loraserve.request import FinishReason, GenerationRequest, GenerationStep, SamplingParams
from loraserve.rpc.internal.v1 import internal_pb2
from placement.types import VersionId
from tests.support.engine_kit import adapter
from tests.support.replica_bench import ReplicaBench, eventually, status_of_call

A, B = VersionId("a@0"), VersionId("b@0")


async def test_prompt_and_output_tokens_are_counted_by_version_and_only_grow(bench: ReplicaBench) -> None:
    await bench.server.load_adapter(adapter("a"))
    await bench.server.load_adapter(adapter("b"))
    first = await bench.server.report()
    assert (first.sequence, first.incarnation, first.tokens) == (1, bench.server.incarnation, {})
    whole = await bench.execute("q1", unary=True, version=A, max_tokens=5)
    await status_of_call(bench.execute("q2", version=A, max_tokens=7))
    await status_of_call(bench.execute("q3", version=B, max_tokens=3))
    await status_of_call(bench.execute("q4", max_tokens=11))  # the base model's
    second = await bench.server.report()
    assert second.sequence == 2
    assert second.tokens == {A: 2 * whole.prompt_tokens + 12, B: whole.prompt_tokens + 3}
    assert first.tokens == {}


async def test_a_request_that_is_cancelled_after_its_first_token_counts_as_what_it_was_served(
    bench: ReplicaBench,
) -> None:
    await bench.server.load_adapter(adapter("a"))
    call = await bench.running("q", version=A, max_tokens=50)
    counted = (await bench.server.report()).tokens[A]
    assert counted > 50
    call.cancel()
    await eventually(lambda: bench.engine.load().running == 0)
    assert (await bench.server.report()).tokens == {A: counted}
    await bench.engine.allow()
    # What was expected of the first, and did not come, is made up for by what comes next.
    whole = await bench.execute("r", unary=True, version=A, max_tokens=40)
    assert counted <= (await bench.server.report()).tokens[A] < counted + 40 + whole.prompt_tokens


async def test_what_waits_counts_before_it_is_served(bench: ReplicaBench) -> None:
    await bench.server.load_adapter(adapter("a"))
    await bench.server.load_adapter(adapter("b"))
    await bench.running("q", version=A)
    calls = [bench.execute(f"w{index}", version=B, max_tokens=100) for index in range(20)]
    await eventually(lambda: bench.server.tokens.totals([]).get(B, 0) >= 2000)
    for call in calls:
        call.cancel()
    await eventually(lambda: len(bench.server.in_flight()) == 1)
    # Nobody served them, and they were asked for.
    assert (await bench.server.report()).tokens[B] >= 2000


async def test_a_request_that_a_router_turned_away_counts_at_a_holder(bench: ReplicaBench) -> None:
    await bench.server.load_adapter(adapter("a"))
    refusal = internal_pb2.Refusal(version_id=A, prompt_tokens=30, max_tokens=12)
    bench.router.link.tell_refusal(refusal)
    await bench.execute("q", unary=True, version="")
    await eventually(lambda: bench.server.tokens.totals([]) == {A: 42})


def _request(version: VersionId, max_tokens: int, resumed: tuple[int, ...] = ()) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=max_tokens)
    return GenerationRequest(
        request_id="q", prompt=(1,) * 20, version_id=version, sampling=sampling, resumed_token_ids=resumed
    )


def _step(num_tokens: int, *, last: bool = False) -> GenerationStep:
    return GenerationStep(
        token_ids=(7,) * num_tokens,
        text="",
        prompt_tokens=20,
        output_tokens=num_tokens,
        finish_reason=FinishReason.STOP if last else None,
    )


def test_a_request_that_goes_on_here_counts_without_its_prompt() -> None:
    counts = TokenCounts(ManualClock())
    with counts.begin(_request(A, 5)) as begun, counts.begin(_request(B, 7, resumed=(1, 2))) as gone_on:
        for num_tokens in (1, 4):
            begun.step(_step(num_tokens))
            gone_on.step(_step(num_tokens))
    assert counts.totals([]) == {A: 25, B: 5}


def test_outputs_are_expected_to_be_as_long_as_those_before() -> None:
    counts = TokenCounts(ManualClock())
    with counts.begin(_request(A, 100)) as first:
        first.step(_step(10, last=True))
    assert counts.totals([]) == {A: 120}
    for _ in range(4):
        with counts.begin(_request(A, 100)):
            pass
    with counts.begin(_request(A, 100)) as last:
        # 30 for the first as it was, nothing for the four, 30 for this one: less than was said before.
        assert counts.totals([]) == {A: 120}
        last.step(_step(200))
        assert counts.totals([]) == {A: 250}


@pytest.mark.parametrize(("end", "counted"), [(asyncio.CancelledError, 100), (UnavailableError, 10)])
def test_what_goes_on_elsewhere_before_its_first_token_counts_there_and_what_is_given_up_counts_here(
    end: type[BaseException], counted: int
) -> None:
    counts = TokenCounts(ManualClock())
    counts.add(A, 10)
    with suppress(end), counts.begin(_request(A, 70)):
        raise end("it ends")
    counts.add(A, 90)
    assert counts.totals([]) == {A: 90 + counted}


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 80), st.sampled_from(["end", "cancel", "move"])))
)
def test_counts_never_fall_and_are_at_least_what_was_served(requests: list[tuple[int, int, str]]) -> None:
    counts, said, served = TokenCounts(ManualClock()), 0, 0
    ends = {"cancel": asyncio.CancelledError, "move": UnavailableError}
    for max_tokens, drawn, way in requests:
        with suppress(*ends.values()), counts.begin(_request(A, max_tokens)) as one:
            if drawn:
                one.step(_step(drawn, last=way == "end"))
                served += 20 + drawn
            if way in ends:
                raise ends[way]
        now = counts.totals([]).get(A, 0)
        assert now >= max(said, served)
        said = now


def test_what_is_neither_held_nor_served_for_long_is_left_out_and_begins_anew() -> None:
    clock = ManualClock()
    counts = TokenCounts(clock)
    counts.add(A, 10)
    counts.add(B, 10)
    clock.advance(FORGET_S)
    assert counts.totals([B]) == {A: 10, B: 10}
    clock.advance(1.0)
    assert counts.totals([B]) == {B: 10}
    counts.add(A, 2)
    assert counts.totals([]) == {A: 2}

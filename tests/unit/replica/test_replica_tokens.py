"""What a replica counts of the tokens it serves, over real gRPC and by itself."""

from loraserve.clock import ManualClock
from loraserve.replica.tokens import FORGET_S, TokenCounts
from loraserve.request import GenerationRequest, GenerationStep
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


async def test_a_request_that_is_cancelled_counts_with_what_it_was_served(bench: ReplicaBench) -> None:
    await bench.server.load_adapter(adapter("a"))
    call = await bench.running("q", version=A)
    counted = (await bench.server.report()).tokens[A]
    call.cancel()
    await eventually(lambda: bench.engine.load().running == 0)
    assert (await bench.server.report()).tokens == {A: counted}
    assert counted > 1


def _step(num_tokens: int) -> GenerationStep:
    return GenerationStep(token_ids=(7,) * num_tokens, text="", prompt_tokens=20, output_tokens=num_tokens)


def test_a_request_that_goes_on_here_counts_without_its_prompt() -> None:
    counts = TokenCounts(ManualClock())
    begun = counts.begin(GenerationRequest(request_id="q", prompt="", version_id=A))
    gone_on = counts.begin(
        GenerationRequest(request_id="r", prompt="", version_id=B, resumed_token_ids=(1, 2))
    )
    for num_tokens in (1, 4):
        begun.step(_step(num_tokens))
        gone_on.step(_step(num_tokens))
    assert counts.totals([]) == {A: 25, B: 5}


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

"""More adapters than slots: who waits gets a slot or goes without a trace, and nobody's tokens change."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest
import pytest_asyncio

from loraserve.errors import NotFoundError, StaleError
from loraserve.request import FinishReason, GenerationRequest, GenerationStep
from tests.support.replica_bench import eventually
from tests.support.vllm_bench import PROMPTS, Answer, Bench

pytestmark = pytest.mark.asyncio(loop_scope="session")

LONG = 300
PATIENCE_S = 20.0
RUNNING = ("rank-8", "rank-16", "rank-32")
WAITING = "rank-64"
References = Mapping[str, Sequence[list[int]]]


@pytest_asyncio.fixture(loop_scope="session")
async def full(bench: Bench) -> AsyncIterator[Bench]:
    """Every slot has a request that runs for a long time; all of them still run when the test ends."""
    streams = [bench.engine.generate(bench.request(adapter=name, max_tokens=LONG)) for name in RUNNING]
    await asyncio.gather(*(anext(stream) for stream in streams))
    yield bench
    admitted = {slot.version_id: slot.num_admitted for slot in bench.slots.slots}
    assert admitted == {bench.versions[name]: 1 for name in RUNNING}
    assert not bench.slots.waiting
    for stream in streams:
        await stream.aclose()


async def in_line(bench: Bench, request: GenerationRequest) -> "asyncio.Task[GenerationStep]":
    """The request's first step, once the request stands in line for a slot."""
    first = asyncio.create_task(anext(bench.engine.generate(request)))
    assert request.version_id is not None
    for _ in range(100):
        if request.version_id in bench.slots.waiting:
            return first
        await asyncio.sleep(0)
    raise AssertionError(f"the request does not wait: {bench.slots}")


async def test_a_request_aborted_while_it_waits_ends_at_once(full: Bench) -> None:
    request = full.request(adapter=WAITING)
    first = await in_line(full, request)
    await full.engine.abort(request.request_id)
    step = await asyncio.wait_for(first, PATIENCE_S)
    assert (step.finish_reason, step.output_tokens, step.token_ids) == (FinishReason.ABORTED, 0, ())


async def test_a_request_aborted_before_it_waits_never_does(full: Bench) -> None:
    """While its text is tokenised off the loop."""
    request = full.request("morning " * 300, adapter=WAITING)
    stream = full.engine.generate(request)
    first = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    await full.engine.abort(request.request_id)
    step = await asyncio.wait_for(first, PATIENCE_S)
    assert step.finish_reason is FinishReason.ABORTED
    await stream.aclose()


async def test_a_consumer_cancelled_while_its_request_waits_leaves_nothing(full: Bench) -> None:
    first = await in_line(full, full.request(adapter=WAITING))
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_version_that_a_request_waits_for_stays(full: Bench) -> None:
    request = full.request(adapter=WAITING)
    first = await in_line(full, request)
    for name in (WAITING, *RUNNING):
        with pytest.raises(StaleError, match="1 requests still use it"):
            await full.engine.unload_adapter(full.versions[name])
    await full.engine.abort(request.request_id)
    await first


async def test_who_waits_gets_the_first_slot_that_comes_free(bench: Bench, references: References) -> None:
    streams = {
        name: bench.engine.generate(bench.request(PROMPTS[-1], name, max_tokens=LONG)) for name in RUNNING
    }
    await asyncio.gather(*(anext(stream) for stream in streams.values()))
    stream = bench.engine.generate(bench.request(PROMPTS[1], WAITING))
    waiting = asyncio.create_task(drained(stream))
    await streams.pop("rank-16").aclose()
    assert (await asyncio.wait_for(waiting, PATIENCE_S)).token_ids == references[WAITING][1]
    held = {slot.version_id for slot in bench.slots.slots}
    assert held == {bench.versions[name] for name in ("rank-8", "rank-32", WAITING)}
    for one in streams.values():
        await one.aclose()


async def drained(stream: AsyncIterator[GenerationStep], answer: Answer | None = None) -> Answer:
    """The answer with the rest of the stream."""
    answer = answer or Answer()
    async for step in stream:
        answer.steps.append(step)
    return answer


@pytest.mark.parametrize("ticks", range(4))
async def test_a_version_unloaded_beside_a_request_for_another_gives_its_slot_up_first(
    bench: Bench, references: References, ticks: int
) -> None:
    for name in RUNNING:
        await bench.ask(adapter=name, max_tokens=1)
    unload = asyncio.create_task(bench.engine.unload_adapter(bench.versions["rank-8"]))
    for _ in range(ticks):
        await asyncio.sleep(0)
    answer = await asyncio.wait_for(bench.ask(PROMPTS[0], WAITING), PATIENCE_S)
    await asyncio.wait_for(unload, PATIENCE_S)
    assert answer.token_ids == references[WAITING][0]
    with pytest.raises(NotFoundError):
        await bench.ask(adapter="rank-8")
    await bench.engine.load_adapter(bench.files("rank-8"))


@pytest.mark.parametrize("adapters", [("rank-8", "rank-16", "rank-128"), ("rank-128", "rank-64", "rank-32")])
async def test_long_prompts_join_a_batch_that_is_decoding(
    bench: Bench, references: References, adapters: Sequence[str]
) -> None:
    """Rows of one adapter are apart then: a few that decode, and many of a prompt that begins or goes on."""
    names = ("", *adapters)
    streams = [bench.engine.generate(bench.request(PROMPTS[0], name or None)) for name in names]
    begun = [Answer([await anext(stream)]) for stream in streams]
    answers = await asyncio.gather(
        *(drained(stream, answer) for stream, answer in zip(streams, begun, strict=True)),
        *(bench.ask(PROMPTS[-1], name or None) for name in names),
        *(bench.ask(PROMPTS[2], name or None) for name in reversed(names)),
    )
    found = [answer.token_ids for answer in answers]
    expected = [references[name][0] for name in names]
    expected += [references[name][-1] for name in names]
    expected += [references[name][2] for name in reversed(names)]
    assert found == expected


async def test_a_slot_costs_what_its_rank_costs(bench: Bench) -> None:
    others = [name for name in bench.versions if name != "rank-16"]
    for name in others:
        await bench.engine.unload_adapter(bench.versions[name])
    try:
        assert (await bench.ask(adapter="rank-16", max_tokens=1)).token_ids
        # No request waits until the workers have told what the slots take.
        await eventually(lambda: bench.engine.slot_memory().active == 1)
        memory = bench.engine.slot_memory()
    finally:
        for name in others:
            await bench.engine.load_adapter(bench.files(name))
    # Three slots at rank 128 against one adapter of rank 16, in the model's data type.
    assert memory.used_bytes == memory.allocated_bytes == memory.padded_bytes // 3 // 8

"""The emulated engine keeps the Engine protocol, deterministically and without leaks."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.config import EmulatedSection
from loraserve.engines.base import EngineLoad
from loraserve.engines.emulated import EmulatedEngine
from loraserve.engines.virtual import VirtualTime
from loraserve.errors import (
    AdapterRejectedError,
    AlreadyExistsError,
    BadInputError,
    ConfigError,
    EngineDeadError,
    NotFoundError,
    OverloadedError,
    WorkFailedError,
)
from loraserve.request import FinishReason
from placement.types import VersionId
from tests.support.engine_kit import adapter, collect, engine_on, reason_of, request, text_of, tokens_of

IDLE = EngineLoad(running=0, waiting=0, kv_cache_usage=0.0)


@pytest.fixture
def time() -> VirtualTime:
    return VirtualTime()


@pytest.fixture
async def engine(time: VirtualTime) -> AsyncIterator[EmulatedEngine]:
    engine = engine_on(time, pool_adapters=2, max_num_seqs=4, max_model_len_tokens=256)
    await engine.start()
    yield engine
    engine.check_invariants()
    assert engine.load() == IDLE
    await engine.close()


async def test_the_same_request_gives_the_same_tokens_whatever_runs_beside_it(
    engine: EmulatedEngine, time: VirtualTime
) -> None:
    alone = await time.run(collect(engine, request("alone", max_tokens=20, seed=1)))
    crowd = [request(f"other {i}", f"prompt {i}", max_tokens=30) for i in range(7)]
    together = await time.run(
        asyncio.gather(
            *(collect(engine, one) for one in crowd), collect(engine, request("x", max_tokens=20, seed=1))
        )
    )
    assert tokens_of(together[-1]) == tokens_of(alone)
    assert len(tokens_of(alone)) == 20


async def test_tokens_depend_on_version_prompt_and_seed(engine: EmulatedEngine, time: VirtualTime) -> None:
    await time.run(engine.load_adapter(adapter("a")))
    await time.run(engine.load_adapter(adapter("b")))
    requests = [
        request("1", max_tokens=16),
        request("2", "hallo", max_tokens=16),
        request("3", max_tokens=16, seed=7),
        request("4", version="a@0", max_tokens=16),
        request("5", version="b@0", max_tokens=16),
    ]
    answers = [tokens_of(await time.run(collect(engine, one))) for one in requests]
    assert len({tuple(answer) for answer in answers}) == 5
    greedy = [
        tokens_of(
            await time.run(collect(engine, request(str(seed), max_tokens=9, temperature=0.0, seed=seed)))
        )
        for seed in (1, 2)
    ]
    assert greedy[0] == greedy[1], "greedy decoding does not look at the seed"


async def test_an_answer_is_resumed_from_its_prompt_and_its_tokens_so_far(
    engine: EmulatedEngine, time: VirtualTime
) -> None:
    prompt = tuple(b"some prompt")
    whole = tokens_of(await time.run(collect(engine, request("w", prompt, max_tokens=24))))
    rest = await time.run(collect(engine, request("r", prompt + tuple(whole[:10]), max_tokens=14)))
    assert tokens_of(rest) == whole[10:]


async def test_time_follows_the_latency_model(time: VirtualTime) -> None:
    latency = EmulatedSection(base_step_ms=10, prefill_token_ms=1, decode_seq_ms=0, rank_seq_ms=0, speed=1)
    engine = engine_on(time, latency)
    await engine.start()
    start_s = time.now_s()
    await time.run(collect(engine, request("a", (1, 2, 3, 4, 5), max_tokens=3)))
    assert time.now_s() - start_s == pytest.approx(0.015 + 0.010 + 0.010)
    await engine.close()


async def test_high_ranks_slow_the_others_down(engine: EmulatedEngine, time: VirtualTime) -> None:
    await time.run(engine.load_adapter(adapter("low", rank=8)))
    await time.run(engine.load_adapter(adapter("high", rank=128)))

    async def seconds(beside: str) -> float:
        start_s = time.now_s()
        await time.run(
            asyncio.gather(
                collect(engine, request("1", version="low@0", max_tokens=10)),
                collect(engine, request("2", version=beside, max_tokens=10)),
            )
        )
        return time.now_s() - start_s

    assert await seconds("high@0") > 1.05 * await seconds("low@0")


async def test_loading_takes_as_long_as_the_bytes_take(time: VirtualTime) -> None:
    engine = engine_on(time, EmulatedSection(load_bytes_per_s=1000))
    await engine.start()
    start_s = time.now_s()
    await time.run(engine.load_adapter(adapter("a", size_bytes=500)))
    assert time.now_s() - start_s == pytest.approx(0.5)
    assert await engine.resident() == {VersionId("a@0")}
    await engine.close()


async def test_a_version_is_unknown_until_it_is_loaded_and_after_it_is_unloaded(
    engine: EmulatedEngine, time: VirtualTime
) -> None:
    with pytest.raises(NotFoundError, match="a@0"):
        await time.run(collect(engine, request("1", version="a@0")))
    await time.run(engine.load_adapter(adapter("a")))
    assert len(tokens_of(await time.run(collect(engine, request("2", version="a@0", max_tokens=2))))) == 2
    await engine.unload_adapter(VersionId("a@0"))
    await engine.unload_adapter(VersionId("a@0"))
    with pytest.raises(NotFoundError):
        await time.run(collect(engine, request("3", version="a@0")))


async def test_the_pool_is_bounded_for_loads_under_way_too(engine: EmulatedEngine, time: VirtualTime) -> None:
    loads = [engine.load_adapter(adapter(name)) for name in ("a", "b", "c", "a")]
    results = await time.run(asyncio.gather(*loads, return_exceptions=True))
    assert [type(one) for one in results] == [type(None), type(None), OverloadedError, type(None)]
    assert await engine.resident() == {VersionId("a@0"), VersionId("b@0")}
    await engine.unload_adapter(VersionId("a@0"))
    await time.run(engine.load_adapter(adapter("c")))
    assert await engine.resident() == {VersionId("b@0"), VersionId("c@0")}


async def test_a_batch_holds_no_more_adapters_than_slots(time: VirtualTime) -> None:
    engine = engine_on(time, adapter_slots=1)
    await engine.start()
    for name in ("a", "b"):
        await time.run(engine.load_adapter(adapter(name)))
    first = engine.generate(request("1", version="a@0", max_tokens=50))
    await time.run(anext(first))
    second = asyncio.create_task(collect(engine, request("2", version="b@0", max_tokens=2)))
    base = await time.run(collect(engine, request("3", max_tokens=2)))
    assert len(tokens_of(base)) == 2, "the base model needs no slot"
    assert engine.load().waiting == 1
    engine.check_invariants()
    await first.aclose()
    assert len(tokens_of(await time.run(second))) == 2
    assert engine.load() == IDLE
    engine.check_invariants()
    await engine.close()


async def test_a_cancelled_load_leaves_no_trace(engine: EmulatedEngine, time: VirtualTime) -> None:
    task = asyncio.create_task(engine.load_adapter(adapter("a")))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    for name in ("b", "c"):
        await time.run(engine.load_adapter(adapter(name)))
    assert await engine.resident() == {VersionId("b@0"), VersionId("c@0")}


async def test_a_rank_above_the_engines_is_rejected(engine: EmulatedEngine, time: VirtualTime) -> None:
    with pytest.raises(AdapterRejectedError, match="256"):
        await time.run(engine.load_adapter(adapter("a", rank=256)))
    assert await engine.resident() == frozenset()


async def test_unloading_what_a_request_uses_is_refused(engine: EmulatedEngine, time: VirtualTime) -> None:
    await time.run(engine.load_adapter(adapter("a")))
    stream = engine.generate(request("1", version="a@0", max_tokens=50))
    await time.run(anext(stream))
    with pytest.raises(WorkFailedError, match="1 request"):
        await engine.unload_adapter(VersionId("a@0"))
    await stream.aclose()
    await engine.unload_adapter(VersionId("a@0"))


async def test_abort_ends_the_stream_and_frees_the_batch_at_once(
    engine: EmulatedEngine, time: VirtualTime
) -> None:
    stream = engine.generate(request("1", max_tokens=200))
    first = await time.run(anext(stream))
    await engine.abort("1")
    assert engine.load() == IDLE
    rest = [step async for step in stream]
    assert reason_of(rest) is FinishReason.ABORTED
    assert first.output_tokens <= rest[-1].output_tokens < 200
    await engine.abort("1")
    await engine.abort("nobody")


async def test_cancelling_the_reader_frees_everything(engine: EmulatedEngine, time: VirtualTime) -> None:
    reader = asyncio.create_task(collect(engine, request("1", max_tokens=200)))
    await time.run(time.sleep(0.05))
    assert engine.load().running == 1
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    assert engine.load() == IDLE


async def test_a_slow_reader_gets_merged_steps_in_order(engine: EmulatedEngine, time: VirtualTime) -> None:
    stream = engine.generate(request("slow", max_tokens=30))
    steps = [await time.run(anext(stream))]
    await time.run(time.sleep(10.0))
    steps += [step async for step in stream]
    assert len(steps) == 2
    fast = await time.run(collect(engine, request("fast", max_tokens=30)))
    assert (tokens_of(steps), text_of(steps)) == (tokens_of(fast), text_of(fast))


@pytest.mark.parametrize(
    "prompt", [(), "x" * 256, (258,), (-1,)], ids=["empty", "long", "unknown", "negative"]
)
async def test_prompts_that_the_model_cannot_take_are_refused(
    engine: EmulatedEngine, prompt: str | tuple[int, ...]
) -> None:
    with pytest.raises(BadInputError):
        await collect(engine, request("1", prompt))


async def test_an_answer_ends_where_the_model_ends(engine: EmulatedEngine, time: VirtualTime) -> None:
    steps = await time.run(collect(engine, request("1", (65,) * 250, max_tokens=100)))
    assert (len(tokens_of(steps)), reason_of(steps)) == (6, FinishReason.LENGTH)


async def test_a_request_id_in_use_is_refused(engine: EmulatedEngine, time: VirtualTime) -> None:
    stream = engine.generate(request("1", max_tokens=50))
    await time.run(anext(stream))
    with pytest.raises(AlreadyExistsError):
        await collect(engine, request("1"))
    await stream.aclose()


async def test_a_crash_fails_what_runs_and_everything_after(
    engine: EmulatedEngine, time: VirtualTime
) -> None:
    reader = asyncio.create_task(collect(engine, request("1", max_tokens=200)))
    await time.run(time.sleep(0.05))
    engine.crash("power cut")
    with pytest.raises(EngineDeadError, match="power cut"):
        await reader
    with pytest.raises(EngineDeadError):
        await engine.check()
    with pytest.raises(EngineDeadError):
        await collect(engine, request("2"))


async def test_close_fails_what_runs_and_may_be_called_twice(time: VirtualTime) -> None:
    engine = engine_on(time)
    await engine.start()
    reader = asyncio.create_task(collect(engine, request("1", max_tokens=200)))
    await time.run(time.sleep(0.05))
    await engine.close()
    await engine.close()
    with pytest.raises(EngineDeadError):
        await reader
    engine.check_invariants()


def test_a_kv_cache_too_small_for_one_request_is_refused(time: VirtualTime) -> None:
    with pytest.raises(ConfigError, match="kv_cache_bytes"):
        engine_on(time, kv_cache_bytes=4096 * 100, max_model_len_tokens=101)


SCRIPT = st.lists(
    st.tuples(
        st.floats(0, 0.2),
        st.sampled_from(["read", "abort", "cancel"]),
        st.integers(1, 60),
        st.integers(1, 60),
        st.sampled_from([None, "a@0", "b@0"]),
        st.floats(0, 0.3),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(script=SCRIPT, slots=st.integers(1, 4), adapters=st.integers(1, 2), budget=st.integers(8, 64))
def test_random_schedules_conserve_requests_and_do_not_change_answers(
    script: list[tuple[float, str, int, int, str | None, float]], slots: int, adapters: int, budget: int
) -> None:
    async def scenario() -> None:
        time = VirtualTime()
        engine = engine_on(
            time,
            max_num_seqs=slots,
            adapter_slots=adapters,
            max_num_batched_tokens=budget,
            max_model_len_tokens=128,
            kv_cache_bytes=128 * 4096,
        )
        await engine.start()
        for name in ("a", "b"):
            await time.run(engine.load_adapter(adapter(name)))

        async def one(index: int) -> tuple[int, ...] | None:
            start_s, ending, prompt_tokens, max_tokens, version, life_s = script[index]
            await time.sleep(start_s)
            name = str(index)
            asked = request(name, (65 + index,) * prompt_tokens, version, max_tokens=max_tokens)
            reader = asyncio.create_task(collect(engine, asked))
            if ending != "read":
                await time.sleep(life_s)
                if ending == "abort":
                    await engine.abort(name)
                else:
                    reader.cancel()
            engine.check_invariants()
            (result,) = await asyncio.gather(reader, return_exceptions=True)
            engine.check_invariants()
            if isinstance(result, BaseException) or reason_of(result) is FinishReason.ABORTED:
                assert ending != "read"
                return None
            assert len(tokens_of(result)) == max_tokens
            return tuple(tokens_of(result))

        answers = await time.run(asyncio.gather(*(one(index) for index in range(len(script)))))
        assert engine.load() == IDLE
        for index, answer in enumerate(answers):
            if answer is not None:
                _, _, prompt_tokens, max_tokens, version, _ = script[index]
                asked = request("again", (65 + index,) * prompt_tokens, version, max_tokens=max_tokens)
                assert tuple(tokens_of(await time.run(collect(engine, asked)))) == answer
        await engine.close()

    asyncio.run(scenario())

"""What a request asks for is what it gets, and whatever ends it releases all it held."""

import asyncio
import contextlib
from typing import Any

import pytest

from loraserve.errors import AlreadyExistsError, BadInputError
from loraserve.request import ChatTurn, FinishReason, GenerationRequest
from tests.support.vllm_bench import Answer, Bench

pytestmark = pytest.mark.asyncio(loop_scope="session")


LONG = 400


async def idle(bench: Bench) -> None:
    """Nothing in flight, and the next request works."""
    assert bench.engine.load().running + bench.engine.load().waiting == 0
    assert (await bench.ask(max_tokens=2)).last.output_tokens == 2


async def test_every_step_counts_on_and_the_last_one_says_why(bench: Bench) -> None:
    answer = await bench.ask(max_tokens=10)
    counts = [step.output_tokens for step in answer.steps]
    assert counts == sorted(counts)
    assert counts[-1] == len(answer.token_ids) == 10
    assert [step.finish_reason for step in answer.steps[:-1]] == [None] * (len(answer.steps) - 1)
    assert answer.last.finish_reason is FinishReason.LENGTH
    assert answer.last.prompt_tokens > 0


async def test_load_shows_what_is_in_flight(bench: Bench) -> None:
    streams = [bench.engine.generate(bench.request(max_tokens=LONG)) for _ in range(3)]
    await asyncio.gather(*(anext(stream) for stream in streams))
    await asyncio.gather(*(anext(stream) for stream in streams))
    load = bench.engine.load()
    assert load.running + load.waiting == 3
    assert load.running > 0
    assert load.kv_cache_usage > 0
    for stream in streams:
        await stream.aclose()
    await idle(bench)


async def test_abort_ends_the_stream_with_aborted(bench: Bench) -> None:
    request = bench.request(adapter="rank-8", max_tokens=LONG)
    steps = []
    async for step in bench.engine.generate(request):
        steps.append(step)
        if len(steps) == 2:
            await bench.engine.abort(request.request_id)
    assert steps[-1].finish_reason is FinishReason.ABORTED
    assert steps[-1].output_tokens < LONG
    await idle(bench)


async def test_an_unknown_request_is_aborted_without_error(bench: Bench) -> None:
    await bench.engine.abort("unknown")


async def test_abort_before_vllm_has_the_request(bench: Bench) -> None:
    """While a text of more than 2048 characters is tokenised off the loop."""
    request = bench.request("morning " * 300, max_tokens=LONG)
    stream = bench.engine.generate(request)
    first = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    assert bench.engine.load().waiting == 1
    await bench.engine.abort(request.request_id)
    assert (await first).finish_reason is FinishReason.ABORTED
    await stream.aclose()
    await idle(bench)


async def test_closing_the_stream_releases_everything(bench: Bench) -> None:
    stream = bench.engine.generate(bench.request(adapter="rank-16", max_tokens=LONG))
    await anext(stream)
    await stream.aclose()
    await idle(bench)


@pytest.mark.parametrize("after_steps", [0, 1, 3])
async def test_cancelling_the_consumer_releases_everything(bench: Bench, after_steps: int) -> None:
    started = asyncio.Event()
    seen = 0

    async def consume() -> None:
        nonlocal seen
        if after_steps == 0:
            started.set()
        async with contextlib.aclosing(
            bench.engine.generate(bench.request(adapter="rank-128", max_tokens=LONG))
        ) as stream:
            async for _ in stream:
                seen += 1
                if seen == after_steps:
                    started.set()

    task = asyncio.create_task(consume())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await idle(bench)


async def test_stop_strings_end_the_text_before_them(bench: Bench) -> None:
    full = (await bench.ask()).text
    stop = full[10:14]
    answer = await bench.ask(stop=(stop,))
    assert answer.last.finish_reason is FinishReason.STOP
    assert answer.last.stop_reason == stop
    assert answer.text == full[: full.index(stop)]


async def test_stop_token_ids(bench: Bench) -> None:
    full = (await bench.ask()).token_ids
    answer = await bench.ask(stop_token_ids=(full[5],))
    assert answer.last.finish_reason is FinishReason.STOP
    assert answer.last.stop_reason == str(full[5])
    assert answer.token_ids == full[: full.index(full[5]) + 1]


async def test_min_tokens_holds_a_stop_back(bench: Bench) -> None:
    stop = (await bench.ask()).token_ids[2]
    assert (await bench.ask(stop_token_ids=(stop,))).last.output_tokens <= 3
    held = await bench.ask(stop_token_ids=(stop,), min_tokens=8)
    assert held.last.output_tokens >= 8
    assert stop not in held.token_ids[:7]


async def test_ignore_eos(bench: Bench, eos: int) -> None:
    """Hot draws say the end token sooner or later; the same seed draws the same tokens up to it."""
    hot: dict[str, Any] = {"temperature": 2.0, "max_tokens": LONG}
    draws = await asyncio.gather(*(bench.ask(seed=seed, ignore_eos=True, **hot) for seed in range(16)))
    seed, ignored = next((seed, draw) for seed, draw in enumerate(draws) if eos in draw.token_ids)
    assert ignored.last.finish_reason is FinishReason.LENGTH
    stopped = await bench.ask(seed=seed, ignore_eos=False, **hot)
    assert stopped.last.finish_reason is FinishReason.STOP
    assert stopped.token_ids == ignored.token_ids[: ignored.token_ids.index(eos) + 1]


@pytest.fixture
def eos(bench: Bench) -> int:
    import json

    config = json.loads((bench.samples.model / "config.json").read_text())
    return int(config["eos_token_id"])


@pytest.mark.parametrize("count", [0, 3])
async def test_logprobs_per_token_the_chosen_one_first(bench: Bench, count: int) -> None:
    answer = await bench.ask(max_tokens=6, logprobs=count)
    positions = [position for step in answer.steps for position in step.logprobs]
    assert [position[0].token_id for position in positions] == answer.token_ids
    for position in positions:
        assert len(position) == max(1, count)  # greedy: the chosen token is among the likeliest
        assert [entry.rank for entry in position] == list(range(1, len(position) + 1))
        assert [entry.logprob for entry in position] == sorted((e.logprob for e in position), reverse=True)
        assert all(entry.logprob <= 0 for entry in position)
    assert "".join(position[0].text for position in positions) == answer.text


async def test_no_logprobs_unless_asked_for(bench: Bench) -> None:
    assert all(step.logprobs == () for step in (await bench.ask(max_tokens=3)).steps)


async def test_one_seed_draws_the_same_tokens_also_in_a_batch(bench: Bench) -> None:
    async def drawn(seed: int, adapter: str | None = None) -> Answer:
        return await bench.ask(adapter=adapter, temperature=1.0, seed=seed)

    alone = (await drawn(7)).token_ids
    together = await asyncio.gather(drawn(7), drawn(8), drawn(-7), drawn(7, "rank-64"), drawn(7))
    assert together[0].token_ids == together[4].token_ids == alone
    assert together[1].token_ids != alone
    assert together[2].token_ids != alone


async def test_penalties_and_cuts_reach_the_sampler(bench: Bench) -> None:
    greedy = (await bench.ask()).token_ids
    assert (await bench.ask(temperature=2.0, top_k=1, seed=1)).token_ids == greedy
    assert (await bench.ask(temperature=2.0, top_p=1e-9, seed=1)).token_ids == greedy
    assert (await bench.ask(temperature=2.0, min_p=1.0, seed=1)).token_ids == greedy
    assert (await bench.ask(repetition_penalty=50.0)).token_ids != greedy


async def test_a_prompt_is_text_or_ids_or_a_conversation(bench: Bench) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bench.samples.model)
    text = "The boat left"
    ids = tuple(tokenizer(text)["input_ids"])
    assert (await bench.ask(ids)).token_ids == (await bench.ask(text)).token_ids
    turns = (ChatTurn(role="user", content=text),)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    expected = await bench.ask(tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"]))
    request = bench.request()
    chat = await bench.answer(GenerationRequest(request_id="chat", prompt=turns, sampling=request.sampling))
    assert chat.token_ids == expected.token_ids
    assert chat.last.prompt_tokens == expected.last.prompt_tokens


async def test_a_prompt_must_leave_room_for_one_token(bench: Bench) -> None:
    with pytest.raises(BadInputError, match=r"512 tokens do not fit; the limit is 511 .*512"):
        await bench.ask((5,) * 512)
    answer = await bench.ask((5,) * 511)
    assert answer.last.output_tokens == 1
    assert answer.last.finish_reason is FinishReason.LENGTH


async def test_an_output_ends_where_the_model_ends(bench: Bench) -> None:
    answer = await bench.ask((5,) * 500, max_tokens=10_000)
    assert answer.last.finish_reason is FinishReason.LENGTH
    assert answer.last.prompt_tokens + answer.last.output_tokens == 512


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ((), {}, "no tokens"),
        ((5, 1_000_000), {}, "token id 1000000 is outside the vocabulary"),
        ((5, -1), {}, "token id -1 is outside the vocabulary"),
        ("x", {"temperature": -1.0}, "temperature"),
        ("x", {"temperature": float("nan")}, "temperature"),
        ("x", {"top_p": 0.0}, "top_p"),
        ("x", {"top_k": -2}, "top_k"),
        ("x", {"min_p": float("nan")}, "min_p"),
        ("x", {"presence_penalty": 3.0}, "presence_penalty"),
        ("x", {"max_tokens": 0}, "max_tokens"),
        ("x", {"min_tokens": 30}, "min_tokens"),
        ("x", {"logprobs": -1}, "logprobs"),
        ("x", {"logprobs": 1000}, "logprobs"),
        ("x", {"seed": 2**63}, "seed"),
        ("x", {"stop": ("",)}, "stop"),
        ("x", {"stop_token_ids": (1_000_000,), "min_tokens": 2}, "stop_token_ids"),
    ],
)
async def test_bad_values_are_refused_and_harm_nothing(
    bench: Bench, prompt: str | tuple[int, ...], sampling: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        await bench.ask(prompt, **sampling)
    await idle(bench)


async def test_a_request_id_is_in_flight_once(bench: Bench) -> None:
    request = bench.request(max_tokens=LONG)
    stream = bench.engine.generate(request)
    await anext(stream)
    with pytest.raises(AlreadyExistsError):
        await bench.answer(request)
    await stream.aclose()
    await idle(bench)

"""An output that is cut anywhere and resumed in vLLM is the uninterrupted output."""

import asyncio
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraserve.engines.vllm_resume import FreshWork, ResumedWork, vllm_work
from loraserve.errors import BadInputError
from loraserve.request import FinishReason, GenerationRequest, GenerationStep
from tests.support.vllm_bench import PROMPTS, Answer, Bench

SESSION = pytest.mark.asyncio(loop_scope="session")


async def check_every_cut(bench: Bench, whole: GenerationRequest, every: int = 1) -> Answer:
    """Resume after each so many steps of the uninterrupted answer, all at once, and compare."""
    expected = await bench.answer(whole)
    cuts = range(1, len(expected.steps), every)
    rests = await asyncio.gather(*(bench.answer(resumed(bench, whole, expected.steps[:cut])) for cut in cuts))
    for cut, rest in zip(cuts, rests, strict=True):
        before = Answer(expected.steps[:cut])
        assert before.token_ids + rest.token_ids == expected.token_ids
        assert before.text + rest.text == expected.text
        assert dataclasses.replace(rest.last, token_ids=(), text="") == dataclasses.replace(
            expected.last, token_ids=(), text=""
        )
        assert rest.steps[0].output_tokens == len(before.token_ids) + len(rest.steps[0].token_ids)
    return expected


def resumed(bench: Bench, whole: GenerationRequest, steps: Sequence[GenerationStep]) -> GenerationRequest:
    """The request for what comes after these steps."""
    return dataclasses.replace(
        whole,
        request_id=bench.request().request_id,
        resumed_token_ids=tuple(Answer(list(steps)).token_ids),
    )


@SESSION
@pytest.mark.parametrize("name", [None, "rank-8", "rank-128"])
async def test_a_resumed_greedy_answer_is_the_uninterrupted_one(bench: Bench, name: str | None) -> None:
    for prompt in PROMPTS[:2]:
        await check_every_cut(bench, bench.request(prompt, name), every=3)


@SESSION
async def test_a_stop_string_across_the_cut_ends_the_text_before_it(bench: Bench) -> None:
    steps = (await bench.ask()).steps
    stop = "".join(step.text for step in steps[8:13])
    answer = await check_every_cut(bench, bench.request(stop=("never €", stop)))
    assert (answer.last.finish_reason, answer.last.stop_reason) == (FinishReason.STOP, stop)
    assert len(answer.token_ids) < len(steps)
    assert not bench.engine._running().client.output_processor.has_unfinished_requests()


@SESSION
async def test_min_tokens_and_stop_tokens_count_the_output_so_far(bench: Bench) -> None:
    full = (await bench.ask()).token_ids
    answer = await check_every_cut(bench, bench.request(stop_token_ids=tuple(full[2:20]), min_tokens=12))
    assert answer.last.finish_reason is FinishReason.STOP
    assert len(answer.token_ids) >= 12


@SESSION
async def test_drawing_without_a_seed_goes_on_after_a_cut(bench: Bench) -> None:
    asked = bench.request(temperature=1.0, max_tokens=20)
    rest = await bench.answer(dataclasses.replace(asked, resumed_token_ids=(70,) * 15))
    assert (len(rest.token_ids), rest.last.output_tokens) == (5, 20)


@SESSION
@pytest.mark.parametrize(("max_tokens", "resumed_tokens"), [(8, 8), (8, 9), (1000, 502)])
async def test_nothing_is_left_to_say_at_the_limits(
    bench: Bench, max_tokens: int, resumed_tokens: int
) -> None:
    asked = bench.request((5,) * 10, max_tokens=max_tokens)
    answer = await bench.answer(dataclasses.replace(asked, resumed_token_ids=(70,) * resumed_tokens))
    assert answer.steps == [
        GenerationStep(
            token_ids=(),
            text="",
            prompt_tokens=10,
            output_tokens=resumed_tokens,
            finish_reason=FinishReason.LENGTH,
        )
    ]


@SESSION
async def test_the_model_length_counts_the_output_so_far(bench: Bench) -> None:
    asked = bench.request((5,) * 10, max_tokens=1000)
    answer = await bench.answer(dataclasses.replace(asked, resumed_token_ids=(70,) * 500))
    assert answer.last.finish_reason is FinishReason.LENGTH
    assert (answer.last.prompt_tokens, answer.last.output_tokens) == (10, 502)


@SESSION
async def test_an_aborted_resumption_counts_all_its_tokens(bench: Bench) -> None:
    request = dataclasses.replace(bench.request(max_tokens=400), resumed_token_ids=(70, 71))
    answer = Answer()
    async for step in bench.engine.generate(request):
        answer.steps.append(step)
        await bench.engine.abort(request.request_id)
    assert answer.last.finish_reason is FinishReason.ABORTED
    assert answer.last.output_tokens == 2 + len(answer.token_ids) < 400


@SESSION
@pytest.mark.parametrize(
    ("sampling", "token_ids", "message"),
    [({"seed": 1, "temperature": 1.0}, (70,), "seed"), ({}, (70, 1_000_000), "vocabulary")],
)
async def test_what_cannot_be_resumed_is_refused(
    bench: Bench, sampling: dict[str, Any], token_ids: tuple[int, ...], message: str
) -> None:
    with pytest.raises(BadInputError, match=f"resumed_token_ids: .*{message}"):
        await bench.answer(dataclasses.replace(bench.request(**sampling), resumed_token_ids=token_ids))


def vllm_steps(
    client: Any, work: FreshWork | ResumedWork, token_ids: Sequence[int], merged: Iterator[bool]
) -> list[GenerationStep]:
    """The work's steps if the model says these tokens, through vLLM's own output processor.

    `merged` says before each token whether the consumer is late, so that the delta is added to the next.
    """
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
    from vllm.v1.engine import FinishReason as Ended
    from vllm.v1.engine.output_processor import OutputProcessor

    if work.ended is not None:
        return [work.ended]
    processor = OutputProcessor(client.output_processor.tokenizer, log_stats=False)
    request = EngineCoreRequest("1", list(work.token_ids), None, work.sampling, None, 0.0, None, None, None)
    request.external_req_id = "1"
    processor.add_request(request, None)
    ends = {*work.sampling.stop_token_ids}
    steps: list[GenerationStep] = []
    waiting = None
    for number, token_id in enumerate(token_ids, start=1):
        reason, stop_reason = None, None
        if token_id in ends:
            reason, stop_reason = Ended.STOP, token_id
        elif number == work.sampling.max_tokens:
            reason = Ended.LENGTH
        out = EngineCoreOutput("1", [token_id], finish_reason=reason, stop_reason=stop_reason)
        (delta,) = processor.process_outputs([out]).request_outputs
        if waiting is not None:
            waiting.add(delta, aggregate=True)
            delta = waiting
        if next(merged) and not delta.finished:
            waiting = delta
            continue
        waiting = None
        steps.append(work.step(delta))
        if steps[-1].finish_reason is not None:
            return steps
    raise AssertionError("the output did not end")


SAMPLING = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 24),
        "min_tokens": st.integers(0, 8),
        "stop": st.lists(st.text(" aüe€", min_size=1, max_size=3), max_size=2).map(tuple),
    }
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), sampling=SAMPLING, prompt=st.sampled_from(["x", "ü", "never €"]))
def test_text_goes_on_as_vllm_alone_would_write_it(
    session_bench: Bench, data: st.DataObject, sampling: dict[str, Any], prompt: str
) -> None:
    client = session_bench.engine._running().client
    words = client.get_tokenizer()(" aüe 北€ 5", add_special_tokens=False)["input_ids"]
    sampling["min_tokens"] = min(sampling["min_tokens"], sampling["max_tokens"])
    sampling["stop_token_ids"] = data.draw(st.sampled_from([(), (words[-1],)]))
    spoken = data.draw(st.lists(st.sampled_from(words), min_size=24, max_size=24))
    whole = session_bench.request(prompt, **sampling)
    prompt_ids = client.get_tokenizer()(prompt)["input_ids"]

    def never() -> Iterator[bool]:
        while True:
            yield False

    def sometimes() -> Iterator[bool]:
        while True:
            yield data.draw(st.booleans())

    expected = vllm_steps(client, vllm_work(client, whole, prompt_ids), spoken, never())
    for cut in range(1, len(expected) + 1):
        before = Answer(expected[:cut])
        work = vllm_work(client, resumed(session_bench, whole, before.steps), prompt_ids)
        rest = Answer(vllm_steps(client, work, spoken[cut:], sometimes()))
        assert before.token_ids + rest.token_ids == Answer(expected).token_ids
        assert before.text + rest.text == Answer(expected).text
        assert dataclasses.replace(rest.last, token_ids=(), text="") == dataclasses.replace(
            expected[-1], token_ids=(), text=""
        )

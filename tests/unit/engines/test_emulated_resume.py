"""An output that is cut anywhere and resumed is the uninterrupted output, in tokens, text, counts and end."""

import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.config import EmulatedSection
from loraserve.engines.emulated import EmulatedEngine
from loraserve.engines.outputs import Output
from loraserve.engines.tokenizer import PromptRenderer
from loraserve.engines.virtual import VirtualTime
from loraserve.errors import BadInputError
from loraserve.request import FinishReason, GenerationRequest, GenerationStep
from loraserve.samples import build_checkpoint
from tests.support.engine_kit import adapter, collect, engine_on, reason_of, request, text_of, tokens_of

PROMPT = "Ein Gruß"
TEXT = "grüße, 北京 €5 "
MAX_MODEL_LEN = 128


@pytest.fixture(scope="module")
def renderers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PromptRenderer]:
    """A token per byte, and the sample model's tokenizer."""
    model = build_checkpoint(tmp_path_factory.mktemp("model"), hidden_size=128, num_layers=1)
    return {"bytes": PromptRenderer.load(""), "model": PromptRenderer.load(str(model))}


def steps_of(
    renderer: PromptRenderer, asked: GenerationRequest, words: Sequence[int]
) -> list[GenerationStep]:
    """All steps of an output that is fetched after every token."""
    prompt_ids = renderer.prompt_ids(asked.prompt)
    output = Output(asked, prompt_ids, renderer, words, asked.sampling.max_tokens)
    output.resume(asked.resumed_token_ids)
    steps = []
    while True:
        step = output.take()
        if step is not None:
            steps.append(step)
            if step.finish_reason is not None:
                return steps
        output.extend()


def resumed(asked: GenerationRequest, steps: Sequence[GenerationStep]) -> GenerationRequest:
    """The request for what comes after these steps."""
    return dataclasses.replace(asked, resumed_token_ids=tuple(tokens_of(list(steps))))


SAMPLING = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 40),
        "min_tokens": st.integers(0, 20),
        "temperature": st.sampled_from([0.0, 1.0]),
        "ignore_eos": st.booleans(),
    }
)


@pytest.mark.parametrize("kind", ["bytes", "model"])
@settings(max_examples=150, deadline=None)
@given(data=st.data(), sampling=SAMPLING, prompt=st.text(max_size=5))
def test_an_output_cut_anywhere_goes_on_as_it_would_have(
    renderers: dict[str, PromptRenderer],
    kind: str,
    data: st.DataObject,
    sampling: dict[str, Any],
    prompt: str,
) -> None:
    renderer = renderers[kind]
    # Few tokens, characters in pieces among them, so that stops and whole characters come about.
    words = renderer.encode(TEXT)
    whole = request("1", prompt, **sampling)
    text = text_of(steps_of(renderer, whole, words))
    if text and data.draw(st.booleans(), "with a stop string"):
        start = data.draw(st.integers(0, len(text) - 1))
        stop = text[start : start + data.draw(st.integers(1, 8))]
        whole = request("1", prompt, **sampling, stop=("never €", stop))
    if data.draw(st.booleans(), "with a stop token"):
        ends = data.draw(st.sampled_from(words))
        whole = request("1", prompt, **sampling, stop=whole.sampling.stop, stop_token_ids=(ends,))

    expected = steps_of(renderer, whole, words)
    for cut in range(len(expected)):
        rest = steps_of(renderer, resumed(whole, expected[:cut]), words)
        assert rest == expected[cut:]


@pytest.mark.parametrize("ending", [{}, {"stop": ("e",)}, {"stop_token_ids": (ord("e"),)}])
def test_an_output_that_had_ended_says_so_again(
    renderers: dict[str, PromptRenderer], ending: dict[str, Any]
) -> None:
    renderer = renderers["bytes"]
    words = b"abcde"
    whole = request("1", max_tokens=40, **ending)
    expected = steps_of(renderer, whole, words)
    (last,) = steps_of(renderer, resumed(whole, expected), words)
    assert last == dataclasses.replace(expected[-1], token_ids=(), text="")
    assert last.finish_reason is (FinishReason.STOP if ending else FinishReason.LENGTH)


@pytest.fixture
def time() -> VirtualTime:
    return VirtualTime()


@pytest.fixture
async def engine(time: VirtualTime) -> AsyncIterator[EmulatedEngine]:
    engine = engine_on(time, max_model_len_tokens=MAX_MODEL_LEN)
    await engine.start()
    yield engine
    engine.check_invariants()
    assert engine.load().running == engine.load().waiting == 0
    await engine.close()


async def test_an_engine_goes_on_after_another_ones_output(engine: EmulatedEngine, time: VirtualTime) -> None:
    other = engine_on(time, max_model_len_tokens=MAX_MODEL_LEN)
    await other.start()
    for one in (engine, other):
        await time.run(one.load_adapter(adapter("a")))
    whole = request("1", PROMPT, "a@0", temperature=0.0, max_tokens=30)
    expected = await time.run(collect(other, whole))
    for cut in (1, 17, 29):
        rest = await time.run(collect(engine, resumed(whole, expected[:cut])))
        assert rest == expected[cut:]
    await other.close()


async def test_the_output_so_far_takes_its_time_to_compute(time: VirtualTime) -> None:
    engine = engine_on(
        time,
        EmulatedSection(base_step_ms=0.0, decode_seq_ms=0.0, prefill_token_ms=1.0),
        max_model_len_tokens=MAX_MODEL_LEN,
    )
    await engine.start()
    start_s = time.now_s()
    asked = dataclasses.replace(request("1", (65,) * 10, max_tokens=41), resumed_token_ids=(66,) * 40)
    (last,) = await time.run(collect(engine, asked))
    assert (last.prompt_tokens, last.output_tokens, len(last.token_ids)) == (10, 41, 1)
    assert time.now_s() - start_s == pytest.approx(0.050)
    await engine.close()


@pytest.mark.parametrize(("max_tokens", "resumed_tokens"), [(8, 8), (8, 9), (1000, MAX_MODEL_LEN - 10)])
async def test_nothing_is_left_to_say_at_the_limits(
    engine: EmulatedEngine, max_tokens: int, resumed_tokens: int
) -> None:
    asked = dataclasses.replace(
        request("1", (65,) * 10, max_tokens=max_tokens), resumed_token_ids=(66,) * resumed_tokens
    )
    (last,) = await collect(engine, asked)
    assert last == GenerationStep(
        token_ids=(),
        text="",
        prompt_tokens=10,
        output_tokens=resumed_tokens,
        finish_reason=FinishReason.LENGTH,
    )


async def test_an_aborted_resumption_counts_all_its_tokens(engine: EmulatedEngine, time: VirtualTime) -> None:
    stream = engine.generate(dataclasses.replace(request("1", max_tokens=90), resumed_token_ids=(65, 66)))
    first = await time.run(anext(stream))
    await engine.abort("1")
    steps = [first] + [step async for step in stream]
    assert reason_of(steps) is FinishReason.ABORTED
    assert steps[-1].output_tokens == 2 + len(tokens_of(steps)) < 90


@pytest.mark.parametrize(
    ("sampling", "token_ids", "message"),
    [
        ({"seed": 1}, (65,), "seed"),
        ({"presence_penalty": 0.5}, (65,), "penalties"),
        ({"logprobs": 0}, (65,), "logprobs"),
        ({}, (65, 258), "vocabulary of 258"),
        ({}, (-1,), "vocabulary"),
    ],
)
async def test_what_cannot_be_resumed_is_refused(
    engine: EmulatedEngine, sampling: dict[str, Any], token_ids: tuple[int, ...], message: str
) -> None:
    with pytest.raises(BadInputError, match=f"resumed_token_ids: .*{message}"):
        await collect(engine, dataclasses.replace(request("1", **sampling), resumed_token_ids=token_ids))

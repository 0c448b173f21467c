"""Where an emulated answer stops, and what text and log-probabilities it carries."""

from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.engines.emulated import EmulatedEngine
from loraserve.engines.outputs import EOS_ONE_IN, StopScanner
from loraserve.engines.tokenizer import BYTE_EOS
from loraserve.engines.virtual import VirtualTime
from loraserve.request import FinishReason
from tests.support.engine_kit import collect, engine_on, reason_of, request, text_of, tokens_of


@pytest.fixture
def time() -> VirtualTime:
    return VirtualTime()


@pytest.fixture
async def engine(time: VirtualTime) -> AsyncIterator[EmulatedEngine]:
    engine = engine_on(time, max_model_len_tokens=8192)
    await engine.start()
    yield engine
    engine.check_invariants()
    await engine.close()


async def test_a_stop_string_ends_the_text_before_it(engine: EmulatedEngine, time: VirtualTime) -> None:
    whole = text_of(await time.run(collect(engine, request("1", max_tokens=60))))
    stop = whole[20:24]
    steps = await time.run(collect(engine, request("2", max_tokens=60, stop=("not in it €", stop))))
    assert text_of(steps) == whole[: whole.index(stop)]
    assert (reason_of(steps), steps[-1].stop_reason) == (FinishReason.STOP, stop)


async def test_a_stop_string_before_min_tokens_does_not_count(
    engine: EmulatedEngine, time: VirtualTime
) -> None:
    whole = text_of(await time.run(collect(engine, request("1", max_tokens=60))))
    steps = await time.run(
        collect(engine, request("2", max_tokens=60, min_tokens=60, stop=(whole[3:6], whole[10:12])))
    )
    assert (text_of(steps), reason_of(steps)) == (whole, FinishReason.LENGTH)


async def test_a_stop_token_ends_the_answer_and_is_not_in_the_text(
    engine: EmulatedEngine, time: VirtualTime
) -> None:
    whole = await time.run(collect(engine, request("1", max_tokens=60)))
    stop_id = tokens_of(whole)[9]
    at = tokens_of(whole).index(stop_id)
    steps = await time.run(collect(engine, request("2", max_tokens=60, stop_token_ids=(stop_id,))))
    assert tokens_of(steps) == tokens_of(whole)[: at + 1]
    assert text_of(steps) == text_of(whole)[:at]
    assert (reason_of(steps), steps[-1].stop_reason) == (FinishReason.STOP, str(stop_id))


async def test_min_tokens_bans_stop_tokens_until_then(engine: EmulatedEngine, time: VirtualTime) -> None:
    first = tokens_of(await time.run(collect(engine, request("1", max_tokens=1))))[0]
    steps = await time.run(
        collect(engine, request("2", max_tokens=500, min_tokens=100, stop_token_ids=(first,)))
    )
    assert first not in tokens_of(steps)[:100]
    assert len(tokens_of(steps)) >= 100


async def test_the_model_ends_its_answers_unless_told_to_go_on(
    engine: EmulatedEngine, time: VirtualTime
) -> None:
    length = 10 * EOS_ONE_IN
    ended = await time.run(collect(engine, request("1", max_tokens=length, ignore_eos=False)))
    assert (reason_of(ended), ended[-1].stop_reason) == (FinishReason.STOP, None)
    assert tokens_of(ended)[-1] == BYTE_EOS
    went_on = await time.run(collect(engine, request("2", max_tokens=length)))
    assert tokens_of(went_on)[: len(tokens_of(ended))] == tokens_of(ended)
    assert len(tokens_of(went_on)) == length


async def test_logprobs_are_given_per_token_likeliest_first(
    engine: EmulatedEngine, time: VirtualTime
) -> None:
    for wanted, given_each in ((0, 1), (1, 1), (5, 5)):
        steps = await time.run(collect(engine, request(str(wanted), max_tokens=12, logprobs=wanted)))
        positions = [position for step in steps for position in step.logprobs]
        assert [position[0].token_id for position in positions] == tokens_of(steps)
        assert all(len(position) == given_each for position in positions)
        for position in positions:
            assert [one.rank for one in position] == list(range(1, given_each + 1))
            values = [one.logprob for one in position]
            assert values == sorted(values, reverse=True)
            assert values[0] <= 0
            assert len({one.token_id for one in position}) == given_each
    none = await time.run(collect(engine, request("none", max_tokens=3)))
    assert not any(step.logprobs for step in none)


async def test_counts_add_up_over_the_steps(engine: EmulatedEngine, time: VirtualTime) -> None:
    steps = await time.run(collect(engine, request("1", (1, 2, 3), max_tokens=9)))
    assert [step.output_tokens for step in steps] == list(range(1, 10))
    assert {step.prompt_tokens for step in steps} == {3}
    assert [step.finish_reason for step in steps[:-1]] == [None] * 8


@given(
    text=st.text("ab€", max_size=30),
    stops=st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
def test_the_scanner_finds_a_stop_however_the_text_is_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    scanner = StopScanner(tuple(stops))
    given, rest, stop = "", text, None
    while rest and stop is None:
        size = data.draw(st.integers(1, len(rest)))
        part, stop = scanner.push(rest[:size])
        rest = rest[size:]
        given += part
    given += scanner.flush()
    if stop is None:
        assert given == text
        assert not any(one in text for one in stops)
    else:
        assert text.startswith(given + stop)
        assert not any(one in given for one in stops)

"""The open loop keeps its schedule whatever the answers do, and records each request exactly once."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.client_types import ServedBy
from loraserve.engines.virtual import VirtualTime
from loraserve.errors import DeadlineError, NotFoundError, OverloadedError, UnavailableError
from loraserve.replay.dispatch import Dispatcher, DispatchOptions
from loraserve.replay.prompts import PromptSource
from loraserve.request import FinishReason, GenerationStep, SamplingParams
from traces.records import Outcome, RequestRecord
from traces.types import TraceRequest

Script = Callable[["FakeAnswer"], AsyncIterator[GenerationStep]]


class FakeAnswer:
    """The scripted answer to one request."""

    def __init__(self, request: dict[str, Any], script: Script) -> None:
        self.request = request
        self.sampling: SamplingParams = request["sampling"]
        self.adapter_version: str | None = "a@0"
        self.served_by = ServedBy(replica="replica-0")
        self.attempts = 2
        self.resumed = True
        self.cancelled = False
        self._script = script

    def __aiter__(self) -> AsyncIterator[GenerationStep]:
        return self._script(self)

    def cancel(self) -> None:
        self.cancelled = True


class FakeTarget:
    """Answers every request by one script."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.answers: list[FakeAnswer] = []

    def generate(self, prompt: tuple[int, ...], **request: Any) -> FakeAnswer:
        self.answers.append(FakeAnswer({"prompt": prompt, **request}, self._script))
        return self.answers[-1]


def step(count: int, finish: FinishReason | None = None) -> GenerationStep:
    return GenerationStep(
        token_ids=(65,) * count, text="A" * count, prompt_tokens=1, output_tokens=count, finish_reason=finish
    )


def paced(time: VirtualTime, gap_s: float) -> Script:
    async def script(answer: FakeAnswer) -> AsyncIterator[GenerationStep]:
        for left in range(answer.sampling.max_tokens, 0, -1):
            await time.sleep(gap_s)
            yield step(1, FinishReason.LENGTH if left == 1 else None)

    return script


def failing(error: Exception) -> Script:
    async def script(answer: FakeAnswer) -> AsyncIterator[GenerationStep]:
        yield step(1)
        raise error

    return script


def requests_at(*due_s: float, output_tokens: int = 2) -> list[tuple[float, TraceRequest]]:
    return [
        (at, TraceRequest(index=index, arrival_s=at, prompt_tokens=5, output_tokens=output_tokens))
        for index, at in enumerate(due_s)
    ]


def dispatcher(
    time: VirtualTime, target: FakeTarget, schedule: Sequence[tuple[float, TraceRequest]], **options: Any
) -> Dispatcher:
    prompts = PromptSource(seed=0, longest_tokens=100)
    settings = DispatchOptions(run_id="run", **options)
    return Dispatcher(schedule, target, prompts, settings, clock=time, sleep=time.sleep)


async def replay(
    time: VirtualTime, script: Script, schedule: Sequence[tuple[float, TraceRequest]], **options: Any
) -> tuple[tuple[RequestRecord, ...], FakeTarget]:
    target = FakeTarget(script)
    records = await time.run(dispatcher(time, target, schedule, **options).run(asyncio.Event()))
    return records, target


@settings(max_examples=50, deadline=None)
@given(
    due_s=st.lists(st.floats(0, 100), min_size=1, max_size=30).map(sorted),
    gap_s=st.floats(0.001, 50),
    lead_s=st.floats(0, 1),
)
def test_arrivals_keep_the_schedule_whatever_the_answers_take(
    due_s: list[float], gap_s: float, lead_s: float
) -> None:
    async def scenario() -> None:
        time = VirtualTime()
        records, _ = await replay(time, paced(time, gap_s), requests_at(*due_s), lead_s=lead_s)
        assert [record.index for record in records] == list(range(len(due_s)))
        assert time.now_s() == pytest.approx(lead_s + due_s[-1] + 2 * gap_s, abs=1e-6)
        for record, due in zip(records, due_s, strict=True):
            assert record.scheduled_s == due
            assert record.sent_s == pytest.approx(due, abs=1e-6)
            assert record.outcome is Outcome.OK
            assert record.message_times_s == pytest.approx((due + gap_s, due + 2 * gap_s), abs=1e-6)

    asyncio.run(scenario())


async def test_each_request_asks_for_what_the_trace_says() -> None:
    time = VirtualTime()
    schedule = [
        (0.0, TraceRequest(index=0, arrival_s=0, prompt_tokens=7, output_tokens=3, adapter="a", rank=8)),
        (1.0, TraceRequest(index=1, arrival_s=1, prompt_tokens=1, output_tokens=1)),
    ]
    records, target = await replay(time, paced(time, 0.1), schedule, timeout_s=9.0)
    first, second = (answer.request for answer in target.answers)
    assert (len(first["prompt"]), first["adapter"], first["timeout_s"]) == (7, "a", 9.0)
    assert (first["sampling"].max_tokens, first["sampling"].ignore_eos) == (3, True)
    assert (len(second["prompt"]), second["adapter"]) == (1, "")
    assert [(record.adapter, record.rank) for record in records] == [("a", 8), (None, None)]
    assert [record.request_id for record in records] == [first["request_id"], second["request_id"]]
    assert records[0].message_tokens == (1, 1, 1)
    assert (records[0].replica_id, records[0].adapter_version) == ("replica-0", "a@0")
    assert (records[0].attempts, records[0].resumed) == (2, True)


@pytest.mark.parametrize(
    ("error", "outcome", "text"),
    [
        (OverloadedError("full"), Outcome.REFUSED, "full"),
        (DeadlineError("too late"), Outcome.FAILED, "too late"),
        (UnavailableError("nobody"), Outcome.FAILED, "nobody"),
        (NotFoundError("no adapter"), Outcome.FAILED, "no adapter"),
        (ZeroDivisionError("a bug"), Outcome.FAILED, "a bug"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
async def test_an_error_is_the_record_of_its_own_request_only(
    error: Exception, outcome: Outcome, text: str
) -> None:
    time = VirtualTime()
    records, target = await replay(time, failing(error), requests_at(0, 1, 2))
    assert [record.outcome for record in records] == [outcome] * 3
    assert all(text in record.status for record in records)
    assert all(record.output_tokens == 1 for record in records)
    assert all(answer.cancelled for answer in target.answers)


@pytest.mark.parametrize(
    ("last", "outcome"),
    [
        (step(1, FinishReason.STOP), Outcome.TRUNCATED),
        (step(2, FinishReason.LENGTH), Outcome.OK),
        (step(2, FinishReason.ABORTED), Outcome.FAILED),
        (step(2), Outcome.FAILED),
    ],
    ids=["too short", "full", "aborted", "no finish reason"],
)
async def test_only_a_full_answer_is_ok(last: GenerationStep, outcome: Outcome) -> None:
    async def script(answer: FakeAnswer) -> AsyncIterator[GenerationStep]:
        yield last

    records, _ = await replay(VirtualTime(), script, requests_at(0))
    assert [record.outcome for record in records] == [outcome]


async def test_the_cap_refuses_on_the_spot_and_delays_nobody() -> None:
    time = VirtualTime()
    records, target = await replay(
        time, paced(time, 1.0), requests_at(0, 0.5, 1.0, 1.5, 2.5), max_in_flight=2
    )
    assert [record.outcome for record in records] == [
        Outcome.OK,
        Outcome.OK,
        Outcome.REFUSED,
        Outcome.REFUSED,
        Outcome.OK,
    ]
    assert all(record.sent_s == pytest.approx(record.scheduled_s) for record in records)
    assert "2 requests were in flight" in records[2].status
    assert len(target.answers) == 3


async def test_the_warm_up_is_marked_by_time_or_by_number() -> None:
    time = VirtualTime()
    schedule = requests_at(0, 1, 2, 3)
    by_time, _ = await replay(time, paced(time, 0.1), schedule, warmup_s=1.5)
    assert [record.warmup for record in by_time] == [True, True, False, False]
    by_number, _ = await replay(time, paced(time, 0.1), schedule, warmup_requests=3)
    assert [record.warmup for record in by_number] == [True, True, True, False]


async def test_stopping_cancels_what_runs_and_records_what_was_sent() -> None:
    time = VirtualTime()
    target = FakeTarget(paced(time, 1.0))
    stop = asyncio.Event()
    running = dispatcher(time, target, requests_at(0, 0, 3.0, 100.0))

    async def stop_later() -> None:
        await time.sleep(3.5)
        stop.set()

    records, _ = await time.run(asyncio.gather(running.run(stop), stop_later()))
    assert [record.outcome for record in records] == [Outcome.OK, Outcome.OK, Outcome.CANCELLED]
    assert target.answers[2].cancelled
    assert (running.progress.sent, running.progress.ended, running.progress.total) == (3, 3, 4)


async def test_a_request_stopped_in_the_turn_it_was_sent_has_a_record_too() -> None:
    time = VirtualTime()
    stop = asyncio.Event()

    class StoppingTarget(FakeTarget):
        def generate(self, prompt: tuple[int, ...], **request: Any) -> FakeAnswer:
            stop.set()
            return super().generate(prompt, **request)

    target = StoppingTarget(paced(time, 1.0))
    records = await time.run(dispatcher(time, target, requests_at(0, 0, 0)).run(stop))
    assert [record.outcome for record in records] == [Outcome.CANCELLED] * 3
    assert all(answer.cancelled for answer in target.answers)


def test_prompts_are_a_function_of_seed_and_index_and_never_begin_alike() -> None:
    source = PromptSource(seed=1, longest_tokens=500, vocab_size=100)
    again = PromptSource(seed=1, longest_tokens=500, vocab_size=100)
    prompts = [source.prompt(index, 20) for index in range(2000)]
    assert prompts == [again.prompt(index, 20) for index in range(2000)]
    assert len({prompt[:4] for prompt in prompts}) == 2000
    assert all(16 <= token_id < 100 for prompt in prompts for token_id in prompt)
    assert [len(source.prompt(3, size)) for size in (1, 4, 5, 500)] == [1, 4, 5, 500]
    assert PromptSource(seed=2, longest_tokens=500).prompt(1, 20) != source.prompt(1, 20)
    with pytest.raises(ValueError, match="too small"):
        PromptSource(seed=1, longest_tokens=5, vocab_size=16)

"""A replay over real gRPC: every request is measured once, and nothing is left running."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from loraserve.errors import BadInputError, OverloadedError, UnavailableError
from loraserve.replay.dispatch import Progress
from loraserve.replay.runner import ReplayOptions, run_replay
from loraserve.replay.workload import WorkloadOptions
from tests.support.fake_router import FakeRouter, fake_router
from traces.records import Outcome, read_records
from traces.report import write_report

SHARED_TRACES = Path(__file__).parents[4] / "shared" / "traces"


@pytest.fixture
async def router() -> AsyncIterator[FakeRouter]:
    async with fake_router() as router:
        for name, rank in (("a", 8), ("b", 64)):
            await router.add(name, rank)
        yield router


def demo(limit: int | None = 40, speedup: float = 20.0, **settings: object) -> ReplayOptions:
    workload = WorkloadOptions(source="demo", limit=limit)
    return ReplayOptions(workload=workload, speedup=speedup, **settings)  # type: ignore[arg-type]


async def test_every_request_of_the_demo_is_answered_and_measured(router: FakeRouter, tmp_path: Path) -> None:
    options = demo(warmup_requests=10)
    result = await run_replay(router.address, options, stop=asyncio.Event())
    assert Counter(record.outcome for record in result.records) == {Outcome.OK: 40}
    for record, request in zip(result.records, result.trace.requests, strict=True):
        assert (record.index, record.rank) == (request.index, request.rank)
        assert record.output_tokens == request.output_tokens == sum(record.message_tokens)
        assert record.scheduled_s == pytest.approx(request.arrival_s / 20)
        assert record.sent_s <= record.message_times_s[0] <= record.end_s
        assert record.replica_id == "replica-0"
        assert (record.adapter_version is None) == (record.adapter is None)
    assert result.summary.warmup_requests == 10
    assert set(result.summary.per_rank) == {"base", "8", "64"}
    assert (result.not_sent, result.local_refusals, result.interrupted) == (0, 0, False)
    assert [sent.adapter or None for sent in router.requests] == [one.adapter for one in result.records]
    write_report(tmp_path, result.records, result.summary, title="t", command="c", environment={})
    assert read_records(tmp_path / "records.jsonl") == result.records
    assert json.loads((tmp_path / "summary.json").read_text())["overall"]["completed"] == 30


async def test_refusals_are_records_like_any_other(router: FakeRouter) -> None:
    router.refusal = OverloadedError("256 wait already")
    result = await run_replay(router.address, demo(limit=5), stop=asyncio.Event())
    assert [record.outcome for record in result.records] == [Outcome.REFUSED] * 5
    assert result.records[0].status == "256 wait already"
    assert result.summary.overall.attainment == 0


async def test_stopping_leaves_measurements_and_no_requests(router: FakeRouter) -> None:
    stop = asyncio.Event()
    counts: list[Progress] = []
    running = asyncio.create_task(
        run_replay(router.address, demo(limit=None, speedup=5.0), stop=stop, on_start=counts.append)
    )
    async with asyncio.timeout(20):
        while not router.requests or router.engine.load().running == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    stop.set()
    result = await running
    assert result.interrupted
    assert len(result.records) == counts[0].sent == counts[0].ended == 120 - result.not_sent
    assert {record.outcome for record in result.records} <= {Outcome.OK, Outcome.CANCELLED}
    await router.wait_idle()


async def test_a_deadline_ends_a_request_and_is_a_failure() -> None:
    # A step of this engine takes seconds, the deadline comes before the first one is over.
    async with fake_router(speed=0.001) as router:
        result = await run_replay(router.address, demo(limit=3, timeout_s=0.1), stop=asyncio.Event())
    assert [record.outcome for record in result.records] == [Outcome.FAILED] * 3
    assert all(record.status.startswith("deadline") for record in result.records)


async def test_a_router_that_does_not_serve_is_an_error_before_anything_is_sent() -> None:
    async with fake_router(serving=False) as router:
        with pytest.raises(UnavailableError, match="NOT_SERVING"):
            await run_replay(router.address, demo(ready_timeout_s=0.2), stop=asyncio.Event())
        assert router.requests == []


@pytest.mark.parametrize(
    "settings", [{"timeout_s": 0.0}, {"max_in_flight": 0}, {"warmup_s": -1.0}, {"vocab_size": 3}], ids=str
)
def test_impossible_options_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(BadInputError):
        demo(**settings)  # type: ignore[arg-type]


async def test_an_impossible_speedup_is_refused(router: FakeRouter) -> None:
    with pytest.raises(BadInputError, match="--speedup"):
        await run_replay(router.address, demo(speedup=0.0), stop=asyncio.Event())


@pytest.mark.skipif(not SHARED_TRACES.is_dir(), reason="the recorded traces are not on this machine")
@pytest.mark.parametrize(
    "name",
    [
        "AzureLLMInferenceTrace_conv.csv.gz",
        "BurstGPT_1_first400.csv",
        "burstgpt3_dirty.csv",
        "mooncake_synthetic_trace.jsonl.gz",
    ],
)
async def test_a_recorded_trace_is_replayed(router: FakeRouter, name: str) -> None:
    workload = WorkloadOptions(
        source=str(SHARED_TRACES / name),
        on_bad_row="skip",
        limit=50,
        max_prompt_tokens=200,
        max_output_tokens=20,
    )
    trace_s = 2.0
    from loraserve.replay.workload import read_workload

    speedup = max(1.0, read_workload(workload).duration_s / trace_s)
    options = ReplayOptions(workload=workload, speedup=speedup)
    result = await run_replay(router.address, options, stop=asyncio.Event())
    assert Counter(record.outcome for record in result.records) == {Outcome.OK: len(result.trace)}
    assert len(result.trace) > 0

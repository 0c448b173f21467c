"""Whatever dies, the caller sees one stream without a seam, or one error with all that came."""

import asyncio
import pickle
import socket
from collections.abc import AsyncIterator, Container, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraserve.client import Client, GenerationStream
from loraserve.client.routers import Router, Routers
from loraserve.client.submission import MAX_ATTEMPTS
from loraserve.client_types import ServedBy
from loraserve.errors import (
    BadInputError,
    DeadlineError,
    LoraServeError,
    NotFoundError,
    OverloadedError,
    StaleError,
    StreamBrokenError,
    UnavailableError,
    WorkFailedError,
)
from loraserve.request import FinishReason, GenerationStep, SamplingParams
from tests.support.fake_replica import Break
from tests.support.fake_router import FakeRouter, fake_routers

TOKENS = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=3, max_tokens=TOKENS, ignore_eos=True)
LOST = Break(after=3, error=UnavailableError("the engine is gone"))
LOST_AT_ONCE = Break(error=UnavailableError("the engine is gone"))


@pytest.fixture
async def routers() -> AsyncIterator[tuple[FakeRouter, ...]]:
    """Two routers of one cluster with two replicas, and an adapter named a."""
    async with fake_routers(2, replicas=2) as routers:
        await routers[0].add("a", 8)
        yield routers


def addresses(routers: Sequence[FakeRouter]) -> list[str]:
    return [router.address for router in routers]


async def read(stream: GenerationStream) -> list[GenerationStep]:
    """All steps, which must follow on one another."""
    steps, count = [], 0
    async for step in stream:
        count += len(step.token_ids)
        assert step.output_tokens == count
        steps.append(step)
    assert [step.finish_reason for step in steps[:-1]] == [None] * (len(steps) - 1)
    return steps


async def read_into(steps: list[GenerationStep], stream: GenerationStream) -> None:
    async for step in stream:
        steps.append(step)


def joined(steps: Sequence[GenerationStep]) -> tuple[tuple[int, ...], str]:
    return tuple(token for step in steps for token in step.token_ids), "".join(step.text for step in steps)


async def expected(router: FakeRouter, sampling: SamplingParams = GREEDY) -> tuple[tuple[int, ...], str]:
    """The answer of a request that nothing happens to."""
    async with Client(router.address, look_aside=False) as client:
        whole = await client.complete("hi €", adapter="a", sampling=sampling)
    router.requests.clear()
    return whole.step.token_ids, whole.step.text


async def test_requests_go_to_replicas_and_costs_the_router_one_pick(routers: tuple[FakeRouter, ...]) -> None:
    router, other = routers
    first, _ = router.replicas
    whole = await expected(router)
    async with Client(addresses(routers)) as client:
        stream = client.generate("hi €", adapter="a", sampling=GREEDY, request_id="mine")
        steps = await read(stream)
        assert joined(steps) == whole
        assert stream.served_by == ServedBy(replica="r0", table_version=7, reason="picked")
        assert (stream.request_id, stream.attempts, stream.resumed) == ("mine", 1, False)
        assert stream.adapter_version == router.adapters["a"][0]
        done = await client.complete("hi €", adapter="a", sampling=GREEDY, idempotency_key="key")
        assert (done.step.token_ids, done.attempts, done.served_by) == (whole[0], 1, stream.served_by)
    assert (router.requests, other.requests) == ([], [])
    (pick,) = [*router.picks, *other.picks][:1]
    assert (pick.adapter, pick.max_tokens, pick.adapter_version) == ("a", TOKENS, "")
    assert 590 < pick.remaining_s <= 600
    assert len(router.picks) == len(other.picks) == 1, "the routers take turns"
    sent, second = first.requests
    assert (sent.request_id, sent.attempt, len(sent.idempotency_key)) == ("mine", 0, 32)
    assert sent.lease.adapter_version == stream.adapter_version
    assert (second.idempotency_key, second.HasField("resume")) == ("key", False)


@pytest.mark.parametrize("look_aside", [True, False], ids=["look-aside", "proxied"])
async def test_a_lost_stream_goes_on_elsewhere_without_a_seam(
    routers: tuple[FakeRouter, ...], look_aside: bool
) -> None:
    whole = await expected(routers[0])
    async with Client(addresses(routers), look_aside=look_aside) as client:
        servers = routers[0].replicas if look_aside else routers
        deaths = [asyncio.Event() for _ in servers]
        for server, death in zip(servers, deaths, strict=True):
            server.script.append(Break(after=3, when=death))
        stream = client.generate("hi €", adapter="a", sampling=GREEDY)
        steps = [await anext(stream) for _ in range(3)]
        first = next(index for index, server in enumerate(servers) if server.requests)
        deaths[first].set()
        steps.append(await anext(stream))
        assert (stream.attempts, stream.resumed) == (2, True)
        # The second server dies as well, when the first is back.
        await servers[first].server.wait_for_termination()
        await servers[first].come_back()
        deaths[1 - first].set()
        steps += [step async for step in stream]
    assert joined(steps) == whole
    assert [step.output_tokens for step in steps][-1] == TOKENS
    assert (stream.attempts, stream.resumed) == (3, True)
    sent = [request for server in servers for request in server.requests]
    sent.sort(key=lambda request: request.attempt)
    assert [request.attempt for request in sent] == [0, 1, 2]
    assert len({request.idempotency_key for request in sent}) == 1
    assert len({request.request_id for request in sent}) == 1
    assert not sent[0].HasField("resume")
    for request in sent[1:]:
        assert request.resume.adapter_version == routers[0].adapters["a"][0]
        resumed = tuple(request.resume.token_ids)
        assert resumed == whole[0][: len(resumed)]
        assert len(resumed) >= 3
    if look_aside:
        picks = [pick for router in routers for pick in router.picks]
        picks.sort(key=lambda pick: -pick.max_tokens)
        assert picks[1].exclude_replicas == ["r0"]
        assert picks[1].adapter_version == routers[0].adapters["a"][0]
        assert picks[1].max_tokens == TOKENS - len(sent[1].resume.token_ids)


class TestNotResumable:
    """Requests that cannot go on exactly."""

    @pytest.mark.parametrize(
        ("sampling", "why"),
        [
            (SEEDED, "a seed"),
            (SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=1, ignore_eos=True), "logprobs"),
            (
                SamplingParams(temperature=0, max_tokens=TOKENS, presence_penalty=1.0, ignore_eos=True),
                "penalty",
            ),
        ],
        ids=["seed", "logprobs", "penalty"],
    )
    async def test_end_with_what_came(
        self, routers: tuple[FakeRouter, ...], sampling: SamplingParams, why: str
    ) -> None:
        whole = await expected(routers[0], sampling)
        routers[0].replicas[0].script.append(LOST)
        steps: list[GenerationStep] = []
        async with Client(addresses(routers)) as client:
            stream = client.generate("hi €", adapter="a", sampling=sampling)
            with pytest.raises(StreamBrokenError, match=f"the engine is gone; .*{why}") as caught:
                await read_into(steps, stream)
            assert [step async for step in stream] == []
        assert (caught.value.token_ids, caught.value.text) == joined(steps)
        assert len(steps) >= 3
        assert whole[0][: len(caught.value.token_ids)] == caught.value.token_ids
        assert caught.value.request_id == stream.request_id
        copied = pickle.loads(pickle.dumps(caught.value))
        assert (str(copied), copied.token_ids) == (str(caught.value), caught.value.token_ids)
        assert (stream.attempts, stream.resumed) == (1, False)

    async def test_restart_when_nothing_came(self, routers: tuple[FakeRouter, ...]) -> None:
        whole = await expected(routers[0], SEEDED)
        routers[0].replicas[0].script.append(LOST_AT_ONCE)
        async with Client(addresses(routers)) as client:
            stream = client.generate("hi €", adapter="a", sampling=SEEDED)
            assert joined(await read(stream)) == whole
        assert (stream.attempts, stream.resumed) == (2, False)

    async def test_restart_when_they_are_answered_at_once(self, routers: tuple[FakeRouter, ...]) -> None:
        whole = await expected(routers[0], SEEDED)
        for replica in routers[0].replicas:
            replica.script.append(LOST)
        async with Client(addresses(routers)) as client:
            done = await client.complete("hi €", adapter="a", sampling=SEEDED)
        assert (done.step.token_ids, done.step.text, done.attempts) == (*whole, 3)


async def test_attempts_after_the_third_are_spread_over_time(routers: tuple[FakeRouter, ...]) -> None:
    """A failure that takes everything for a second must not use all attempts up in a moment."""
    whole = await expected(routers[0])
    for replica in routers[0].replicas:
        replica.script.extend([LOST_AT_ONCE] * 3)
    loop = asyncio.get_running_loop()
    async with Client(addresses(routers)) as client:
        began_s = loop.time()
        stream = client.generate("hi €", adapter="a", sampling=GREEDY)
        assert joined(await read(stream)) == whole
    sent = sum(len(replica.requests) for replica in routers[0].replicas)
    assert (stream.attempts, sent) == (7, 7)
    # Before attempts four to seven: at least half of 0.1, 0.2, 0.4 and 0.8 s.
    assert loop.time() - began_s >= 0.75


async def test_an_answer_whose_end_alone_was_lost_is_complete(routers: tuple[FakeRouter, ...]) -> None:
    whole = await expected(routers[0], SEEDED)
    routers[0].replicas[0].script.append(Break(after=TOKENS + 1, error=UnavailableError("gone")))
    async with Client(addresses(routers)) as client:
        stream = client.generate("hi €", adapter="a", sampling=SEEDED)
        assert joined(await read(stream)) == whole
    assert stream.attempts == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [(StaleError("the lease has run out"), "stale"), (OverloadedError("full"), "full")],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_replica_that_refuses_is_picked_again_or_not(
    routers: tuple[FakeRouter, ...], error: LoraServeError, code: str
) -> None:
    first, second = routers[0].replicas
    first.script.append(Break(error=error))
    async with Client(addresses(routers)) as client:
        done = await client.complete("hi", adapter="a", sampling=GREEDY)
    assert done.attempts == 2
    assert [len(first.requests), len(second.requests)] == ([2, 0] if code == "stale" else [1, 1])


async def test_a_replica_that_is_always_stale_is_left_to_the_router(routers: tuple[FakeRouter, ...]) -> None:
    first, _ = routers[0].replicas
    first.script.extend([Break(error=StaleError("old"))] * 9)
    async with Client(routers[0].address) as client:
        done = await client.complete("hi", adapter="a", sampling=GREEDY)
    assert (len(first.requests), len(routers[0].requests), done.attempts) == (3, 1, 4)
    async with Client(routers[0].address, look_aside=True) as client:
        with pytest.raises(StaleError, match="old"):
            await client.complete("hi", adapter="a", sampling=GREEDY)


async def test_an_unreachable_replica_is_asked_through_the_router_for_a_while(
    routers: tuple[FakeRouter, ...],
) -> None:
    router = routers[0]
    first, second = router.replicas
    with socket.create_server(("127.0.0.1", 0)) as silent:
        # It accepts connections and never says a word, as what a firewall swallows.
        first.address = f"127.0.0.1:{silent.getsockname()[1]}"
        async with Client(router.address) as client:
            done = await client.complete("hi", adapter="a", sampling=GREEDY)
            assert (len(router.requests), done.served_by.reason) == (1, "only holder")
            picks = len(router.picks)
            await client.complete("hi", adapter="a", sampling=GREEDY)
            assert (len(router.requests), len(router.picks)) == (2, picks), "no replica has ever answered"
        async with Client(router.address, look_aside=True) as client:
            done = await client.complete("hi", adapter="a", sampling=GREEDY)
            assert (len(router.requests), len(second.requests)) == (2, 1)


async def test_a_node_with_a_router_and_a_replica_is_lost_and_the_others_serve(
    routers: tuple[FakeRouter, ...],
) -> None:
    gone, router = routers
    first, second = router.replicas
    first.script.extend([LOST_AT_ONCE] * 16)
    await gone.die()
    # Each client begins with a router of its own choice.
    for _ in range(8):
        async with Client(addresses(routers)) as client:
            done = await client.complete("hi", adapter="a", sampling=GREEDY)
            assert (done.attempts, done.served_by.replica) == (2, "r1")
    assert len(second.requests) == 8


@pytest.mark.parametrize("refusal", [NotFoundError("adapter a is gone"), OverloadedError("full")], ids=str)
async def test_what_came_of_an_answer_is_given_when_nobody_is_picked_to_go_on(
    routers: tuple[FakeRouter, ...], refusal: LoraServeError
) -> None:
    router = routers[0]
    router.replicas[0].script.append(LOST)
    router.pick_script.extend([None, *[refusal] * 16])
    async with Client(router.address, look_aside=True) as client:
        stream = client.generate("hi", adapter="a", sampling=GREEDY)
        steps = [await anext(stream) for _ in range(3)]
        with pytest.raises(StreamBrokenError, match=str(refusal)) as caught:
            await anext(stream)
    assert (caught.value.token_ids, caught.value.text) == joined(steps)


async def test_a_router_that_picks_one_by_one_is_asked_so(routers: tuple[FakeRouter, ...]) -> None:
    router = routers[0]
    router.picks_many = False
    router.replicas[0].script.append(LOST)
    whole = await expected(router)
    async with Client(router.address) as client:
        stream = client.generate("hi €", adapter="a", sampling=GREEDY)
        assert joined(await read(stream)) == whole
    assert (stream.attempts, len(router.picks), router.requests) == (2, 2, [])


async def test_a_router_without_pick_is_asked_itself(routers: tuple[FakeRouter, ...]) -> None:
    router = routers[0]
    router.replicas = []
    async with Client(router.address) as client:
        for _ in range(2):
            done = await client.complete("hi", adapter="a", sampling=GREEDY)
            assert done.served_by.reason == "only holder"
    assert len(router.requests) == 2
    async with Client(router.address, look_aside=True) as client:
        with pytest.raises(WorkFailedError, match="no Pick here"):
            await client.complete("hi", adapter="a", sampling=GREEDY)


@pytest.mark.parametrize(
    "error", [OverloadedError("full"), NotFoundError("adapter a"), BadInputError("adapter: too long")]
)
async def test_what_a_pick_is_refused_with_ends_the_request(
    routers: tuple[FakeRouter, ...], error: LoraServeError
) -> None:
    for router in routers:
        router.pick_script.append(error)
    async with Client(addresses(routers)) as client:
        with pytest.raises(type(error), match=str(error)):
            await client.complete("hi", adapter="a", sampling=GREEDY)
    assert sum(len(router.picks) for router in routers) == 1


async def test_the_last_replica_left_is_asked_again(routers: tuple[FakeRouter, ...]) -> None:
    """Excluding all that have failed leaves nobody, though a failed one may be back."""
    whole = await expected(routers[0])
    for router in routers:
        router.replicas = router.replicas[:1]
    replica = routers[0].replicas[0]
    replica.script.extend([LOST, LOST])
    async with Client(addresses(routers)) as client:
        stream = client.generate("hi €", adapter="a", sampling=GREEDY)
        assert joined(await read(stream)) == whole
    assert (stream.attempts, len(replica.requests)) == (3, 3)


class Choices:
    """How often clients have chosen a router."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._made = 0
        self._news = asyncio.Event()
        choose = Routers.next

        def counted(routers: Routers, tried: Container[str]) -> Router | None:
            self._made += 1
            self._news.set()
            return choose(routers, tried)

        monkeypatch.setattr(Routers, "next", counted)

    async def more(self, count: int) -> None:
        """Return after so many more; TimeoutError if they stop coming."""
        until = self._made + count
        async with asyncio.timeout(10):
            while self._made < until:
                self._news.clear()
                await self._news.wait()


async def test_a_router_that_restarts_is_waited_for(
    routers: tuple[FakeRouter, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    router = routers[0]
    whole = await expected(router)
    death, choices = asyncio.Event(), Choices(monkeypatch)
    router.script.append(Break(after=3, when=death))
    async with Client(router.address, look_aside=False) as client:
        stream = client.generate("hi €", adapter="a", sampling=GREEDY)
        steps = [await anext(stream) for _ in range(3)]
        death.set()
        rest: list[GenerationStep] = []
        reading = asyncio.create_task(read_into(rest, stream))
        await router.server.wait_for_termination()
        unary = asyncio.create_task(client.complete("hi €", adapter="a", sampling=GREEDY))
        await choices.more(4)
        await router.come_back()
        await reading
        assert joined([*steps, *rest]) == whole
        assert (await unary).step.token_ids == whole[0]
        assert stream.resumed


async def test_a_router_may_stay_away_for_longer_than_the_attempts_of_a_request_last(
    routers: tuple[FakeRouter, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = await expected(routers[0])
    choices = Choices(monkeypatch)
    async with Client(addresses(routers), look_aside=False, reconnect_s=30) as client:
        await client.complete("hi", adapter="a", sampling=GREEDY)
        for router in routers:
            await router.die()
            router.requests.clear()
        stream = client.generate("hi €", adapter="a", sampling=GREEDY)
        reading = asyncio.create_task(read(stream))
        await choices.more(3 * MAX_ATTEMPTS)
        await routers[0].come_back()
        assert joined(await reading) == whole
    assert stream.attempts == 1
    assert [request.attempt for request in routers[0].requests] == [0]


async def test_waiting_for_a_router_is_bounded(routers: tuple[FakeRouter, ...]) -> None:
    router = routers[0]
    async with Client(router.address, look_aside=False, reconnect_s=0.3) as client:
        death = asyncio.Event()
        router.script.append(Break(after=3, when=death))
        stream = client.generate("hi €", adapter="a", sampling=GREEDY)
        steps = [await anext(stream) for _ in range(3)]
        death.set()
        with pytest.raises(StreamBrokenError, match=f"router {router.address}: cannot be reached") as caught:
            await anext(stream)
        assert (caught.value.token_ids, caught.value.text) == joined(steps)
        with pytest.raises(UnavailableError, match="cannot be reached"):
            await client.complete("hi")
    async with Client(router.address, look_aside=False) as client:
        await router.come_back()
        await client.status()
        await router.die()
        with pytest.raises(DeadlineError, match=r"0\.3 s passed"):
            await client.complete("hi", timeout_s=0.3)
    assert len(router.requests) == 1


async def test_other_failures_are_not_tried_again(routers: tuple[FakeRouter, ...]) -> None:
    replica = routers[0].replicas[0]
    async with Client(addresses(routers)) as client:
        for error in (DeadlineError("late"), WorkFailedError("broken"), BadInputError("n: 2")):
            for after in (0, 3):
                replica.script.append(Break(after=after, error=error))
                stream = client.generate("hi", adapter="a", sampling=GREEDY)
                with pytest.raises(type(error), match=str(error)):
                    await read(stream)
                assert stream.attempts == 1


async def test_a_stream_does_not_go_on_with_other_weights(routers: tuple[FakeRouter, ...]) -> None:
    router = routers[0]
    before = router.adapters["a"]
    first, second = router.replicas
    other = await router.add("b", 8)
    first.script.append(LOST)
    second.served = {"a": (other, 8)}
    async with Client(router.address) as client:
        with pytest.raises(StreamBrokenError, match=f"began with {before[0]} and was to go on with {other}"):
            await read(client.generate("hi", adapter="a", sampling=GREEDY))


async def test_what_came_of_an_answer_is_given_when_its_weights_are_replaced(
    routers: tuple[FakeRouter, ...],
) -> None:
    router = routers[0]
    router.replicas[0].script.append(LOST)
    router.pick_script += [None, StaleError("adapter 'a' is a@1 now")]
    async with Client(router.address) as client:
        with pytest.raises(StreamBrokenError, match="adapter 'a' is a@1 now") as caught:
            await read(client.generate("hi", adapter="a", sampling=GREEDY))
    assert caught.value.token_ids


class TestNothingLeaks:
    """What ends in whatever way leaves nothing behind; the fixture asserts the same of the servers."""

    async def test_cancelling_while_it_waits_for_a_router(self, routers: tuple[FakeRouter, ...]) -> None:
        router = routers[0]
        async with Client(router.address, look_aside=False) as client:
            await client.status()
            await router.die()
            stream = client.generate("hi", adapter="a", sampling=GREEDY)
            reading = asyncio.create_task(read(stream))
            other = asyncio.create_task(read(client.generate("hi", adapter="a", sampling=GREEDY)))
            await asyncio.sleep(0.05)
            stream.cancel()
            other.cancel()
            for task in (reading, other):
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert attempts_under_way() == []

    async def test_closing_the_client_ends_what_runs(self, routers: tuple[FakeRouter, ...]) -> None:
        client = Client(addresses(routers))
        long = SamplingParams(max_tokens=2000, ignore_eos=True)
        streams = [client.generate("hi", adapter="a", sampling=long) for _ in range(3)]
        await anext(streams[0])
        await client.close()
        await client.close()
        with pytest.raises(asyncio.CancelledError):
            await anext(streams[1])
        for router in routers:
            await router.wait_idle()
        with pytest.raises(UnavailableError, match="the client is closed"):
            await client.complete("hi")

    async def test_closing_the_client_ends_a_pick_that_waits(self, routers: tuple[FakeRouter, ...]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            client = Client([f"127.0.0.1:{silent.getsockname()[1]}", routers[0].address])
            waiting = [asyncio.create_task(client.complete("hi", sampling=GREEDY)) for _ in range(4)]
            await asyncio.sleep(0)
            await client.close()
            ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(end) for end in ends} <= {UnavailableError, asyncio.CancelledError}, ends

    async def test_closing_the_client_ends_what_waits_for_a_router(
        self, routers: tuple[FakeRouter, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        choices = Choices(monkeypatch)
        client = Client(routers[0].address, look_aside=False)
        await client.complete("hi", sampling=GREEDY)
        await routers[0].die()
        waiting = [asyncio.create_task(client.complete("hi", sampling=GREEDY)) for _ in range(5)]
        await choices.more(15)
        await client.close()
        for end in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(end, UnavailableError | asyncio.CancelledError), repr(end)

    async def test_a_stream_that_is_dropped_unread(self, routers: tuple[FakeRouter, ...]) -> None:
        async with Client(addresses(routers)) as client:
            stream = client.generate("hi", adapter="a", sampling=SamplingParams(max_tokens=2000))
            while not routers[0].replicas[0].requests:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            del stream
            await routers[0].wait_idle()


def attempts_under_way() -> list[str]:
    coroutines = [task.get_coro() for task in asyncio.all_tasks()]
    return [repr(one) for one in coroutines if "Submission" in repr(one)]


async def test_management_goes_to_the_router_that_answers(routers: tuple[FakeRouter, ...]) -> None:
    first, second = routers
    await first.die()
    async with Client(addresses(routers)) as client:
        assert (await client.register_adapter("b", "r8")).name == "b"
        assert [one.name for one in await client.list_adapters()] == ["a", "b"]
        await client.wait_ready(10)
        await second.die()
        with pytest.raises(UnavailableError, match=f"routers {first.address}, {second.address}: cannot be"):
            await client.status()


FAILURES = st.sampled_from(
    [
        None,
        LOST,
        LOST_AT_ONCE,
        Break(after=1, error=UnavailableError("gone")),
        Break(after=9, error=UnavailableError("gone")),
        Break(after=TOKENS + 1, error=UnavailableError("gone")),
        Break(error=StaleError("stale")),
        Break(error=OverloadedError("full")),
    ]
)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
async def test_any_few_failures_are_unseen(routers: tuple[FakeRouter, ...], data: st.DataObject) -> None:
    whole = await expected(routers[0])
    servers = (*routers[0].replicas, *routers)
    for server in servers:
        server.script.clear()
        server.requests.clear()
    for replica in routers[0].replicas:
        replica.script.extend(data.draw(st.lists(FAILURES, max_size=2)))
    async with Client(addresses(routers)) as client:
        stream = client.generate("hi €", adapter="a", sampling=GREEDY)
        steps = await read(stream)
    assert joined(steps) == whole
    assert steps[-1].finish_reason is FinishReason.LENGTH
    sent = [one.attempt for server in servers for one in server.requests]
    assert sorted(sent) == list(range(stream.attempts))

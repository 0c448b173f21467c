"""The client streams, names where an answer came from, maps errors and frees what it leaves."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from loraserve.client import Client
from loraserve.client_types import ServedBy
from loraserve.errors import (
    AlreadyExistsError,
    BadInputError,
    DeadlineError,
    LoraServeError,
    NotFoundError,
    OverloadedError,
    StaleError,
    UnavailableError,
)
from loraserve.request import ChatTurn, FinishReason, SamplingParams
from tests.support.fake_router import FakeRouter, fake_router

SERVED_BY = ServedBy(replica="replica-0", table_version=7, reason="only holder")


@pytest.fixture
async def router() -> AsyncIterator[FakeRouter]:
    async with fake_router() as router:
        yield router


@pytest.fixture
async def client(router: FakeRouter) -> AsyncIterator[Client]:
    async with Client(router.address, reconnect_s=0.2) as client:
        yield client


async def test_a_stream_has_all_tokens_in_order_and_says_who_served_it(
    client: Client, router: FakeRouter
) -> None:
    version = await router.add("support", 8)
    sampling = SamplingParams(max_tokens=9, ignore_eos=True, logprobs=2)
    stream = client.generate("hello", adapter="support", sampling=sampling, request_id="mine")
    steps = [step async for step in stream]
    assert steps[-1].finish_reason is FinishReason.LENGTH
    assert steps[-1].output_tokens == sum(len(step.token_ids) for step in steps) == 9
    assert all(len(step.logprobs) == len(step.token_ids) for step in steps)
    assert (stream.request_id, stream.adapter_version) == ("mine", version)
    assert stream.served_by == SERVED_BY
    whole = await client.complete("hello", adapter="support", sampling=sampling)
    assert whole.step.token_ids == tuple(token_id for step in steps for token_id in step.token_ids)
    assert whole.step.text == "".join(step.text for step in steps)
    assert (whole.adapter_version, whole.served_by) == (version, SERVED_BY)
    base = await client.complete((1, 2, 3), sampling=sampling)
    assert base.adapter_version is None
    assert base.step.token_ids != whole.step.token_ids


async def test_every_kind_of_prompt_and_every_setting_arrives(client: Client, router: FakeRouter) -> None:
    sampling = SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=-3,
        stop=("€",),
        stop_token_ids=(5,),
        max_tokens=2,
    )
    await client.complete("text", sampling=sampling)
    await client.complete((1, 2), sampling=sampling)
    await client.complete((ChatTurn(role="user", content="hi"),), sampling=sampling)
    text, token_ids, chat = router.requests
    assert text.text == "text"
    assert list(token_ids.token_ids.ids) == [1, 2]
    assert [(turn.role, turn.content) for turn in chat.chat.messages] == [("user", "hi")]
    got = text.sampling
    assert (got.temperature, got.top_p, got.top_k, got.min_p, got.seed) == (0.5, 0.9, 7, 0.1, -3)
    assert (list(got.stop), list(got.stop_token_ids), got.max_tokens) == (["€"], [5], 2)


@pytest.mark.parametrize(
    "error",
    [OverloadedError("full"), UnavailableError("no holder"), StaleError("old table"), BadInputError("n: 2")],
    ids=lambda error: type(error).__name__,
)
async def test_the_servers_errors_come_back_as_they_were_raised(
    client: Client, router: FakeRouter, error: LoraServeError
) -> None:
    router.refusal = error
    stream = client.generate("x")
    with pytest.raises(type(error), match=str(error)):
        await anext(stream)
    assert stream.served_by == SERVED_BY
    with pytest.raises(type(error), match=str(error)):
        await client.complete("x")


async def test_an_unknown_adapter_is_not_found(client: Client) -> None:
    with pytest.raises(NotFoundError, match="nobody"):
        await client.complete("x", adapter="nobody")


@pytest.mark.parametrize(
    ("prompt", "sampling"),
    [
        ("\udcff", SamplingParams()),
        ((-1,), SamplingParams()),
        ("x", SamplingParams(seed=2**63)),
        ("x", SamplingParams(max_tokens=-1)),
    ],
    ids=["no UTF-8", "negative id", "large seed", "negative length"],
)
async def test_what_the_protocol_cannot_carry_is_bad_input(
    client: Client, prompt: str | tuple[int, ...], sampling: SamplingParams
) -> None:
    with pytest.raises(BadInputError):
        client.generate(prompt, sampling=sampling)


async def test_a_deadline_is_told_and_frees_the_engine(client: Client, router: FakeRouter) -> None:
    with pytest.raises(DeadlineError):
        await client.complete("x", sampling=SamplingParams(max_tokens=2000, ignore_eos=True), timeout_s=0.1)
    await router.wait_idle()


async def test_leaving_a_stream_or_cancelling_its_reader_frees_the_engine(
    client: Client, router: FakeRouter
) -> None:
    long = SamplingParams(max_tokens=2000, ignore_eos=True)
    stream = client.generate("x", sampling=long)
    await anext(stream)
    assert router.engine.load().running == 1
    await stream.aclose()
    await router.wait_idle()
    started = asyncio.Event()

    async def read() -> None:
        async for _ in client.generate("x", sampling=long):
            started.set()

    reader = asyncio.create_task(read())
    await started.wait()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await router.wait_idle()


async def test_adapters_are_registered_listed_and_removed(client: Client) -> None:
    added = await client.register_adapter("a", "somewhere/r16")
    assert (added.name, added.rank, added.holders[0].replica_id) == ("a", 16, "replica-0")
    assert await client.list_adapters() == (added,)
    with pytest.raises(AlreadyExistsError):
        await client.register_adapter("a", "somewhere/r16")
    assert await client.remove_adapter("a") == 8
    with pytest.raises(NotFoundError):
        await client.remove_adapter("a")
    assert await client.list_adapters() == ()


async def test_status_is_a_value(client: Client) -> None:
    await client.register_adapter("a", "r8")
    status = await client.status()
    assert (status.cluster, status.table_version, status.controller_reachable) == ("fake", 7, True)
    assert [replica.state for replica in status.replicas] == ["ready"]
    assert [adapter.name for adapter in status.adapters] == ["a"]
    assert status.router.router_id == "router-0"


async def test_waiting_ends_when_the_router_serves() -> None:
    async with fake_router(serving=False) as router, Client(router.address) as client:
        with pytest.raises(UnavailableError, match="NOT_SERVING"):
            await client.wait_ready(0.2)
        waiting = asyncio.create_task(client.wait_ready(10))
        await router.health.set_serving(True)
        await waiting


async def test_nobody_there_is_one_clear_line() -> None:
    async with fake_router() as router:
        address = router.address
    async with Client(address) as client:
        with pytest.raises(UnavailableError, match=f"router {address}: cannot be reached"):
            await client.complete("x")
        with pytest.raises(UnavailableError, match="not ready within"):
            await client.wait_ready(0.2)

"""Whoever stops waiting, at whatever stage, leaves nothing behind and takes nothing from others."""

import asyncio
import threading
from dataclasses import replace

import pytest

from loraserve.errors import DeadlineError, UnavailableError
from loraserve.fabric.wanted import Acquired, Wanted
from loraserve.transport.memory import FaultKind
from tests.support.adapter_maker import one_line
from tests.support.fabric_kit import WAIT_S, Hooks, Library, Node, Stage, Town, from_peers, until
from tests.support.transport_kit import eventually

STAGES = ("before the head", "with the head", "before the body", "in the body", "after the body")


def stop_at(node: Node, where: str) -> Stage:
    """Have all that the node fetches stand still there."""
    stage = Stage()

    def stand_with_head(head: bytes, body_bytes: int) -> tuple[bytes, int]:
        stage.stand()
        return head, body_bytes

    def stand_in_body(begin: int, end: int) -> tuple[int, int]:
        stage.stand()
        return begin, end

    node.transports[0].hooks = {
        "before the head": Hooks(before_head=lambda key: stage.stand()),
        "with the head": Hooks(change_head=stand_with_head),
        "before the body": Hooks(before_body=lambda key, stop: stage.stand()),
        "in the body": Hooks(on_piece=stand_in_body),
        "after the body": Hooks(after_body=lambda key: stage.stand()),
    }[where]
    return stage


def start(node: Node, wanted: Wanted) -> "asyncio.Task[Acquired]":
    return asyncio.create_task(node.fabric.acquire(wanted))


async def cancelled(task: "asyncio.Task[Acquired]") -> None:
    """Cancel it and see it go."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def is_empty(node: Node) -> bool:
    counts = node.counts
    here_bytes = counts.held_bytes + counts.cached_bytes + counts.in_flight_bytes
    return node.fabric.is_idle and not here_bytes


@pytest.mark.parametrize("where", STAGES)
async def test_the_last_to_leave_ends_the_fetch_and_its_memory_is_free_when_it_has_ended(
    town: Town, library: Library, where: str
) -> None:
    wanted = library.large()
    holder, node = await town.holder("holder", wanted), town("node")
    stage = stop_at(node, where)
    tasks = [start(node, from_peers(wanted, holder)) for _ in range(2)]
    await stage.wait()
    await cancelled(tasks[0])
    node.check()
    assert node.counts.num_fetching == 1, "another one waits for it"
    await cancelled(tasks[1])
    node.check()
    assert node.counts.in_flight_bytes > 0, "the transport may still write"
    stage.go()
    await until(lambda: is_empty(node))
    node.check(idle=True)
    assert node.counts.failures == {}, "nobody was at fault"
    assert node.counts.loads == {}
    asked = [what for what, _ in node.transports[0].asked]
    assert asked == (["head"] if "head" in where else ["head", "body"]), "it has ended as soon as it could"
    node.transports[0].hooks = Hooks()
    assert (await node.fabric.acquire(from_peers(wanted, holder))).source == "peer"


@pytest.mark.parametrize("where", STAGES)
async def test_who_comes_while_a_fetch_ends_gets_one_of_its_own(
    town: Town, library: Library, where: str
) -> None:
    wanted = library.large()
    holder, node = await town.holder("holder", wanted), town("node")
    stage = stop_at(node, where)
    task = start(node, from_peers(wanted, holder))
    await stage.wait()
    await cancelled(task)
    node.transports[0].hooks = Hooks()
    acquired = await node.fabric.acquire(from_peers(wanted, holder))
    assert acquired.segment.decoded.digest == wanted.digest
    node.check()
    stage.go()
    await until(lambda: node.fabric.is_idle)
    node.check(idle=True)
    assert node.counts.loads == {"memory": 1}


async def test_who_is_cancelled_in_the_queue_was_never_there(town: Town, library: Library) -> None:
    first, second, third = (library.large(f"n{number}") for number in range(3))
    holder, node, stage = (
        await town.holder("holder", first, second, third),
        town("node", max_fetches=1),
        Stage(),
    )
    node.hooks.before_body = lambda key, stop: stage.stand() if key == first.version_id else None
    running, queued, last = [start(node, from_peers(one, holder)) for one in (first, second, third)]
    await stage.wait()
    assert node.counts.num_waiting == 2
    await cancelled(queued)
    await until(lambda: node.counts.num_waiting == 1)
    node.check()
    stage.go()
    await asyncio.gather(running, last)
    assert not [key for _, key in node.transports[0].asked if key == second.version_id]


async def test_who_is_cancelled_as_it_lands_holds_nothing(town: Town, library: Library) -> None:
    wanted = library.large()
    holder, node = await town.holder("holder", wanted), town("node")
    stage = stop_at(node, "after the body")
    waits = [start(node, from_peers(wanted, holder)) for _ in range(2)]
    await stage.wait()
    landed = node.fabric._flights[wanted.version_id].landed
    # Between the landing and the step in which those who wait hear of it.
    landed.add_done_callback(lambda _: waits[0].cancel())
    stage.go()
    results = await asyncio.gather(*waits, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert node.counts.held_bytes > 0
    node.fabric.release(wanted.version_id)
    assert node.counts.held_bytes == 0, "only the second one had a pin"


async def test_a_deadline_is_one_line_and_ends_the_fetch(town: Town, library: Library) -> None:
    wanted = library.large()
    holder, node = await town.holder("holder", wanted), town("node", idle_timeout_s=WAIT_S)
    holder.inject(FaultKind.STALL, 5)
    with pytest.raises(DeadlineError, match=r"not here after 0\.05 s") as error:
        await node.fabric.acquire(from_peers(wanted, holder), deadline_s=0.05)
    one_line(error.value)
    await until(lambda: is_empty(node))
    assert node.counts.failures == {"deadline": 1}
    node.check(idle=True)


async def test_the_origins_reading_is_not_given_out_once_nobody_wants_it(
    town: Town, library: Library
) -> None:
    wanted, node = library.large(), town("node")
    task = start(node, wanted)
    await until(lambda: node.counts.num_fetching == 1)
    await cancelled(task)
    await until(lambda: is_empty(node))
    node.check(idle=True)


@pytest.mark.parametrize("where", STAGES)
async def test_closing_ends_what_runs_and_what_waits(town: Town, library: Library, where: str) -> None:
    wanted = [library.large(f"n{number}") for number in range(3)]
    holder, node = await town.holder("holder", *wanted), town("node", max_fetches=2)
    stage = stop_at(node, where)
    tasks = [start(node, from_peers(one, holder)) for one in wanted]
    await stage.wait()
    closing = asyncio.create_task(node.fabric.close())
    await asyncio.sleep(0)
    stage.go()
    await closing
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, UnavailableError)
        assert "the fabric is closed" in one_line(result)
    node.check(idle=True)


async def test_closing_does_not_wait_for_a_peer_that_says_nothing(town: Town, library: Library) -> None:
    wanted = library()
    holder, node = await town.holder("holder", wanted), town("node")
    asked = threading.Event()
    heard: list[bool] = []

    def wait_for_the_head(key: str) -> None:
        asked.set()
        try:
            eventually(lambda: node.memory().closed, "the transport's end")
        finally:
            heard.append(node.memory().closed)

    node.hooks.before_head = wait_for_the_head
    task = start(node, from_peers(wanted, holder))
    assert await asyncio.to_thread(asked.wait, WAIT_S)
    await node.fabric.close()
    with pytest.raises(UnavailableError, match="the fabric is closed"):
        await task
    assert heard == [True]
    node.check(idle=True)


async def test_after_a_failure_the_next_call_begins_anew(town: Town, library: Library) -> None:
    wanted, node = library(), town("node")
    tasks = [start(node, replace(wanted, directory=None)) for _ in range(3)]
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert len({id(one) for one in errors}) == 3, "each gets an error of its own"
    assert (await node.fabric.acquire(wanted)).source == "origin"
